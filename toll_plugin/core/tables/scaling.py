"""Bring the columns of a table to one scale, in double precision, whatever the values."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toll_plugin.core.checks import check_option
from toll_plugin.core.tables.distant import Table

__all__ = ["Floats", "TablePreprocessing", "TableScaling"]

TablePreprocessing = Literal["robust", "standard", "none"]

Floats = NDArray[np.float64]

_LARGEST = float(np.finfo(np.float64).max)


class TableScaling:
    r"""Centre and scale each column, then compress what lies far out.

    With the scaled value :math:`v = (x - c) / s`, what comes out is :math:`v` up to
    :math:`|v| = b` (10) and :math:`\pm(b + \ln(1 + |v| - b))` beyond: finite for every finite input, ever
    growing, and too slowly for one far row to rule a network. Networks see it clipped to
    :math:`\pm b` (:attr:`limit`): what lies beyond is residual, which no extrapolation can undo.

    ============== =============================== ==================================================
    kind           centre                          scale
    ============== =============================== ==================================================
    ``"robust"``   mean of the rows inside fences  their standard deviation
    ``"standard"`` mean                            standard deviation
    ``"none"``     0                               1, and nothing is compressed
    ============== =============================== ==================================================

    The fences lie 10 robust standard deviations around the median: the interquartile range over
    1.349, or, where the middle half is constant, the median distance over 0.6745 of the rows
    that differ from it. A constant column is scaled by its own size.

    Args:
        kind: See above. Default ``"robust"``.

    Raises:
        ValueError: If ``kind`` is unknown.

    Example:
        >>> import numpy as np
        >>> scaling = TableScaling().fit(np.array([[0.0], [1.0], [2.0], [3.0], [1e6]]))
        >>> scaling.transform(np.array([[1.5]]))
        array([[0.]])
    """

    bound = 10.0
    fence = 10.0
    #: Columns that are sorted at a time hold at most this many values.
    _GROUP = 1 << 16

    def __init__(self, kind: TablePreprocessing = "robust") -> None:
        check_option("preprocessing", kind, get_args(TablePreprocessing))
        self.kind = kind
        self.limit = None if kind == "none" else self.bound
        self.centre: Floats
        self.scale: Floats

    def fit(self, x: Table, rows: NDArray[np.int64] | None = None) -> TableScaling:
        """Measure the columns.

        Args:
            x: Finite values, shape ``(N, n_features)``.
            rows: Indices of the rows to measure; by default all.

        Returns:
            Itself.
        """
        features = x.shape[1]
        self.centre, self.scale = np.zeros(features), np.ones(features)
        if self.kind == "none":
            return self
        count = len(x) if rows is None else len(rows)
        width = max(1, self._GROUP // max(count, 1))
        for start in range(0, features, width):
            columns = slice(start, start + width)
            part = x[:, columns] if rows is None else x[rows, columns]
            self.centre[columns], self.scale[columns] = self._measure(np.array(part.T, dtype=np.float64, order="C"))
        constant = self.scale == 0
        if constant.any():
            typical = np.median(self.scale[~constant]) if not constant.all() else 0.0
            self.scale[constant] = np.abs(self.centre[constant])
            self.scale[self.scale == 0] = typical or 1.0
        return self

    def _measure(self, values: Floats) -> tuple[Floats, Floats]:
        """Centre and scale of some columns, each a contiguous row of ``values``; scale 0 where one is constant."""
        # Squares of 1e200 and of 1e-200 leave double precision, so the columns are brought near 1 first.
        size = np.maximum(values.max(axis=1), -values.min(axis=1))
        size[size == 0] = 1.0
        values = values / size[:, None]
        count = np.full(len(values), float(values.shape[1]))
        if self.kind == "robust":
            low, middle, high = _quartiles(np.sort(values, axis=1))
            spread, distance = (high - low) / 1.349, np.abs(values - middle[:, None])
            for column in np.flatnonzero(spread == 0):
                apart = distance[column][distance[column] > 0]
                spread[column] = np.median(apart) / 0.6745 if len(apart) else 0.0
            outside = distance > self.fence * spread[:, None]
            count -= outside.sum(axis=1)
            values[outside] = 0.0
        centre = values.sum(axis=1) / count
        values -= centre[:, None]
        if self.kind == "robust":
            values[outside] = 0.0
        scale = np.sqrt(np.einsum("cn,cn->c", values, values) / count)
        scale[scale <= 1e-12 * np.abs(centre)] = 0.0  # rounding errors of a constant
        return centre * size, scale * size

    def transform(self, X: NDArray[Any]) -> Floats:  # noqa: N803  scikit-learn's name
        """Scaled and compressed rows, a new array in double precision of the shape of ``X``."""
        return self.transform_and_clip(X)[0]

    def transform_and_clip(self, X: NDArray[Any], scaled: Floats | None = None) -> tuple[Floats, Floats]:  # noqa: N803
        """Scaled and compressed rows, and what networks see of them, the same array where nothing is clipped.

        The former are written to ``scaled``.
        """
        if self.kind == "none":
            scaled = np.positive(X, out=scaled, dtype=np.float64, order="C")
            return scaled, scaled
        with np.errstate(over="ignore"):
            # Both divided first: the difference of two huge numbers may be more than the largest one.
            scaled = np.divide(X, self.scale, out=scaled, dtype=np.float64, order="C")
            scaled -= self.centre / self.scale
        # Which takes no memory, as absolute values would; NaN is neither.
        lowest = np.minimum.reduce(scaled, axis=None, initial=0)
        if lowest >= -self.bound and np.maximum.reduce(scaled, axis=None, initial=0) <= self.bound:
            return scaled, scaled
        clipped = scaled.clip(-self.bound, self.bound)
        far = clipped != scaled
        beyond = np.minimum(np.abs(scaled[far]), _LARGEST) - self.bound
        scaled[far] = np.copysign(self.bound + np.log1p(beyond), scaled[far])
        return scaled, clipped

    def transform_tensor(self, x: Tensor) -> Tensor:
        """:meth:`transform` in torch and double precision, for graphs that are exported."""
        if self.kind == "none":
            return x
        centre, scale = (torch.from_numpy(values) for values in (self.centre / self.scale, self.scale))
        scaled = x / scale - centre
        distance = scaled.abs()
        grown = self.bound + torch.log(1 + (distance.clamp(self.bound, _LARGEST) - self.bound))
        return torch.where(distance > self.bound, scaled.sign() * grown, scaled)


def _quartiles(ordered: Floats) -> list[Floats]:
    """The quartiles of sorted rows, as :func:`numpy.percentile` has them; to sort is faster than to partition."""
    last = ordered.shape[1] - 1
    found = []
    for share in (0.25, 0.5, 0.75):
        below = int(share * last)
        part = share * last - below
        low, high = ordered[:, below], ordered[:, min(below + 1, last)]
        # From the nearer end, as NumPy does, so that the last bits are its own.
        step = high - low
        found.append(low + step * part if part < 0.5 else high - step * (1 - part))
    return found
