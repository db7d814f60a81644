"""One class normal, the rest anomalous: image classification sets as anomaly detection data.

Images stay in memory as tensors and a batch is one index operation; anomalib's own data sets
open a file per image.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms.v2 import Transform

from toll_plugin.anomalib.datasets import TensorImageDataset
from toll_plugin.core.checks import check_finite_float, check_integer

__all__ = ["DigitsOneVsRest", "LabelledImages", "OneVsRest"]


class LabelledImages(NamedTuple):
    """Images and their classes.

    Attributes:
        images: ``(N, C, H, W)`` with 1 or 3 channels; uint8 in [0, 255] or float in [0, 1].
        labels: Class of each image, ``(N,)``, integers.
    """

    images: Tensor
    labels: Tensor


class OneVsRest(AnomalibDataModule):
    """One class of a labelled image set is normal, all others are anomalous.

    A subclass implements :meth:`load`. Training images are of the normal class only. Where the
    set has no test part of its own, the normal images are split into train, validation and
    test, and every image of the other classes is a test image.

    Args:
        normal_class: The normal class.
        train_batch_size: Images per training step. Default 32.
        eval_batch_size: Images per evaluation step. Default 256.
        num_workers: Data loader processes. Default 0: the images are in memory.
        val_ratio: Share of the training part's normal images held out for validation, in
            [0, 1). Default 0.2; 0 means no validation split.
        test_ratio: Share of the normal images that are tested, in (0, 1), for sets without a
            test part. Default 0.2.
        val_anomalies: Also put a ``val_ratio`` of the anomalous images of the part that the
            normal validation images come from into the validation split (they are not tested).
            Default false: validation sees normal images only, and model selection no labels.
        train_augmentations: Applied to each training image.
        val_augmentations: Applied to each validation image.
        test_augmentations: Applied to each test image.
        augmentations: For the splits that have none of their own.
        seed: Of the split and of the order of the training images. Default 0.

    Raises:
        ValueError: If the class does not exist, a ratio is out of range or a split is empty.
    """

    def __init__(
        self,
        normal_class: int = 0,
        train_batch_size: int = 32,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        val_ratio: float = 0.2,
        test_ratio: float = 0.2,
        val_anomalies: bool = False,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size=check_integer("train_batch_size", train_batch_size, minimum=1),
            eval_batch_size=check_integer("eval_batch_size", eval_batch_size, minimum=1),
            num_workers=check_integer("num_workers", num_workers, minimum=0),
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            seed=check_integer("seed", seed, minimum=0),
        )
        for name, ratio in (("val_ratio", val_ratio), ("test_ratio", test_ratio)):
            if check_finite_float(name, ratio, minimum=0, exclusive=name == "test_ratio") >= 1:
                msg = f"{name} must be below 1, got {ratio!r}"
                raise ValueError(msg)
        self.normal_class = check_integer("normal_class", normal_class, minimum=0)
        self.val_ratio = val_ratio
        self.test_ratio = test_ratio
        self.val_anomalies = val_anomalies
        self._category = str(normal_class)
        self._image_folder: TemporaryDirectory[str] | None = None

    @abstractmethod
    def load(self) -> tuple[LabelledImages, LabelledImages | None]:
        """Return the training part and the test part (or ``None``) of the set."""

    def _setup(self, _stage: str | None = None) -> None:
        train, test = self.load()
        classes = sorted(set(train.labels.tolist()))
        if self.normal_class not in classes:
            msg = f"normal_class must be one of {classes}, got {self.normal_class}"
            raise ValueError(msg)
        generator = torch.Generator().manual_seed(self.seed or 0)

        def shuffled(labels: Tensor, normal: bool) -> Tensor:
            index = ((labels == self.normal_class) == normal).nonzero()[:, 0]
            return index[torch.randperm(len(index), generator=generator)]

        normals, anomalies = shuffled(train.labels, True), shuffled(train.labels, False)
        n_test = 0 if test is not None else max(1, round(self.test_ratio * len(normals)))
        n_val = round(self.val_ratio * len(normals))
        if self.val_ratio > 0:
            n_val = max(1, n_val)
        n_val_anomalies = round(self.val_ratio * len(anomalies)) if self.val_anomalies else 0
        if n_test + n_val >= len(normals):
            msg = f"no training image is left of the {len(normals)} of class {self.normal_class}: lower the ratios"
            raise ValueError(msg)
        test_normals, val_normals, train_normals = torch.split(normals, [n_test, n_val, len(normals) - n_test - n_val])
        val_anomalies, rest = anomalies[:n_val_anomalies], anomalies[n_val_anomalies:]
        self.train_data = self._dataset(train, train_normals, "train")
        if n_val:
            self.val_data = self._dataset(train, torch.cat([val_normals, val_anomalies]), "val")
        if test is None:
            self.test_data = self._dataset(train, torch.cat([test_normals, rest]), "test")
        else:
            self.test_data = self._dataset(test, torch.arange(len(test.labels)), "test")

    def _dataset(self, part: LabelledImages, index: Tensor, split: str) -> TensorImageDataset:
        index = torch.sort(index)[0]
        labels = part.labels[index]
        names = [
            f"{self.name}/{split}/{'good' if c == self.normal_class else 'bad'}/{c}_{i:06d}.png"
            for c, i in zip(labels.tolist(), index.tolist(), strict=True)
        ]
        dataset = TensorImageDataset(part.images[index], labels != self.normal_class, names)
        dataset.category = self.category
        return dataset

    def setup(self, stage: str | None = None) -> None:
        """Make the splits; write the test images to files if the model draws on them."""
        super().setup(stage)
        model = getattr(self.trainer, "lightning_module", None)
        draws = stage in ("test", "predict") and getattr(model, "visualizer", None) is not None
        if draws and self._image_folder is None:
            self._image_folder = TemporaryDirectory(prefix="one_vs_rest_")
            self.test_data.write_images(Path(self._image_folder.name))

    def _create_test_split(self) -> None:
        """Splits are made above, by class."""

    def _create_val_split(self) -> None:
        """Splits are made above, by class."""

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """Batches in an order that depends on the seed and the epoch alone.

        A resumed fit therefore sees what an uninterrupted one would, and several processes
        share the batches that one would see.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        sampler: DistributedSampler[ImageBatch] = DistributedSampler(
            self.train_data,
            num_replicas=torch.distributed.get_world_size() if distributed else 1,
            rank=torch.distributed.get_rank() if distributed else 0,
            seed=self.seed or 0,
        )
        return DataLoader(
            self.train_data,
            batch_size=self.train_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )

    def val_dataloader(self) -> DataLoader[ImageBatch] | list[DataLoader[ImageBatch]]:
        """Validation batches; none at ``val_ratio`` 0."""
        return super().val_dataloader() if hasattr(self, "val_data") else []


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
