"""The features of images as they are collected, before some images are held out and the rest is fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toll_plugin.core.rows import RowCache, Rows, RowSubset

__all__ = ["ImageFeatures"]


class ImageFeatures:
    """Rows of features, one per position of an image, with the names of the images.

    Images may come in any order, and several times where they are augmented anew. Rows are selected in the
    order of the names, so that a fit does not depend on how a loader shuffled the images.

    Args:
        channels: C, features of a position.
        grid: ``(height, width)`` of an image in positions.
        limit: Bytes of features that may stay in memory, see :class:`toll_plugin.core.rows.RowCache`.

    Attributes:
        names: Of the images, in the order they came in.

    Example:
        >>> import torch
        >>> features = ImageFeatures(channels=1, grid=(1, 1))
        >>> features.append(torch.tensor([2.0, 1.0]).view(2, 1, 1, 1), ["b.png", "a.png"])
        >>> features.in_order_of_names()[slice(None)].tolist()
        [[1.0], [2.0]]
    """

    def __init__(self, channels: int, grid: tuple[int, int], limit: float = 2**30) -> None:
        self.names: list[str] = []
        self.grid = grid
        self._cache = RowCache(channels, limit)

    @property
    def rows(self) -> Rows:
        """All features, ``(N * height * width, C)``, in the order they came in."""
        return self._cache

    def append(self, maps: Tensor, names: Sequence[str] | None = None) -> None:
        """Add the feature maps ``(N, C, height, width)`` of N images; without names they are numbered.

        Raises:
            ValueError: If they have another grid or other channels, or a feature is NaN or infinite
                (the error names the images).
        """
        names = names or [f"image {len(self.names) + i}" for i in range(len(maps))]
        if tuple(maps.shape[2:]) != self.grid:
            size = " x ".join(map(str, maps.shape[2:]))
            msg = f"images must have one size, {names[0]} gives {size} positions, not {self.grid[0]} x {self.grid[1]}"
            raise ValueError(msg)
        rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
        try:
            self._cache.append(rows)
        except ValueError as error:
            finite = maps.float().isfinite().flatten(1).all(dim=1).tolist()
            bad = ", ".join(name for name, fine in zip(names, finite, strict=True) if not fine)
            if not bad:
                raise
            msg = f"features must be finite, got NaN or infinite ones of {bad}: the network that gave them overflows"
            raise ValueError(msg) from error
        self.names += names

    def in_order_of_names(self) -> RowSubset:
        """All rows, image by image."""
        return self._rows_of(self._order())

    def hold_out(self, share: float, generator: torch.Generator) -> tuple[RowSubset, RowSubset]:
        """Rows to train on, and rows of images drawn to be held out; all copies of an image go together.

        A single image is both, for want of another.

        Args:
            share: Of the images, rounded, at least one image.
            generator: Source of the choice.
        """
        images = sorted(set(self.names))
        if len(images) == 1:
            return self.in_order_of_names(), self.in_order_of_names()
        count = max(1, round(share * len(images)))
        chosen = {images[i] for i in torch.randperm(len(images), generator=generator)[:count].tolist()}
        order = self._order()
        kept = [i for i in order if self.names[i] not in chosen]
        held_out = [i for i in order if self.names[i] in chosen]
        return self._rows_of(kept), self._rows_of(held_out)

    def _order(self) -> list[int]:
        return sorted(range(len(self.names)), key=self.names.__getitem__)

    def _rows_of(self, images: Sequence[int]) -> RowSubset:
        positions = self.grid[0] * self.grid[1]
        index = torch.tensor(images)[:, None] * positions + torch.arange(positions)
        return RowSubset(self._cache, index.flatten())
