"""Data sets by name: how each lists its parts and how a part becomes a :class:`Split`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.data.image_folders import categories, files_of, folder_of, inspected
from benchmarks.data.tables import (
    COLLECTIONS,
    Table,
    at_most,
    common,
    file_of,
    find_table,
    gaussian,
    halves,
    read_file,
    read_table,
)
from benchmarks.interfaces import Split
from toll_plugin.image_sets import ImageSetName, data_root

Kind = Literal["images", "table"]
Arguments = Mapping[str, Any]

#: How a table becomes a training and a test part, see :meth:`DataSet.split`.
PROTOCOLS = ("semi-supervised", "unsupervised", "bootstrap")


@dataclass(frozen=True)
class Limits:
    """How a part is cut.

    Attributes:
        max_train: Training images to draw; all by default.
        max_test: Test images to draw, labels not looked at.
        max_rows: Rows of a table to draw.
        validation_rows: Share of a table's training rows that is held out, in [0, 1).
    """

    max_train: int | None = None
    max_test: int | None = None
    max_rows: int = 10_000
    validation_rows: float = 0.0


@dataclass(frozen=True)
class DataSet:
    """A data set; its functions take the arguments that an experiment gives it.

    Attributes:
        about: One line for ``list``.
        kind: Which methods it is for.
        parts: Normal classes, categories or tables, each a comparison of its own.
        files: What a part is read from, so that changed files are run again.
        load: A part as a split of images, or as rows and labels of a table.
        arguments: Which arguments there are, beside ``parts``.
    """

    about: str
    kind: Kind
    parts: Callable[[Arguments], list[str]]
    files: Callable[[Arguments, str], Sequence[Path]]
    load: Callable[[Arguments, str, int], Split] | Callable[[Arguments, str], Table]
    arguments: tuple[str, ...] = ("root",)

    def split(self, arguments: Arguments, part: str, protocol: str, seed: int, limits: Limits) -> Split:
        """What methods see of a part.

        Semi-supervised: trained on normal samples only. For tables there are two others. Unsupervised: trained
        on all rows, which are then ranked. Bootstrap: trained on normal rows as in most papers on ADBench, which
        puts copies of test rows among the training rows, see :func:`benchmarks.data.tables.common`.
        """
        if self.kind == "images":
            return _drawn(self.load(arguments, part, seed), seed, limits)
        return _rows(*self.load(arguments, part), protocol, seed, limits)

    def fingerprint(self, arguments: Arguments, part: str) -> str:
        """Changes when a file of the part does."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files(arguments, part)]
        return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:16]


def _rows(x: np.ndarray, y: np.ndarray, protocol: str, seed: int, limits: Limits) -> Split:
    x, y = at_most(x, y, limits.max_rows)
    if protocol == "unsupervised":
        train, test = x, x
    else:
        train, test, y = {"semi-supervised": halves, "bootstrap": common}[protocol](x, y, seed)
    if protocol != "semi-supervised" and limits.validation_rows:  # files are often sorted by label
        train = train[np.random.default_rng(seed).permutation(len(train))]
    held_out = round(limits.validation_rows * len(train))
    train, validation = train[held_out:], train[:held_out]
    return Split(*(torch.from_numpy(rows) for rows in (train, validation, test)), y == 1)


def _drawn(split: Split, seed: int, limits: Limits) -> Split:
    """At most so many images of each part."""
    draw = np.random.default_rng(seed)
    train = draw.permutation(len(split.train))[: limits.max_train]
    held_out = draw.permutation(len(split.validation))[: limits.max_train]
    test = np.sort(draw.permutation(len(split.test))[: limits.max_test])
    return Split(
        split.train[train],
        split.validation[held_out],
        split.test[test],
        split.anomalous[test],
        None if split.masks is None else split.masks[test],
    )


def _one_vs_rest(make: Callable[..., Any], arguments: Arguments, part: str, seed: int) -> Split:
    data = make(arguments, normal_class=int(part), seed=seed)
    data.setup()
    train, validation, test = (getattr(data, f"{name}_data") for name in ("train", "val", "test"))
    return Split(train.images, validation.images, test.images, test.anomalous.numpy())


