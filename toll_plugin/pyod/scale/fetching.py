"""Fits of data in partitions that are counted: the rows that a fit reads are fetched in passes over the partitions."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from toll_plugin.core.tables.distant import DistantTable, Table
from toll_plugin.core.tables.scaling import Floats
from toll_plugin.pyod.scale.pieces import Piece, Pieces, check_count
from toll_plugin.pyod.validation import check_columns, check_table, located

__all__ = ["Check", "Partitions", "Taken", "take"]


class Check:
    """The checked values of a piece; can be pickled.

    Args:
        estimator: Knows the columns.
    """

    def __init__(self, estimator: Any) -> None:
        self._estimator = copy.copy(estimator)
        self._estimator.__dict__.pop("_stream", None)

    def __call__(self, piece: Piece) -> NDArray[Any]:
        """Values ``(N, n_features)``."""
        with located(piece.place):
            return check_table(self._estimator, piece.rows, reset=False, minimum=0, first=piece.first)


class Taken(NamedTuple):
    """Rows taken from a partition.

    Attributes:
        rows: Shape ``(n, n_features)``.
        seen: How many the partition has.
    """

    rows: Floats
    seen: int


def take(pieces: Iterable[Piece], check: Check, wanted: NDArray[np.int64]) -> Taken:
    """The rows of a partition with the numbers ``wanted``, which rise; all rows of it are checked."""
    found, seen = [np.empty((0, check._estimator.n_features_in_))], 0
    for piece in pieces:
        values = check(piece)
        first, last = np.searchsorted(wanted, [seen, seen + len(values)])
        found.append(values[wanted[first:last] - seen])
        seen += len(values)
    return Taken(np.concatenate(found), seen)


class Partitions(Pieces):
    """Partitions whose rows can be counted, and gone through as often as one likes."""

    @abstractmethod
    def columns(self) -> Any:
        """A frame or array of one row of zeros with the columns that there are."""

    @abstractmethod
    def counts(self) -> list[int]:
        """Rows of each partition."""

    @abstractmethod
    def taken(self, wanted: Sequence[tuple[int, NDArray[np.int64]]], check: Check) -> Iterator[Taken]:
        """Of each partition named by its number, the rows of these numbers, see :func:`take`."""

    def table(self, estimator: Any, memory: int) -> Table:
        """See :class:`Pieces`."""
        width = check_columns(estimator, self.columns(), reset=True).shape[1]
        counts = self.counts()
        check_count(sum(counts))
        fetch = _Fetch(self, Check(estimator), counts, width, progress=getattr(estimator, "verbose", 0) == 1)
        if 8 * width * sum(counts) <= memory:
            return fetch(np.arange(sum(counts)))
        return DistantTable((sum(counts), width), fetch, memory)


class _Fetch:
    """Fetches rows by their numbers in all partitions together; with ``progress``, a bar counts the partitions."""

    def __init__(self, pieces: Partitions, check: Check, counts: list[int], width: int, *, progress: bool) -> None:
        self._pieces, self._check, self._width, self._progress = pieces, check, width, progress
        self._starts = np.cumsum([0, *counts])
        self._first = True

    def __call__(self, rows: NDArray[np.int64]) -> Floats:
        bounds = np.searchsorted(rows, self._starts)
        # The first pass looks at all partitions, as a fit in memory looks at all rows.
        visited = [i for i in range(len(bounds) - 1) if self._first or bounds[i] < bounds[i + 1]]
        wanted = [(i, rows[bounds[i] : bounds[i + 1]] - self._starts[i]) for i in visited]
        values = np.empty((len(rows), self._width))
        found = self._pieces.taken(wanted, self._check)
        bar = tqdm(visited, desc="read", unit="partition", disable=not self._progress)
        for i, taken in zip(bar, found, strict=True):
            count = self._starts[i + 1] - self._starts[i]
            if taken.seen != count:
                msg = f"partition {i} must stay as it is during a fit, but it had {count} rows and now has {taken.seen}"
                raise ValueError(msg)
            values[bounds[i] : bounds[i + 1]] = taken.rows
        self._first = False
        return values
