"""Rows of a table, scaled when they are fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toll_plugin.core.devices import to_device
from toll_plugin.core.rows import WithoutRows, batches_of
from toll_plugin.core.tables.distant import Table
from toll_plugin.core.tables.scaling import Floats, TableScaling

__all__ = ["Preprocessing", "TableRows", "scale_rows"]


class Preprocessing(Protocol):
    """What brings raw rows to the scale that the networks see."""

    def transform(self, X: Any) -> Any:  # noqa: N803  scikit-learn's name
        """Rows ``(N, n_features)`` to rows ``(N, n_inputs)``, as a new array."""


class TableRows:
    """Rows of an array that are scaled when they are fetched, so that no scaled copy is kept.

    Args:
        x: Of shape ``(N, n_features)``; a memory map is read batch by batch.
        index: Which rows, shape ``(n,)``.
        scaling: Applied in double precision; what comes out is single.
        device: Where the rows are put.
    """

    def __init__(
        self, x: Table, index: NDArray[np.int64] | WithoutRows, scaling: Preprocessing, device: torch.device
    ) -> None:
        self._x, self._index, self._scaling, self._device = x, index, scaling, device

    def __len__(self) -> int:
        """How many rows."""
        return len(self._index)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The scaled rows at ``index``."""
        return self._scaled(self._x[self._rows(index)])

    def batches(self, batches: Iterable[slice | Tensor]) -> Iterator[Tensor]:
        """The scaled rows at each of ``batches``, see :func:`toll_plugin.core.rows.batches_of`."""
        return map(self._scaled, batches_of(self._x, map(self._rows, batches)))

    def _rows(self, index: slice | Tensor) -> NDArray[np.int64]:
        return self._index[index if isinstance(index, slice) else index.numpy()]

    def _scaled(self, raw: NDArray[Any]) -> Tensor:
        scaled = scale_rows(self._scaling, raw)
        with np.errstate(over="ignore"):
            single = scaled.astype(np.float32)
        if not np.isfinite(single).all():
            msg = f"preprocessing must give values that single precision holds, got up to {np.abs(scaled).max():.3g}"
            raise ValueError(msg)
        return to_device(torch.from_numpy(single), self._device)


def scale_rows(scaling: Preprocessing, raw: NDArray[Any]) -> Floats:
    """Scaled rows, C-contiguous and in double precision; ``raw`` is left alone.

    Raises:
        ValueError: If a transformer gives something else.
    """
    if isinstance(scaling, TableScaling):
        return scaling.transform(raw)
    found = scaling.transform(np.array(raw, dtype=np.float64))  # it may write to what it is given
    try:
        scaled = np.ascontiguousarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"preprocessing must give a dense table of numbers, got {type(found).__name__} from {scaling!r}"
        raise ValueError(msg) from error
    if scaled.shape[:1] != raw.shape[:1] or scaled.ndim != 2 or not np.isfinite(scaled).all():
        msg = f"preprocessing must give one row of finite values for each row, which {scaling!r} did not"
        raise ValueError(msg)
    return scaled
