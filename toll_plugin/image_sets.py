"""The labelled image sets of the paper, read by torchvision from the files people have.

This module needs torchvision only, neither host: the anomalib data modules and the
benchmarks both read through it.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from toll_plugin.core.checks import check_option

__all__ = ["ImageSetName", "LabelledImages", "data_root", "download_image_set", "read_image_set"]

ImageSetName = Literal["mnist", "fashion_mnist", "cifar10", "cifar100", "cifar100_coarse"]

_CLASSES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "cifar100_coarse": "CIFAR100",
}


class LabelledImages(NamedTuple):
    """Images and their classes.

    Attributes:
        images: ``(N, C, H, W)`` with 1 or 3 channels; uint8 in [0, 255] or float in [0, 1].
        labels: Class of each image, ``(N,)``, integers.
    """

    images: Tensor
    labels: Tensor


def data_root(root: str | Path | None = None) -> Path:
    """Where data sets are looked for: ``root``, else ``TOLL_DATA_ROOT``, else anomalib's ``./datasets``.

    Example:
        >>> str(data_root("/data"))
        '/data'
    """
    return Path(root or os.environ.get("TOLL_DATA_ROOT") or "datasets").expanduser()


def read_image_set(name: ImageSetName, root: str | Path | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Training and test part of a set, as uint8 in memory (MNIST 55 MB, a CIFAR 185 MB).

    Args:
        name: ``"mnist"``, ``"fashion_mnist"``, ``"cifar10"``, ``"cifar100"`` (100 fine classes) or
            ``"cifar100_coarse"`` (its 20 superclasses).
        root: The folder that torchvision calls by this name, which holds ``MNIST/raw``,
            ``FashionMNIST/raw``, ``cifar-10-batches-py`` or ``cifar-100-python``. Default: the
            environment variable ``TOLL_DATA_ROOT``, else ``./datasets``.

    Raises:
        FileNotFoundError: If files are missing; it says what to download and where to put it.
        ValueError: If a file is damaged (the CIFARs have checksums, of the others the structure is
            looked at), or the name is unknown.

    Example:
        >>> read_image_set("mnist", "/nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: MNIST is not complete: train-images-idx3-ubyte, ... missing in /nowhere/MNIST/raw...
    """
    kind = _kind(name)
    folder, files = _files(kind, root)
    if not all((folder / file).is_file() for file in files):
        raise FileNotFoundError(_missing(kind, root))
    try:
        return _part(kind, name, root, folder, train=True), _part(kind, name, root, folder, train=False)
    except _DAMAGE as error:
        what = _wrong_checksums(kind, folder) or repr(error)
        msg = f"{kind.__name__} is damaged in {folder} ({what}): delete it. {_remedy(kind, root)}"
        raise ValueError(msg) from error


def download_image_set(name: ImageSetName, root: str | Path | None = None) -> None:
    """Let torchvision download a set whose files are missing; arguments as :func:`read_image_set`.

    Files that are there are left alone.

    Raises:
        FileNotFoundError: If it failed; it says what to download by hand and where to put it.
    """
    kind = _kind(name)
    folder, files = _files(kind, root)
    if not all((folder / file).is_file() for file in files):
        try:
            kind(str(data_root(root)), download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(_missing(kind, root)) from error


def _kind(name: str) -> Any:
    check_option("name", name, get_args(ImageSetName))
    from torchvision import datasets  # noqa: PLC0415  a second that nothing else here needs

    return getattr(datasets, _CLASSES[name])


def _files(kind: Any, root: str | Path | None) -> tuple[Path, list[str]]:
    """The folder of a set and the names of its files."""
    if hasattr(kind, "resources"):
        return data_root(root) / kind.__name__ / "raw", [file.removesuffix(".gz") for file, _ in kind.resources]
    files = [file for file, _ in kind.train_list + kind.test_list]
    return data_root(root) / kind.base_folder, [*files, kind.meta["filename"]]


def _missing(kind: Any, root: str | Path | None) -> str:
    folder, files = _files(kind, root)
    missing = ", ".join(file for file in files if not (folder / file).is_file())
    return (
        f"{kind.__name__} is not complete: {missing} missing in {folder}. {_remedy(kind, root)}, or set "
        f"root or the environment variable TOLL_DATA_ROOT to the folder that holds {_top(kind)}"
    )


def _top(kind: Any) -> str:
    top: str = kind.__name__ if hasattr(kind, "resources") else kind.base_folder
    return top


def _remedy(kind: Any, root: str | Path | None) -> str:
    """What to download and where to unpack it."""
    if hasattr(kind, "resources"):
        archives = ", ".join(file for file, _ in kind.resources)
        return f"Download {archives} from {kind.mirrors[0]} and unpack them in {_files(kind, root)[0]}"
    return f"Download {kind.url} and unpack it in {data_root(root)}"


#: What torchvision, torch and pickle raise for a file that is not what it should be.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def _wrong_checksums(kind: Any, folder: Path) -> str:
    """Which of the files with a published checksum are not what they should be."""
    if not hasattr(kind, "train_list"):
        return ""
    from torchvision.datasets.utils import check_integrity  # noqa: PLC0415

    sums = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    return ", ".join(f"{file} has another checksum" for file, md5 in sums if not check_integrity(folder / file, md5))


def _part(kind: Any, name: str, root: str | Path | None, folder: Path, *, train: bool) -> LabelledImages:
    part = kind(str(data_root(root)), train=train)
    images = torch.as_tensor(np.asarray(part.data))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(part.targets)
    if name == "cifar100_coarse":
        # torchvision leaves the superclasses in the file, whose checksum it has just compared.
        ((file, _),) = kind.train_list if train else kind.test_list
        with (folder / file).open("rb") as stream:
            labels = torch.as_tensor(pickle.load(stream, encoding="latin1")["coarse_labels"])  # noqa: S301
    if len(images) != len(labels) or len(images) == 0:
        msg = f"{len(images)} images and {len(labels)} labels"
        raise ValueError(msg)
    return LabelledImages(images, labels)
