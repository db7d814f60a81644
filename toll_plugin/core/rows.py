"""Tables of rows: the interface that training reads, a table that may outgrow memory, selections, and random orders."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toll_plugin.core.checks import check_finite_float

__all__ = ["FEW_ROWS", "RowCache", "RowSubset", "Rows", "WithoutRows", "batches_of", "random_order"]

#: Up to so many rows all positions may lie in memory.
FEW_ROWS = 1 << 24


class Rows(Protocol):
    """Samples that are fetched when they are needed; a tensor is one."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The samples at ``index``, shape ``(N, *)``."""


class RowCache:
    """A growing table of rows, by default in single precision.

    Rows that are added stay in memory until they exceed ``limit`` bytes; then all of them move to
    an unnamed temporary file, which is gone with the object and takes no memory but what the
    system lends it.

    Args:
        width: Values per row.
        limit: Bytes that may stay in memory, at least 0. Default 1 GiB.
        folder: Where the file goes; by default the system's temporary folder.
        dtype: Of the values. Default ``torch.float32``.

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

    def __init__(
        self,
        width: int,
        limit: float = 2**30,
        folder: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._width = width
        self._limit = check_finite_float("limit", limit, minimum=0)
        if folder is not None and not Path(folder).is_dir():
            msg = f"folder must be an existing folder, got {str(folder)!r}"
            raise ValueError(msg)
        self._folder = folder
        self._count = 0
        self._dtype = dtype
        self._kept: NDArray[Any] = np.empty((0, width), torch.empty(0, dtype=dtype).numpy().dtype)
        self._file: IO[bytes] | None = None
        self._mapped: NDArray[Any] | None = None

    def __len__(self) -> int:
        """How many rows."""
        return self._count

    @property
    def in_memory(self) -> bool:
        """Whether no file was needed."""
        return self._file is None

    @property
    def width(self) -> int:
        """Values per row."""
        return self._width

    def append(self, rows: Tensor) -> None:
        """Add rows, shape ``(N, width)``.

        Raises:
            ValueError: If they have another width, or are not finite.
        """
        rows = rows.detach().cpu().to(self._dtype)  # first, since double precision may be finite and single not
        if rows.ndim != 2 or rows.shape[1] != self._width:
            msg = f"rows must have shape (N, {self._width}), got {tuple(rows.shape)}"
            raise ValueError(msg)
        if not bool(rows.isfinite().all()):
            msg = "rows must be finite, got NaN or infinity"
            raise ValueError(msg)
        array = rows.contiguous().numpy()
        count = self._count + len(array)
        if self._file is None and self._kept.itemsize * self._width * count > self._limit:
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

    def _table(self) -> NDArray[Any]:
        """All rows; the array is no longer valid once more are added."""
        if self._file is None:
            return self._kept
        if self._mapped is None:
            self._file.flush()
            self._mapped = np.memmap(self._file, self._kept.dtype, "r", shape=(self._count, self._width))
        return self._mapped

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """A copy of the rows at ``index``."""
        found: Any = self._table()[index if isinstance(index, slice) else index.numpy()]
        return torch.from_numpy(np.array(found))


class RowSubset:
    """Some rows of a table, prepared when they are fetched.

    Args:
        rows: The table. Of another subset that prepares nothing, its table is taken, so that the
            positions of a row are looked up once however often rows were selected.
        index: Positions of the rows in ``rows``, shape ``(N,)``; one may stand there several times.
        prepare: Applied to the rows ``(M, *)`` that are fetched. Default: they stay as they are.

    Example:
        >>> import torch
        >>> table = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> subset = RowSubset(table, torch.tensor([3, 1, 1]), prepare=torch.neg)
        >>> len(subset), subset[torch.tensor([0, 2])].tolist()
        (3, [[-3.0], [-1.0]])
    """

    _rows: Rows
    _index: Tensor
    _prepare: Callable[[Tensor], Tensor] | None

    def __init__(self, rows: Rows, index: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        if isinstance(rows, RowSubset) and rows._prepare is None:
            index, rows = rows._index[index], rows._rows
        self._rows, self._index, self._prepare = rows, index, prepare

    def __len__(self) -> int:
        """How many."""
        return len(self._index)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The rows at ``index``."""
        rows = self._rows[self._index[index]]
        return rows if self._prepare is None else self._prepare(rows)


class WithoutRows:
    """The positions of all rows but some, in order, without a list of them.

    Args:
        count: Rows.
        without: Positions that are left out, sorted, each once, shape ``(n,)``.

    Example:
        >>> rest = WithoutRows(6, np.array([0, 3]))
        >>> len(rest), rest[np.arange(4)].tolist(), rest[1:3].tolist()
        (4, [1, 2, 4, 5], [2, 4])
    """

    def __init__(self, count: int, without: NDArray[np.int64]) -> None:
        self._count = count - len(without)
        # How many rows stay before each that does not.
        self._before = without - np.arange(len(without))

    def __len__(self) -> int:
        """How many rows stay."""
        return self._count

    def __iter__(self) -> Iterator[np.int64]:
        """All positions that stay."""
        return iter(self[:])

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of the rows at ``index`` among those that stay."""
        rank = np.arange(*index.indices(self._count)) if isinstance(index, slice) else index
        position: NDArray[np.int64] = rank + np.searchsorted(self._before, rank, side="right")
        return position


def random_order(count: int, needed: int, generator: torch.Generator) -> Tensor:
    """The first rows of a random order of all, ``(needed,)`` at most, each row at most once.

    Of more than 2**24 rows no order of all is drawn, whose memory would grow with them, unless a fiftieth of
    them or more is needed.

    Args:
        count: Rows.
        needed: How many of the order.
        generator: Source of the draw.
    """
    if count <= FEW_ROWS:
        return torch.randperm(count, generator=generator)[:needed]
    drawn = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    return torch.from_numpy(drawn.choice(count, min(count, needed), replace=False))


def batches_of(rows: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """The rows at each of ``batches``, one batch after another, which rows that are far away may fetch ahead.

    Args:
        rows: A tensor, an array or anything else that an index can be put to. If it has a method ``batches``, that
            is told which batches will be asked for.
        batches: Each an index.
    """
    ahead = getattr(rows, "batches", None)
    return (rows[index] for index in batches) if ahead is None else ahead(batches)