def _digits(_: Arguments, **given: Any) -> Any:
    from toll_plugin.anomalib import DigitsOneVsRest

    return DigitsOneVsRest(**given)


def _image_set(name: str, arguments: Arguments, **given: Any) -> Any:
    import toll_plugin.anomalib as adapter

    return getattr(adapter, name)(root=arguments.get("root"), download=False, **given)


@lru_cache(maxsize=1)
def _classes(name: ImageSetName, root: Path) -> int:
    from toll_plugin.image_sets import read_image_set

    return int(read_image_set(name, root)[0].labels.max()) + 1


def _set(name: ImageSetName, kind: str, folder: str, about: str) -> DataSet:
    def files(arguments: Arguments, _: str) -> list[Path]:
        found = data_root(arguments.get("root")) / folder
        return [path for path in sorted(found.glob("*")) if path.is_file()]

    return DataSet(
        about,
        "images",
        lambda arguments: [str(c) for c in range(_classes(name, data_root(arguments.get("root"))))],
        files,
        partial(_one_vs_rest, partial(_image_set, kind)),
    )


def _tables(collection: str, arguments: Arguments) -> list[str]:
    root = folder_of(arguments, collection)
    found = sorted(path.stem for kind in ("mat", "npz") for path in root.glob(f"*.{kind}"))
    if not found:
        remedy = f"download them from {COLLECTIONS[collection]}, or name their folder by root"
        msg = f"no .mat or .npz table in {root}: {remedy}"
        raise FileNotFoundError(msg)
    return found


def _table_path(collection: str, arguments: Arguments, part: str) -> Path:
    return find_table(part, [folder_of(arguments, collection)])


def _collection(collection: str, about: str) -> DataSet:
    return DataSet(
        about,
        "table",
        partial(_tables, collection),
        lambda arguments, part: [_table_path(collection, arguments, part)],
        lambda arguments, part: read_table(_table_path(collection, arguments, part)),
    )


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        "scikit-learn's 1797 handwritten digits, 8x8, one class normal; bundled",
        "images",
        lambda _: [str(c) for c in range(10)],
        lambda *_: [],
        partial(_one_vs_rest, _digits),
        (),
    ),
    "mnist": _set("mnist", "MNISTOneVsRest", "MNIST/raw", "MNIST, one class normal"),
    "fashion_mnist": _set(
        "fashion_mnist", "FashionMNISTOneVsRest", "FashionMNIST/raw", "Fashion-MNIST, one class normal"
    ),
    "cifar10": _set("cifar10", "CIFAR10OneVsRest", "cifar-10-batches-py", "CIFAR-10, one class normal"),
    "cifar100": _set(
        "cifar100_coarse", "CIFAR100OneVsRest", "cifar-100-python", "CIFAR-100, one of 20 superclasses normal"
    ),
    "mvtec": DataSet(
        "MVTec AD, or one folder or several in its layout; masks give pixel metrics; joined: true trains on all parts",
        "images",
        categories,
        files_of,
        inspected,
        ("root", "image_size", "joined"),
    ),
    "odds": _collection("ODDS", "the tables of a folder with ODDS' .mat files"),
    "adbench": _collection("ADBench", "the tables of a folder with ADBench's .npz files"),
    "file": DataSet(
        "a CSV or Parquet file with a column of labels (label: its name), 1 for an anomaly; drop: columns to leave out",
        "table",
        lambda arguments: [file_of(arguments).stem],
        lambda arguments, _: [file_of(arguments)],
        read_file,
        ("path", "label", "drop"),
    ),
    "gaussian": DataSet(
        "made rows around a curved surface, anomalies off it; a part is FEATURES or FEATURES+NOISE_COLUMNS",
        "table",
        lambda _: ["16", "64", "256"],
        lambda *_: [],
        gaussian,
        ("factors", "rows"),
    ),
}
