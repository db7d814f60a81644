"""A table that lies outside memory, of which a fit fetches the rows that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toll_plugin.core.checks import check_integer

__all__ = ["DistantTable", "Table"]

Index = slice | NDArray[np.int64]


class DistantTable:
    """Rows that are fetched in passes over the place where they lie.

    A fit of it equals a fit of the same rows in memory, bit for bit: the same rows are drawn, in the same order.

    Args:
        shape: ``(N, n_features)``.
        fetch: Called with row numbers that rise, shape ``(n,)``; returns these rows, ``(n, n_features)``. A call is
            a pass.
        memory: Bytes that rows which are fetched ahead may take together.

    Example:
        >>> import numpy as np
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> table = DistantTable(x.shape, lambda rows: x[rows], memory=32)
        >>> table[np.array([5, 0, 5])].tolist()
        [[10.0, 11.0], [0.0, 1.0], [10.0, 11.0]]
        >>> [batch.tolist() for batch in table.batches([np.array([3]), np.array([1, 0])])]
        [[[6.0, 7.0]], [[2.0, 3.0], [0.0, 1.0]]]
    """

    def __init__(self, shape: tuple[int, int], fetch: Callable[[NDArray[np.int64]], NDArray[Any]], memory: int) -> None:
        self.shape = shape
        self._fetch, self._memory = fetch, check_integer("memory", memory, minimum=1)
        self._kept: tuple[NDArray[np.int64], NDArray[Any]] = np.arange(0), np.empty((0, shape[1]))

    def __len__(self) -> int:
        """How many rows."""
        return self.shape[0]

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Fetch rows that will be asked for more than once, and keep them."""
        self._kept = self._block([rows])

    def __getitem__(self, index: Index | tuple[Index, slice]) -> NDArray[Any]:
        """The rows at ``index``, which may be followed by a choice of columns."""
        if isinstance(index, tuple):
            found: NDArray[Any] = self[index[0]][:, index[1]]
            return found
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index
        kept = np.isin(rows, self._kept[0]).all()
        return _at(self._kept if kept else self._block([rows]), rows)

    def batches(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[Any]]:
        """The rows of each batch, as many batches fetched in one pass as half the memory holds.

        While those are used, a thread fetches the next.
        """
        with ThreadPoolExecutor(1) as reader:
            now: tuple[list[NDArray[np.int64]], Future[Any]] | None = None
            for block in self._blocks(batches):
                ahead = block, reader.submit(self._block, block)
                if now is not None:
                    yield from _used(*now)
                now = ahead
            if now is not None:
                yield from _used(*now)

    def _blocks(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[list[NDArray[np.int64]]]:
        """Batches together, of no more rows than half the memory holds where one batch does not have more."""
        most = self._memory // (2 * 8 * self.shape[1])
        block: list[NDArray[np.int64]] = []
        rows = 0
        for batch in batches:
            if block and rows + len(batch) > most:
                yield block
                block, rows = [], 0
            block.append(batch)
            rows += len(batch)
        if block:
            yield block

    def _block(self, batches: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The rows of some batches, by number, each once."""
        numbers = np.unique(np.concatenate(batches))
        return numbers, self._fetch(numbers)


Table = NDArray[Any] | DistantTable


def _used(batches: list[NDArray[np.int64]], coming: Future[Any]) -> Iterator[NDArray[Any]]:
    block = coming.result()
    return (_at(block, batch) for batch in batches)


def _at(block: tuple[NDArray[np.int64], NDArray[Any]], rows: NDArray[np.int64]) -> NDArray[Any]:
    numbers, values = block
    found: NDArray[Any] = values[np.searchsorted(numbers, rows)]
    return found
