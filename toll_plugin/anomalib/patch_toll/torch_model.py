"""The torch model of PatchToll: images in, a frozen backbone's features, a map and a score out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import TimmFeatureExtractor
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from toll_plugin.anomalib.toll.torch_model import check_finite, plain
from toll_plugin.core.patches.model import PatchAutoencoder, enlarge
from toll_plugin.core.patches.whole import ImageScore
from toll_plugin.core.resize import resize_matrix

__all__ = ["PatchTollModel"]


class PatchTollModel(nn.Module):
    r"""A frozen backbone, and a :class:`toll_plugin.core.PatchAutoencoder` at each position of its features.

    Each layer's features are averaged over a small neighbourhood and brought to one grid, with a
    position for each ``stride`` pixels; the score of each position is enlarged to the image and
    smoothed. The score of an image is made of the highest values of its map and of what its positions
    show together, see :class:`toll_plugin.core.ImageScore`.

    Args:
        backbone: Frozen; from images to a dictionary of feature maps ``(N, C_l, H_l, W_l)``.
        patches: Of as many channels as the layers have together.
        neighbourhood: Side of the average, odd, in cells of each layer's own grid.
        stride: Pixels from one position to the next.
        sigma: Standard deviation of the map's smoothing, in pixels.
        image_score: Makes the score of an image. Default: the maximum of its map, so that an image is flagged
            exactly where one of its pixels is.

    Shape:
        Images ``(N, 3, H, W)``, already scaled. In evaluation mode an ``InferenceBatch`` with
        ``anomaly_map`` ``(N, 1, H, W)`` and ``pred_score`` ``(N,)``; in training mode the features
        ``(N, C, h, w)``, C the sum of the layers' channels, ``h`` and ``w`` a ``stride``-th of the
        size, rounded up.

    Raises:
        NotFittedError: If it is asked for scores before a fit or a checkpoint gave it weights.
        ValueError: If ``neighbourhood`` is even, or images are not finite or have other than three channels.
    """

    is_fitted: Tensor

    def __init__(
        self,
        backbone: TimmFeatureExtractor,
        patches: PatchAutoencoder,
        neighbourhood: int = 3,
        stride: int = 8,
        sigma: float = 2.0,
        image_score: ImageScore | None = None,
    ) -> None:
        super().__init__()
        if neighbourhood % 2 == 0:
            msg = f"neighbourhood must be odd, got {neighbourhood}"
            raise ValueError(msg)
        self.backbone, self.patches = backbone, patches
        self.neighbourhood, self.stride, self.sigma = neighbourhood, stride, sigma
        self.image_score = image_score or ImageScore(len(patches.mean), share=0.0, weight=0.0)
        self.register_buffer("is_fitted", torch.tensor(data=False))

    def forward(self, images: Tensor, names: Sequence[str] | None = None) -> Tensor | InferenceBatch:
        """Features in training mode, predictions in evaluation mode; ``names`` are for error messages."""
        if self.training:
            return self.embed(images, names)
        if not torch.compiler.is_compiling() and not bool(self.is_fitted):
            msg = "this PatchToll is not fitted yet: train it, or load a checkpoint"
            raise NotFittedError(msg)
        features = self.embed(images, names).to(self.patches.mean.dtype)
        with _no_autocast(features):
            return self.predict(features, (images.shape[-2], images.shape[-1]))

    def predict(self, features: Tensor, size: tuple[int, int]) -> InferenceBatch:
        """Score and anomaly map of images of ``size`` from the features of their positions."""
        maps = self.map_of(self.patches(features), size)
        return InferenceBatch(pred_score=self.image_score(maps, features), anomaly_map=maps)

    def map_of(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Anomaly maps of images of ``size`` from the scores of their positions."""
        return enlarge(scores, size, self.sigma)

    def embed(self, images: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Features of each position, neighbours averaged, all layers on one grid."""
        x = plain(images)
        if not torch.compiler.is_compiling():
            if x.ndim != 4 or x.shape[1] != 3:
                msg = f"images must have shape (N, 3, height, width), got {tuple(x.shape)}"
                raise ValueError(msg)
            check_finite(x, names)
        grid = (-(-x.shape[-2] // self.stride), -(-x.shape[-1] // self.stride))
        layers: dict[Any, Tensor] = self.backbone(x)
        features = torch.cat([self._on_grid(features, grid) for features in layers.values()], dim=1)
        if features.shape[1] != len(self.patches.mean):
            shapes = ", ".join(str(tuple(found.shape)) for found in layers.values())
            msg = f"backbone must give maps (N, channels, height, width), got {shapes} of {self.backbone.backbone}"
            raise ValueError(msg)
        return features

    def _on_grid(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        sides = tuple(features.shape[-2:])
        finer = min(side // cells for side, cells in zip(sides, grid, strict=True))
        with _no_autocast(features):
            x = features.float()
            rows, columns = (
                _to_grid(side, cells, self.neighbourhood, finer, x) for side, cells in zip(sides, grid, strict=True)
            )
            return rows @ x @ columns.T


def _to_grid(side: int, cells: int, neighbourhood: int, finer: int, like: Tensor) -> Tensor:
    """What averages an axis over neighbours, then over blocks of ``finer``, and interpolates to ``cells``.

    Two small products, one for each axis, take a third of the time of torch's averages over windows.
    """
    cell = torch.arange(side, device=like.device)
    near = ((cell[:, None] - cell).abs() <= neighbourhood // 2).to(like.dtype)
    matrix = near / near.sum(dim=1, keepdim=True)
    if finer > 1:
        matrix = matrix[: side // finer * finer].view(side // finer, finer, side).mean(dim=1)
    if len(matrix) == cells:
        return matrix
    return resize_matrix(len(matrix), cells, like, antialias=False) @ matrix


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Where half precision was asked for it serves the backbone: eight bits would tie scores and move the threshold."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
