"""The score of a whole image: its most anomalous places, and what all its places show together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_integer, check_share
from toll_plugin.core.objective import typical
from toll_plugin.core.patches.model import usable_scale
from toll_plugin.core.resize import resize_matrix
from toll_plugin.core.rows import Rows

__all__ = ["ImageScore", "ImageTerms", "pooled", "positions_of"]

#: Of images whose pooled features are looked at: their principal components take time with the cube of their number.
_ENOUGH = 1024


class ImageTerms(NamedTuple):
    """The terms of images, each ``(N,)``.

    Attributes:
        position: Of the most anomalous places.
        image: Of the pooled features.
    """

    position: Tensor
    image: Tensor


class ImageScore(nn.Module):
    r"""Score of an image, :math:`t / u + w e / v`.

    t is the mean over the share of its anomaly map's pixels that has the highest values. e is the distance of the
    whole image from what normal images have in common: its features are averaged in ``cells`` by ``cells``
    overlapping windows and standardised over normal images, which makes x of them, and
    :math:`e = \|x - V V^\top x\|` is what their leading principal components leave of it, the reconstruction term
    of a linear autoencoder in closed form. The norm of its whitened latent told nothing beside it, and is left out.
    A local fault moves t; parts that are missing, surplus or in the wrong place, each of them normal by itself, move e.
    The units u and v are the medians of both terms on held-out normal images, see :meth:`measure`.

    Args:
        channels: C, features of a position.
        share: Of the pixels that count in t, in [0, 1]; at least one does, so 0 is the map's maximum. Default 0.01.
        weight: w, at least 0. Without the term, at 0, u is 1. Default 0.5.
        cells: Windows along each axis. Default 4.
        n_components: Columns of V, at most; half of the number of images, if that is less. Default 32.

    Attributes:
        position_unit: u, a scalar.
        image_unit: v, a scalar; infinite where there were too few images to know what they have in common.

    Shape:
        Anomaly maps ``(N, 1, H, W)`` and feature maps ``(N, C, h, w)``; scores ``(N,)`` come out.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range.

    Source:
        The mean of the top 1 % as in SubspaceAD, arXiv 2602.23013; features of whole images as in DFM, arXiv
        1909.11786; units by medians as in the rest of this package.

    Example:
        >>> import torch
        >>> score, features = ImageScore(channels=3), torch.rand(8, 3, 4, 5)
        >>> score.fit(features)
        >>> score(torch.ones(8, 1, 4, 5), features).shape
        torch.Size([8])
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    position_unit: Tensor
    image_unit: Tensor

    def __init__(
        self, channels: int, share: float = 0.01, weight: float = 0.5, cells: int = 4, n_components: int = 32
    ) -> None:
        super().__init__()
        self.share = check_share("top_share", share)
        self.weight = check_finite_float("image_weight", weight, minimum=0)
        self.cells = check_integer("cells", cells, minimum=1)
        width = check_integer("channels", channels, minimum=1) * self.cells**2
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("components", torch.zeros(width, check_integer("n_components", n_components, minimum=1)))
        self.register_buffer("position_unit", torch.ones(()))
        self.register_buffer("image_unit", torch.ones(()))

    @property
    def is_maximum(self) -> bool:
        """Whether the score is the maximum of the map, as it stands."""
        return self.share == 0 and self.weight == 0

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Learn what normal images have in common, from feature maps ``(N, C, h, w)``; of one image, nothing."""
        self.fit_pooled(pooled(features, self.cells))

    @torch.no_grad()
    def fit_pooled(self, vectors: Tensor) -> None:
        """The same from what :func:`pooled` made of them."""
        vectors = vectors[torch.linspace(0, len(vectors) - 1, min(len(vectors), _ENOUGH)).long()].cpu().double()
        deviation, mean = torch.std_mean(vectors, dim=0, correction=0)
        varies = bool((deviation > 0).any())
        self.components.zero_()
        self.image_unit.fill_(1.0 if varies else torch.inf)
        if not varies:
            return
        deviation = usable_scale(deviation)
        x = (vectors - mean) / deviation
        # The components lie among the images, of which there are fewer than features.
        size, along = torch.linalg.eigh(x @ x.T)
        count = min(self.components.shape[1], len(x) // 2)
        kept = size > size[-1] * 1e-10
        directions = (x.T @ along[:, kept] / size[kept].sqrt()).flip(1)[:, :count]
        self.mean.copy_(mean)
        self.scale.copy_(deviation)
        self.components[:, : directions.shape[1]] = directions.to(self.components)

    def position_term(self, maps: Tensor) -> Tensor:
        """t, from anomaly maps ``(N, 1, H, W)``."""
        flat = maps.flatten(1)
        count = max(1, round(self.share * flat.shape[1]))
        return flat.amax(dim=1) if count == 1 else flat.topk(count, dim=1).values.mean(dim=1)

    def image_term(self, features: Tensor) -> Tensor:
        """e, from feature maps ``(N, C, h, w)``."""
        return self.distance(pooled(features, self.cells))

    def distance(self, vectors: Tensor) -> Tensor:
        """e, from what :func:`pooled` made of features."""
        x = (vectors - self.mean) / self.scale
        rest = x - x @ self.components @ self.components.T
        return rest.square().sum(dim=1).sqrt()

    @torch.no_grad()
    def measure(self, terms: ImageTerms) -> None:
        """Set the units to the medians of the terms of held-out normal images."""
        self.position_unit.fill_(typical(terms.position) if self.weight else 1.0)
        if bool(self.image_unit.isfinite()):
            self.image_unit.fill_(typical(terms.image))

    def score_of(self, terms: ImageTerms) -> Tensor:
        """Score of each image from its terms."""
        position = terms.position / self.position_unit
        return position + self.weight * terms.image / self.image_unit if self.weight else position

    def terms(self, maps: Tensor, features: Tensor) -> ImageTerms:
        """Both terms, not yet in their units."""
        return ImageTerms(self.position_term(maps), self.image_term(features))

    def forward(self, maps: Tensor, features: Tensor) -> Tensor:
        """Score of each image."""
        if not self.weight:
            return self.position_term(maps) / self.position_unit
        return self.score_of(self.terms(maps, features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Files from before there was this score have nothing of it, and mean the maximum of the map.
        own = dict(self.named_buffers())
        if not any(prefix + name in state_dict for name in own):
            self.share, self.weight = 0.0, 0.0
            state_dict |= {prefix + name: buffer for name, buffer in own.items()}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def pooled(features: Tensor, cells: int) -> Tensor:
    """Averages of feature maps ``(N, C, H, W)`` in ``cells`` by ``cells`` overlapping windows, ``(N, C * cells**2)``.

    Example:
        >>> import torch
        >>> pooled(torch.arange(4.0).view(1, 1, 2, 2), 1)
        tensor([[1.5000]])
    """
    rows, columns = (resize_matrix(side, cells, features, antialias=True) for side in features.shape[-2:])
    return (rows @ features @ columns.T).flatten(1)


def positions_of(rows: Rows, grid: tuple[int, int]) -> Iterator[Tensor]:
    """Feature maps ``(1, C, height, width)`` of one image after the other, from rows of one position each."""
    positions = grid[0] * grid[1]
    for start in range(0, len(rows), positions):
        yield rows[slice(start, start + positions)].T.reshape(1, -1, *grid)
