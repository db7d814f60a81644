"""Samples that are fetched when they are needed: a protocol, and rows kept in memory or in a file."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toll_plugin.core.checks import check_finite_float

__all__ = ["RowCache", "RowSubset", "Rows"]


class Rows(Protocol):
    """Samples that are fetched when they are needed; a tensor is one."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The samples at ``index``, shape ``(N, *)``."""


class RowCache:
    """A growing table of single-precision rows.

    Rows that are added stay in memory until they exceed ``limit`` bytes; then all of them move to
    an unnamed temporary file, which is gone with the object and takes no memory but what the
    system lends it.

    Args:
        width: Values per row.
        limit: Bytes that may stay in memory, at least 0. Default 1 GiB.
        folder: Where the file goes; by default the system's temporary folder.

    Raises:
        ValueError: If ``limit`` is negative, or ``folder`` none.

    Example:
        >>> import torch
        >>> cache = RowCache(3, limit=0)
        >>> cache.append(torch.eye(3))
        >>> cache.append(torch.zeros(1, 3))
        >>> len(cache), cache[torch.tensor([3, 1])].tolist()
        (4, [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    """

    def __init__(self, width: int, limit: float = 2**30, folder: str | Path | None = None) -> None:
        self._width = width
        self._limit = check_finite_float("limit", limit, minimum=0)
        if folder is not None and not Path(folder).is_dir():
            msg = f"folder must be an existing folder, got {str(folder)!r}"
            raise ValueError(msg)
        self._folder = folder
        self._count = 0
        self._kept = np.empty((0, width), np.float32)
        self._file: IO[bytes] | None = None
        self._mapped: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """How many rows."""
        return self._count

    @property
    def in_memory(self) -> bool:
        """Whether no file was needed."""
        return self._file is None

    def append(self, rows: Tensor) -> None:
        """Add rows, shape ``(N, width)``.

        Raises:
            ValueError: If they have another width, or are not finite.
        """
        rows = rows.detach().cpu().float()  # first, since double precision may be finite and single not
        if rows.ndim != 2 or rows.shape[1] != self._width:
            msg = f"rows must have shape (N, {self._width}), got {tuple(rows.shape)}"
            raise ValueError(msg)
        if not bool(rows.isfinite().all()):
            msg = "rows must be finite, got NaN or infinity"
            raise ValueError(msg)
        array = rows.contiguous().numpy()
        count = self._count + len(array)
        if self._file is None and 4 * self._width * count > self._limit:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  it lives as long as the cache
            weakref.finalize(self, self._file.close)
            self._file.write(self._kept.data)
            self._kept = self._kept[:0].copy()
        if self._file is None:
            # Growing in place moves pages where joining pieces would hold each row twice; nobody else holds the array.
            self._kept.resize((count, self._width), refcheck=False)
            self._kept[self._count :] = array
        else:
            self._file.write(array.data)
            self._mapped = None
        self._count = count

    def _table(self) -> NDArray[np.float32]:
        """All rows, for as long as none is added."""
        if self._file is None:
            return self._kept
        if self._mapped is None:
            self._file.flush()
            self._mapped = np.memmap(self._file, np.float32, "r", shape=(self._count, self._width))
        return self._mapped

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """A copy of the rows at ``index``."""
        found: Any = self._table()[index if isinstance(index, slice) else index.numpy()]
        return torch.from_numpy(np.array(found))


class RowSubset:
    """Some rows of another object that gives rows.

    Args:
        rows: The object, indexed by tensors of positions.
        index: Which of its rows, shape ``(N,)``; one may stand there several times.
    """

    def __init__(self, rows: Rows, index: Tensor) -> None:
        self._rows, self._index = rows, index

    def __len__(self) -> int:
        """How many."""
        return len(self._index)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The rows at ``index``."""
        return self._rows[self._index[index]]
