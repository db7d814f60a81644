"""An anomalib data set whose images are tensors in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem
from torch import Tensor
from torchvision.transforms.v2 import Resize, Transform
from torchvision.transforms.v2.functional import to_pil_image

__all__ = ["TensorImageDataset"]


class TensorImageDataset(AnomalibDataset):
    """An anomalib data set over images in memory.

    A batch is one index operation; anomalib's own data sets open a file per image.

    Args:
        images: ``(N, C, H, W)``, uint8 or float, 1 or 3 channels. Not copied.
        anomalous: ``(N,)``, true where the image is anomalous.
        names: What stands for each image's path in results and heat maps.
        augmentations: Transforms applied per image.

    Example:
        >>> import torch
        >>> data = TensorImageDataset(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.bool))
        >>> tuple(data[0].image.shape), int(data[0].gt_label)
        ((3, 8, 8), 0)
    """

    def __init__(
        self,
        images: Tensor,
        anomalous: Tensor,
        names: Sequence[str] | None = None,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self._images = images
        self._anomalous = anomalous.bool()
        paths = [f"{i:06d}.png" for i in range(len(images))] if names is None else list(names)
        # Past the property's setter, which insists that every path is a file.
        self._samples = pd.DataFrame(
            {
                "image_path": paths,
                "split": "",
                "label": np.where(self._anomalous, "anomalous", "normal"),
                "label_index": self._anomalous.long().numpy(),
                "mask_path": "",
            }
        )
        self._samples.attrs["task"] = TaskType.CLASSIFICATION
        # What a batch needs, beside the table: a row of it costs more than an image.
        self._position = torch.arange(len(images))
        self._paths = np.array(paths, dtype=object)

    @property
    def images(self) -> Tensor:
        """The images as they lie in memory, ``(N, C, H, W)``."""
        return self._images[self._position]

    @property
    def anomalous(self) -> Tensor:
        """``(N,)``, true where an image is anomalous."""
        return self._anomalous[self._position]

    def subsample(self, indices: Sequence[int], inplace: bool = False) -> TensorImageDataset:
        """The data set of some of the samples; the images are shared, not copied."""
        if len(set(indices)) != len(indices):
            msg = "indices must hold no duplicates"
            raise ValueError(msg)
        chosen = self if inplace else copy.copy(self)
        chosen._samples = self.samples.iloc[list(indices)].reset_index(drop=True)
        chosen._samples.attrs.update(self.samples.attrs)
        chosen._position = self._position[list(indices)]
        chosen._paths = self._paths[list(indices)]
        return chosen

    def __getitem__(self, index: int) -> ImageItem:
        """One image with its label."""
        return next(iter(self.__getitems__([index])))

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        """A whole batch at once, which the data loader asks for where it can."""
        position = self._position[list(indices)]
        images = self._images[position]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if isinstance(self.augmentations, Resize):
            images = self.augmentations(images)
        elif self.augmentations is not None:
            # A random transform draws once per call, so it must see one image at a time.
            images = torch.stack([self.augmentations(image) for image in images])
        return ImageBatch(
            image=images,
            gt_label=self._anomalous[position],
            image_path=self._paths[list(indices)].tolist(),
        )

    def write_images(self, names: Sequence[str], folder: Path) -> list[str]:
        """Write the images of these names as ``folder``/name, where they are not yet; return the files' paths."""
        position = dict(zip(self._paths, self._position.tolist(), strict=True))
        for name in names:
            path = folder / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                image = self._images[position[name]]
                levels = image if image.dtype == torch.uint8 else (255 * image).round().to(torch.uint8)
                to_pil_image(levels).save(path)
        return [str(folder / name) for name in names]

    def __add__(self, other: AnomalibDataset) -> TensorImageDataset:
        """Both sets' samples, in order; the images are copied."""
        if not isinstance(other, TensorImageDataset):
            msg = f"only a TensorImageDataset can be added, got {type(other).__name__}"
            raise TypeError(msg)
        parts = (self, other)
        return TensorImageDataset(
            torch.cat([part.images for part in parts]),
            torch.cat([part.anomalous for part in parts]),
            [path for part in parts for path in part._paths],
            self.augmentations,
        )

    @property
    def collate_fn(self) -> Callable[[ImageBatch], ImageBatch]:
        """Nothing to collate: batches come whole."""
        return _as_is


def _as_is(batch: ImageBatch) -> ImageBatch:
    return batch
