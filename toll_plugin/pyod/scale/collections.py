"""Dask's collections, of which results are lazy ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toll_plugin.pyod.scale.fetching import Check, Partitions, Taken, take
from toll_plugin.pyod.scale.pieces import Piece, Pieces, Work

__all__ = ["DaskArray", "DaskFrame", "dask_pieces"]


def dask_pieces(x: Any) -> Pieces:
    """A Dask collection as data in pieces.

    Raises:
        TypeError: If it is neither a DataFrame nor an Array of two dimensions.
    """
    if hasattr(x, "map_partitions") and getattr(x, "ndim", 0) == 2 and hasattr(x, "dtypes"):
        return DaskFrame(x)
    if hasattr(x, "map_blocks") and getattr(x, "ndim", 0) == 2:
        return DaskArray(x)
    msg = f"X must be a Dask DataFrame or a Dask Array of shape (N, n_features), got {type(x).__name__}"
    raise TypeError(msg)


class _Collection(Partitions):
    """A collection, whose partitions are computed where Dask computes."""

    collection: Any

    def __iter__(self) -> Iterator[Piece]:
        for i, partition in enumerate(self._delayed()):
            yield Piece(partition.compute(), self.place(i))

    def _delayed(self) -> list[Any]:
        """The partitions, each to be computed by itself."""
        return list(np.ravel(self.collection.to_delayed()))

    @staticmethod
    def place(i: int) -> str:
        """What a partition is called in messages."""
        raise NotImplementedError

    def counts(self) -> list[int]:
        """Rows of each partition, counted in a pass."""
        import dask  # noqa: PLC0415  whoever has no collections need not have it
        from dask.delayed import delayed  # noqa: PLC0415

        return list(dask.compute(*map(delayed(len), self._delayed())))

    def taken(self, wanted: Sequence[tuple[int, NDArray[np.int64]]], check: Check) -> Iterator[Taken]:
        """All partitions at a time."""
        import dask  # noqa: PLC0415
        from dask.delayed import delayed  # noqa: PLC0415

        partitions, shared = self._delayed(), delayed(check, pure=True)
        work = [delayed(_taken)(partitions[i], self.place(i), shared, rows) for i, rows in wanted]
        return iter(dask.compute(*work))


def _taken(rows: Any, place: str, check: Check, wanted: NDArray[np.int64]) -> Taken:
    return take([Piece(rows, place)], check, wanted)


class DaskFrame(_Collection):
    """A Dask DataFrame, whose partitions are the pieces."""

    def __init__(self, frame: Any) -> None:
        self.collection = frame

    @staticmethod
    def place(i: int) -> str:
        """See :class:`_Collection`."""
        return f"partition {i}"

    def columns(self) -> Any:
        """One row of zeros."""
        import pandas as pd  # noqa: PLC0415

        names = self.collection.columns
        return pd.DataFrame(np.zeros((1, len(names))), columns=names)

    def results(self, work: Work) -> Any:
        """A lazy Series or DataFrame of the same divisions."""
        from dask.delayed import delayed  # noqa: PLC0415

        example = work.example()
        meta = _in_pandas(work(Piece(example, "")), work, None)[:0]
        whole = delayed(work, pure=True)  # held once by the graph, not once for each partition
        return self.collection.map_partitions(_frame_result, whole, meta=meta)


def _frame_result(frame: Any, work: Work, partition_info: dict[str, Any] | None = None) -> Any:
    place = DaskFrame.place(partition_info["number"] if partition_info else 0)
    return _in_pandas(work(Piece(frame, place)), work, frame.index)


def _in_pandas(result: Any, work: Work, index: Any) -> Any:
    """A method's result as a Series, or as a DataFrame if there are several numbers for each row."""
    import pandas as pd  # noqa: PLC0415

    if not isinstance(result, np.ndarray):
        return result.frame(index)
    if result.ndim == 2:
        return pd.DataFrame(result, index=index, columns=["normal", "anomalous"])
    return pd.Series(result, index=index, name="label" if work.method == "predict" else "score")


class DaskArray(_Collection):
    """A Dask Array ``(N, n_features)``, whose chunks of rows are the pieces."""

    def __init__(self, array: Any) -> None:
        self.collection = array if array.numblocks[1] == 1 else array.rechunk({1: -1})

    @staticmethod
    def place(i: int) -> str:
        """See :class:`_Collection`."""
        return f"chunk {i} of the rows"

    def columns(self) -> Any:
        """One row of zeros."""
        return np.zeros((1, self.collection.shape[1]))

    def results(self, work: Work) -> Any:
        """A lazy Array of the same chunks of rows; of an explanation a DataFrame."""
        from dask.delayed import delayed  # noqa: PLC0415

        example = work(Piece(work.example(), ""))
        if not isinstance(example, np.ndarray):
            from dask import dataframe  # noqa: PLC0415

            names = getattr(work.detector, "feature_names_in_", None)
            return DaskFrame(dataframe.from_dask_array(self.collection, columns=names)).results(work)
        whole, kind = delayed(work, pure=True), {"dtype": example.dtype, "meta": example[:0]}
        if example.ndim == 1:
            return self.collection.map_blocks(_array_result, whole, drop_axis=1, **kind)
        return self.collection.map_blocks(_array_result, whole, chunks=(self.collection.chunks[0], (2,)), **kind)


def _array_result(rows: Any, work: Work, block_info: Any = None) -> Any:
    place = DaskArray.place(block_info[0]["chunk-location"][0] if block_info else 0)
    return work(Piece(rows, place))
