"""Data that come in pieces: what they have in common, how they are told from tables in memory."""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from toll_plugin.core.rows import RowCache
from toll_plugin.core.tables.distant import DistantTable, Table
from toll_plugin.pyod.validation import as_frame, check_table, located

__all__ = ["Batches", "Piece", "Pieces", "Work", "by_pieces", "check_count", "pieces_of"]

CallableT = TypeVar("CallableT", bound=Callable[..., Any])


class Piece(NamedTuple):
    """Some rows that lie one behind another.

    Attributes:
        rows: DataFrame or array.
        place: Where they come from, for messages.
        first: Number of the first row there.
    """

    rows: Any
    place: str
    first: int = 0


class Work:
    """A method of a detector, for one piece after another; it can be pickled.

    Args:
        detector: Fitted.
        method: Its name.
        arguments: Of the method, beside the rows.
    """

    def __init__(self, detector: Any, method: str, arguments: dict[str, Any]) -> None:
        from toll_plugin.pyod.scale.batches import lean  # noqa: PLC0415  it needs the detectors' base, which needs this

        self.detector = lean(detector, scores=method == "predict_proba")
        self.method, self.arguments = method, arguments

    def __call__(self, piece: Piece) -> Any:
        """What the method returns for a piece; for one without rows as well, which tables in memory may not be."""
        with located(piece.place):
            if len(piece.rows) == 0:
                return self._empty()
            try:
                return self._call(piece.rows)
            except (TypeError, ValueError):
                self.detector._table(piece.rows, piece.first)  # which names rows as they are numbered in their place
                raise

    def _call(self, rows: Any) -> Any:
        return getattr(self.detector, self.method)(rows, **self.arguments)

    def _empty(self) -> Any:
        return part(self._call(self.example()), slice(0))

    def example(self) -> Any:
        """One row of the detector's columns, of values that have a logarithm and a root."""
        names = getattr(self.detector, "feature_names_in_", None)
        row = np.ones((1, self.detector.n_features_in_))
        if names is None:
            return row
        import pandas as pd  # noqa: PLC0415  names come from its frames

        return pd.DataFrame(row, columns=names)


class Pieces(ABC):
    """Data that come in pieces."""

    @abstractmethod
    def __iter__(self) -> Iterator[Piece]:
        """The pieces in order, each small enough for memory; some may have no rows."""

    @abstractmethod
    def table(self, estimator: Any, memory: int) -> Table:
        """All rows as a table to fit, checked; in memory if they take no more than ``memory`` bytes there.

        ``estimator`` gets ``n_features_in_`` and ``feature_names_in_``.
        """

    def of_two_rows(self) -> Iterator[Piece]:
        """The pieces that have rows, those of a single row together with another."""
        held: Piece | None = None
        for piece in self:
            if len(piece.rows) == 0:
                continue
            if held is None:
                held = piece
            elif min(len(held.rows), len(piece.rows)) > 1:
                yield held
                held = piece
            else:
                held = held._replace(rows=_stacked(held.rows, piece.rows))
        check_count(0 if held is None else len(held.rows))
        yield cast("Piece", held)

    def results(self, work: Work) -> Any:
        """What a method makes of all rows, here joined to what it would give for a table in memory."""
        found = [work(piece) for piece in self]
        if not found:
            msg = "X must hold at least one row, got none"
            raise ValueError(msg)
        return joined(found)


class Batches(Pieces):
    """An iterator of frames, arrays, or Arrow tables and batches, which can be gone through once."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Piece]:
        for i, batch in enumerate(self._batches):
            yield Piece(as_frame(batch), f"batch {i}")

    def results(self, work: Work) -> Iterator[Any]:
        """One result for each batch, computed when it is asked for."""
        return map(work, self)

    def table(self, estimator: Any, memory: int) -> Table:
        """The rows, kept in a temporary file where they are many, since the iterator gives them once."""
        kept: RowCache | None = None
        for piece in self:
            with located(piece.place):
                rows = check_table(estimator, piece.rows, reset=kept is None, minimum=0, first=piece.first)
            kept = kept or RowCache(rows.shape[1], memory, dtype=torch.float64)
            kept.append(torch.from_numpy(np.require(rows, requirements=["C", "W"])))
        check_count(0 if kept is None else len(kept))
        return _table(cast("RowCache", kept), memory)


def _stacked(above: Any, below: Any) -> Any:
    if not hasattr(above, "iloc"):
        return np.concatenate([above, below])
    import pandas as pd  # noqa: PLC0415  the rows are its frames

    return pd.concat([above, below], ignore_index=True)


def _table(rows: RowCache, memory: int) -> Table:
    if rows.in_memory:
        return rows[:].numpy()
    return DistantTable((len(rows), rows.width), lambda index: rows[torch.from_numpy(index)].numpy(), memory)


def check_count(rows: int) -> None:
    """Refuse data that are too few to fit.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    if rows < 2:
        msg = f"X must hold at least 2 rows to fit, got {rows}"
        raise ValueError(msg)


def pieces_of(x: Any) -> Pieces | None:
    """``x`` as data in pieces; ``None`` if it is a table in memory."""
    if type(x) is np.ndarray:
        return None
    if isinstance(x, Pieces):
        return x
    if hasattr(x, "__dask_graph__"):
        from toll_plugin.pyod.scale.collections import dask_pieces  # noqa: PLC0415  needs Dask

        return dask_pieces(x)
    dataset = sys.modules.get("pyarrow.dataset")
    if isinstance(x, (str, PathLike)) or (dataset is not None and isinstance(x, dataset.Dataset)):
        from toll_plugin.pyod.scale.parquet import Parquet  # noqa: PLC0415  needs Arrow's datasets

        return Parquet(x)
    return Batches(x) if isinstance(x, Iterator) else None


def by_pieces(method: CallableT) -> CallableT:
    """Let a method that looks at each row by itself take data in pieces, too.

    For a Dask collection the result is a lazy one, for an iterator an iterator of one result for each batch, and
    for Parquet what a table in memory would give.
    """

    @functools.wraps(method)
    def call(self: Any, X: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
        pieces = pieces_of(X)
        if pieces is None:
            return method(self, X, *args, **kwargs)
        self._check_fitted()
        names = method.__code__.co_varnames[2:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if arguments.get("return_confidence"):
            msg = "return_confidence=True needs a table in memory, got data in pieces"
            raise ValueError(msg)
        return pieces.results(Work(self, method.__name__, arguments))

    return call  # type: ignore[return-value]


def part(result: Any, rows: slice) -> Any:
    """Some rows of a method's result."""
    return result[rows] if isinstance(result, np.ndarray) else result.rows(rows)


def joined(results: list[Any]) -> Any:
    """One result from those of pieces."""
    first = results[0]
    return np.concatenate(results) if isinstance(first, np.ndarray) else type(first).joined(results)
