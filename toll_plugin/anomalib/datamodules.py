"""The digits of scikit-learn and the image sets of the paper, one class normal and the rest anomalous."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.transforms.v2 import Transform

from toll_plugin.anomalib.one_vs_rest import OneVsRest
from toll_plugin.core.checks import check_option
from toll_plugin.image_sets import ImageSetName, LabelledImages, download_image_set, read_image_set

__all__ = [
    "CIFAR10OneVsRest",
    "CIFAR100OneVsRest",
    "DigitsOneVsRest",
    "FashionMNISTOneVsRest",
    "ImageSetOneVsRest",
    "MNISTOneVsRest",
]


class DigitsOneVsRest(OneVsRest):
    """scikit-learn's 1797 handwritten digits, 8x8 grey, bundled with it: nothing to download.

    With the default ratios a class has about 108 training, 36 validation and 36 test images,
    and the test has about 1620 anomalous ones. Arguments as :class:`OneVsRest`.

    Source:
        Optical recognition of handwritten digits (UCI), :func:`sklearn.datasets.load_digits`.

    Example:
        >>> data = DigitsOneVsRest(normal_class=8)
        >>> data.setup()
        >>> next(iter(data.train_dataloader())).image.shape
        torch.Size([32, 3, 8, 8])
    """

    def load(self) -> tuple[LabelledImages, None]:
        """The digits; they have no test part."""
        from sklearn.datasets import load_digits  # noqa: PLC0415  a second that other data need not pay

        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        return LabelledImages(images, torch.from_numpy(digits.target)), None


class ImageSetOneVsRest(OneVsRest):
    """A set that :func:`toll_plugin.image_sets.read_image_set` reads; its test part is tested whole.

    Images stay in memory as bytes, 55 MB for MNIST, 185 MB for a CIFAR.

    Args:
        root: Folder that holds ``MNIST/raw``, ``FashionMNIST/raw``, ``cifar-10-batches-py`` or
            ``cifar-100-python``, torchvision's ``root``. Default: the environment variable
            ``TOLL_DATA_ROOT``, else anomalib's ``./datasets``.
        normal_class: The class that is normal, from 0; all others are anomalous. Default 0.
        train_batch_size: Images per training step. Default 32.
        eval_batch_size: Images per evaluation step. Default 256.
        num_workers: Data loader processes. Default 0: the images are in memory.
        val_ratio: Share of the normal training images that validates. Default 0.2.
        val_anomalies: Also validate with anomalous training images. Default false.
        val_indices: What validates instead; the authors' are in their repository's ``val IDs``.
        download: Let torchvision download missing files into ``root``, as anomalib does with its
            own data sets. Default true.
        train_augmentations: Applied to each training image.
        val_augmentations: Applied to each validation image.
        test_augmentations: Applied to each test image.
        augmentations: For the splits that have none of their own.
        seed: Of the split and of the order of the training images. Default 0.

    Raises:
        FileNotFoundError: If files are missing and could not be downloaded; it says what to
            download and where to put it.
        ValueError: If a file is damaged, or as for :class:`OneVsRest`.
    """

    _set: ImageSetName

    def __init__(
        self,
        root: str | Path | None = None,
        normal_class: int = 0,
        train_batch_size: int = 32,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        val_ratio: float = 0.2,
        val_anomalies: bool = False,
        val_indices: str | Path | Sequence[int] | None = None,
        download: bool = True,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            normal_class=normal_class,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            val_ratio=val_ratio,
            val_anomalies=val_anomalies,
            val_indices=val_indices,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            seed=seed,
        )
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if they are missing and ``download`` is true."""
        if self.download:
            download_image_set(self._set, self.root)

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Both parts of the set, read from its files."""
        return read_image_set(self._set, self.root)


class MNISTOneVsRest(ImageSetOneVsRest):
    """MNIST: 10 digits, 28x28 grey, about 6000 training images each. Arguments as :class:`ImageSetOneVsRest`.

    Example:
        >>> MNISTOneVsRest("/nowhere", download=False).setup()
        Traceback (most recent call last):
        ...
        FileNotFoundError: MNIST is not complete: ...
    """

    _set = "mnist"


class FashionMNISTOneVsRest(ImageSetOneVsRest):
    """Fashion-MNIST: 10 kinds of clothes, 28x28 grey, 6000 training images each.

    Arguments as :class:`ImageSetOneVsRest`.

    Example:
        >>> FashionMNISTOneVsRest("/nowhere", download=False).setup()
        Traceback (most recent call last):
        ...
        FileNotFoundError: FashionMNIST is not complete: ...
    """

    _set = "fashion_mnist"


class CIFAR10OneVsRest(ImageSetOneVsRest):
    """CIFAR-10: 10 classes, 32x32 in colour, 5000 training images each. Arguments as :class:`ImageSetOneVsRest`.

    Example:
        >>> CIFAR10OneVsRest("/nowhere", download=False).setup()
        Traceback (most recent call last):
        ...
        FileNotFoundError: CIFAR10 is not complete: ...
    """

    _set = "cifar10"


class CIFAR100OneVsRest(ImageSetOneVsRest):
    """CIFAR-100: 32x32 in colour, 20 superclasses of 2500 training images or 100 classes of 500.

    Args:
        root: As for :class:`ImageSetOneVsRest`.
        normal_class: 0 to 19, or 0 to 99 with fine labels. Default 0.
        class_labels: What ``normal_class`` counts: ``"coarse"`` (default, the superclasses of the paper)
            or ``"fine"``.
        **kwargs: As for :class:`ImageSetOneVsRest`.

    Example:
        >>> CIFAR100OneVsRest("/nowhere", class_labels="fine", download=False).setup()
        Traceback (most recent call last):
        ...
        FileNotFoundError: CIFAR100 is not complete: ...
    """

    def __init__(
        self,
        root: str | Path | None = None,
        normal_class: int = 0,
        class_labels: Literal["coarse", "fine"] = "coarse",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, normal_class, **kwargs)
        check_option("class_labels", class_labels, ("coarse", "fine"))
        self._set = "cifar100" if class_labels == "fine" else "cifar100_coarse"
