"""One class normal, the rest anomalous: image classification sets as anomaly detection data.

Images stay in memory as tensors and a batch is one index operation; anomalib's own data sets
open a file per image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.visualization import Visualizer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms.v2 import Transform

from toll_plugin.anomalib.datasets import TensorImageDataset
from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.image_sets import LabelledImages

__all__ = ["OneVsRest"]


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
        val_indices: Instead of a random ``val_ratio``, these images of the training part are
            held out: integers, or a ``.npy`` file of them. Normal ones validate, anomalous ones
            only with ``val_anomalies``. Default none.
        train_augmentations: Applied to each training image.
        val_augmentations: Applied to each validation image.
        test_augmentations: Applied to each test image.
        augmentations: For the splits that have none of their own.
        seed: Of the split and of the order of the training images. Default 0.

    Raises:
        FileNotFoundError: If there is no file ``val_indices``.
        ValueError: If the class does not exist, a ratio is out of range, a split is empty, or
            ``val_indices`` are no distinct positions in the training part.
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
        val_indices: str | Path | Sequence[int] | None = None,
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
        self.val_indices = val_indices
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
        held_out = None if self.val_indices is None else _positions(self.val_indices, len(train.labels))

        def shuffled(labels: Tensor, normal: bool) -> Tensor:
            index = ((labels == self.normal_class) == normal).nonzero()[:, 0]
            return index[torch.randperm(len(index), generator=generator)]

        def split(index: Tensor, skipped: int, n_random: int) -> tuple[Tensor, Tensor]:
            """What validates, and what does not."""
            chosen = torch.zeros(len(index), dtype=torch.bool)
            chosen[skipped : skipped + n_random] = True
            chosen = chosen if held_out is None else held_out[index]
            return index[chosen], index[~chosen]

        normals, anomalies = shuffled(train.labels, True), shuffled(train.labels, False)
        n_test = 0 if test is not None else max(1, round(self.test_ratio * len(normals)))
        n_val = max(1, round(self.val_ratio * len(normals))) if self.val_ratio > 0 else 0
        val_normals, others = split(normals, n_test, n_val)
        if held_out is not None and len(val_normals) == 0:
            msg = f"val_indices must hold an image of class {self.normal_class}, got none among {int(held_out.sum())}"
            raise ValueError(msg)
        if len(others) <= n_test:
            msg = (
                f"no training image is left of the {len(normals)} of class {self.normal_class}: lower the ratios"
                f"{'' if held_out is None else ' or hold out fewer val_indices'}"
            )
            raise ValueError(msg)
        val_anomalies, rest = split(anomalies, 0, round(self.val_ratio * len(anomalies)))
        if not self.val_anomalies:
            val_anomalies, rest = anomalies[:0], anomalies
        test_normals, train_normals = others[:n_test], others[n_test:]
        self.train_data = self._dataset(train, train_normals, "train")
        if len(val_normals):
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

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Write the images of a batch that a visualizer is going to draw to files, and name these instead.

        anomalib's visualizer opens each image by its path. The files lie in a temporary folder, which is
        deleted with this object.
        """
        if self._is_drawn():
            if self._image_folder is None:
                self._image_folder = TemporaryDirectory(prefix="one_vs_rest_")
            batch.image_path = self.test_data.write_images(batch.image_path, Path(self._image_folder.name))
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def _is_drawn(self) -> bool:
        trainer = self.trainer
        if trainer is None or not (trainer.testing or trainer.predicting):
            return False
        return any(isinstance(callback, Visualizer) for callback in trainer.callbacks)

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


def _positions(indices: str | Path | Sequence[int], count: int) -> Tensor:
    """Mask of the positions among ``count`` that are named by integers or by a file of them."""
    shown = repr(indices)
    if isinstance(indices, (str, Path)):
        try:
            indices = np.load(indices)
        except ValueError as error:
            msg = f"val_indices must be integers or a .npy file of them, got {shown}: {error}"
            raise ValueError(msg) from error
    values = np.asarray(indices)
    fits = values.ndim == 1 and np.issubdtype(values.dtype, np.integer) and len(np.unique(values)) == len(values)
    if not fits or len(values) == 0 or values.min() < 0 or values.max() >= count:
        msg = f"val_indices must be distinct integers from 0 to {count - 1}, got {shown} with shape {values.shape}"
        raise ValueError(msg)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(values.astype(np.int64))] = True
    return mask
