"""PatchToll without its network: a linear subspace of the features of a pretrained backbone, as an anomalib model.

Like SubspaceAD (Lendering et al., arXiv 2602.23013), with the backbone of the experiment and the positions of
PatchToll instead of a large vision transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.models.components import AnomalibModule, MemoryBankMixin, TimmFeatureExtractor
from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator
from torch import Tensor, nn
from torch.nn import functional

from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.core.patches.model import usable_scale

__all__ = ["Moments", "Subspace", "SubspaceModel", "residual_basis"]


class Moments:
    """Mean and covariance of rows that come piece by piece, in double precision, whatever their number."""

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = self._products = torch.empty(0, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Add rows ``(N, C)``."""
        rows = rows.cpu().double()
        if not self.count:  # far from zero, products of what was not moved would cancel
            self._origin = rows.mean(dim=0)
            self._sum = torch.zeros_like(self._origin)
            self._products = self._sum.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self._origin
        self._sum += rows.sum(dim=0)
        self._products += rows.T @ rows
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        return self._origin + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Divided by the number of rows."""
        moved = self._sum / self.count
        return self._products / self.count - torch.outer(moved, moved)


def residual_basis(covariance: Tensor, variance: float) -> Tensor:
    """Orthonormal directions ``(C, C - K)`` beyond the K leading ones that hold ``variance`` of the variance.

    K is the least number of directions whose share is at least ``variance``; some direction is left over always.
    """
    found = torch.linalg.eigh(covariance)
    spread, directions = found.eigenvalues.flip(0).clamp_min(0), found.eigenvectors.flip(1)
    kept = int((spread.cumsum(0) < variance * spread.sum()).sum()) + 1 if spread.sum() > 0 else 0
    return directions[:, min(kept, len(spread) - 1) :]


class SubspaceModel(nn.Module):
    r"""A frozen backbone, and the distance of each position's features from a linear subspace.

    Features :math:`f_p` are PatchToll's: each layer averaged over 3 x 3 cells, all on the grid of the middle one. With
    the mean :math:`\mu` of normal positions and directions :math:`U` beyond the subspace, the score of a position is
    :math:`\|(f_p - \mu) U\|`, the map these scores enlarged and smoothed, and the image's score the mean of the
    largest ``share`` of them.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, backbone: TimmFeatureExtractor, share: float, sigma: int) -> None:
        super().__init__()
        self.backbone, self.share = backbone, share
        self.anomaly_map_generator = AnomalyMapGenerator(sigma)
        channels = sum(backbone.out_dims)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("basis", torch.eye(channels))

    def embed(self, images: Tensor) -> Tensor:
        """Features ``(N, C, h, w)``."""
        layers = [functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in self.backbone(images).values()]
        grid = sorted(tuple(layer.shape[-2:]) for layer in layers)[len(layers) // 2]
        return torch.cat([_on_grid(layer, grid) for layer in layers], dim=1)

    def distances(self, features: Tensor) -> Tensor:
        """Score of each position ``(N, 1, h, w)``."""
        rows = features.permute(0, 2, 3, 1) - self.mean
        return torch.linalg.vector_norm(rows @ self.basis, dim=-1)[:, None]

    def forward(self, images: Tensor) -> InferenceBatch | Tensor:
        features = self.embed(images)
        if self.training:
            return features
        distances = self.distances(features)
        largest = distances.flatten(1).topk(math.ceil(self.share * distances[0].numel())).values
        enlarged = functional.interpolate(distances, images.shape[-2:], mode="bilinear")
        return InferenceBatch(pred_score=largest.mean(dim=1), anomaly_map=self.anomaly_map_generator(enlarged))


def _on_grid(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    if features.shape[-1] > grid[-1]:
        return functional.adaptive_avg_pool2d(features, grid)
    return functional.interpolate(features, grid, mode="bilinear")


class Subspace(MemoryBankMixin, AnomalibModule):
    """Principal components of the features of normal images; what lies beyond them is the anomaly.

    One pass over the images sums their first and second moments, so memory does not grow with their number.

    Args:
        backbone: Name of a timm network.
        layers: Its layers, as timm names them.
        pre_trained: Whether it has pretrained weights.
        variance: Share of the variance that the subspace holds, in (0, 1).
        share: Of the positions, the largest of which the image's score is the mean of, in (0, 1].
        sigma: Of the map's smoothing, in pixels.
        standardise: Whether channels are divided by their deviation first, as PatchToll does; the paper does not.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        variance: float = 0.99,
        share: float = 0.01,
        sigma: int = 4,
        standardise: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.variance = check_finite_float("variance", variance, minimum=0, exclusive=True)
        share = check_finite_float("share", share, minimum=0, exclusive=True)
        if self.variance >= 1 or share > 1:
            msg = f"variance must be below 1 and share at most 1, got {variance} and {share}"
            raise ValueError(msg)
        self.standardise = standardise
        extractor = TimmFeatureExtractor(backbone, list(layers), pre_trained=pre_trained)
        self.model = SubspaceModel(extractor.eval(), share, check_integer("sigma", sigma, minimum=1))
        self._moments = Moments()

    @property
    def learning_type(self) -> LearningType:
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    def configure_optimizers(self) -> None:
        """None: nothing is trained by steps."""

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        features = self.model.embed(batch.image.as_subclass(Tensor))
        self._moments.update(features.permute(0, 2, 3, 1).flatten(0, 2))
        return torch.zeros((), device=self.device, requires_grad=True)

    def fit(self) -> None:
        mean, covariance = self._moments.mean, self._moments.covariance
        scale = usable_scale(covariance.diagonal().clamp_min(0).sqrt()) if self.standardise else torch.ones_like(mean)
        basis = residual_basis(covariance / torch.outer(scale, scale), self.variance)
        self.model.mean = mean.to(self.model.mean)
        self.model.basis = (basis / scale[:, None]).to(self.model.mean)
        self._moments = Moments()

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())
