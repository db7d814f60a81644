"""Parquet files as data in pieces, by Arrow's datasets."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toll_plugin.pyod.scale.fetching import Check, Partitions, Taken, take
from toll_plugin.pyod.scale.pieces import Piece
from toll_plugin.pyod.validation import located

__all__ = ["Parquet", "Partition"]

#: Rows of a partition; a group of rows in a file may have more.
_PARTITION = 1 << 20
#: Values that are read at a time.
_VALUES = 1 << 21


class Partition(NamedTuple):
    """Some neighbouring groups of rows of one file.

    Attributes:
        number: Of the partition, from 0.
        path: Of the file.
        groups: Numbers of the groups of rows.
        rows: How many there are, before any is left out.
        fragment: What reads them.
        schema: Columns that are read, typed as in the file.
    """

    number: int
    path: str
    groups: tuple[int, ...]
    rows: int
    fragment: Any
    schema: Any

    @property
    def place(self) -> str:
        """Its name in messages."""
        groups = f"row groups {self.groups[0]} to {self.groups[-1]}" if self.groups else "no row groups"
        return f"partition {self.number} ({Path(self.path).name}, {groups})"

    def batches(self, columns: Sequence[str], where: Any = None) -> Iterator[Any]:
        """Arrow's batches of the rows, of which none is larger than memory should hold."""
        from pyarrow import dataset  # noqa: PLC0415

        scanner = self.fragment.scanner(
            columns=list(columns),
            schema=self.schema,
            filter=where,
            batch_size=max(1024, min(1 << 16, _VALUES // max(1, len(columns)))),
            batch_readahead=1,
            fragment_readahead=1,
            use_threads=False,
            # What a group of rows holds is read as it is needed, not as a whole.
            fragment_scan_options=dataset.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True),
        )
        with located(self.place):  # Arrow's errors are ValueErrors
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield batch


class Parquet(Partitions):
    """Rows in Parquet files, which detectors take in place of a table in memory.

    Files are read in the order of their names. Needs ``pip install "toll-plugin[scale]"``.

    Args:
        path: A file, a folder with its subfolders, a pattern such as ``"rows/*.parquet"``, a list of
            files, or a ``pyarrow.dataset.Dataset``.
        columns: Names of those to read. Default: all.
        where: Which rows to read, an expression of ``pyarrow.dataset.field``. Default: all.

    Raises:
        ImportError: If Arrow is missing.
        FileNotFoundError: If there is no such file.
        TypeError: If ``path`` or ``columns`` is of another kind.
        ValueError: If a column is missing from a file, or a file has more columns than the first.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import pandas as pd
        >>> from toll_plugin.pyod import TollDetector
        >>> rows = pd.DataFrame(np.random.default_rng(0).normal(size=(100, 2)), columns=["a", "b"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows.assign(id=range(100)).to_parquet(f"{folder}/rows.parquet")
        ...     source = Parquet(f"{folder}/*.parquet", columns=["a", "b"])
        ...     scores = TollDetector(max_steps=5).fit(source).decision_function(source)
        >>> scores.shape
        (100,)
    """

    def __init__(self, path: Any, *, columns: Sequence[str] | None = None, where: Any = None) -> None:
        try:
            from pyarrow import dataset  # noqa: PLC0415  whoever reads no Parquet need not have it
        except ImportError as error:
            msg = 'Parquet needs pyarrow: pip install "toll-plugin[scale]"'
            raise ImportError(msg) from error
        if isinstance(columns, str):
            msg = f"columns must be a list of names, got {columns!r}"
            raise TypeError(msg)
        self.where = where
        self.dataset = path if isinstance(path, dataset.Dataset) else dataset.dataset(_files(path), **_FORMAT)
        names = self.dataset.schema.names
        if not names:
            msg = f"path must hold at least one Parquet file, got {str(path)!r}"
            raise FileNotFoundError(msg)
        self.names = list(names if columns is None else columns)
        lost = [name for name in self.names if name not in names]
        if lost:
            msg = f"columns must be in the files, which have no {lost}, only {names[:20]}"
            raise ValueError(msg)
        self._every = columns is None

    def partitions(self, keys: Sequence[str] = ()) -> list[Partition]:
        """The files, each cut between groups of rows where it has many; ``keys`` are read beside the columns."""
        found: list[Partition] = []
        for fragment in self.dataset.get_fragments(self.where):
            for groups in _cut(fragment.row_groups):
                number, ids = len(found), tuple(group.id for group in groups)
                part = fragment.subset(row_group_ids=list(ids)) if ids else fragment
                rows = sum(group.num_rows for group in groups)
                partition = Partition(number, fragment.path, ids, rows, part, None)
                found.append(partition._replace(schema=self._schema(partition, keys)))
        return found

    def _schema(self, partition: Partition, keys: Sequence[str]) -> Any:
        """The columns to read as this file types them; what a file's folder says has the data set's type."""
        import pyarrow as pa  # noqa: PLC0415
        from pyarrow import dataset  # noqa: PLC0415

        own, whole = partition.fragment.physical_schema, self.dataset.schema
        folder = dataset.get_partition_keys(partition.fragment.partition_expression)
        wanted = dict.fromkeys([*self.names, *keys])
        lost = [name for name in wanted if name not in own.names and name not in folder]
        more = [name for name in own.names if name not in whole.names] if self._every else []
        if lost or more:
            what = f"has no column {lost}" if lost else f"has columns that the first file has not: {more}"
            msg = f"{partition.place} {what}"
            raise ValueError(msg)
        # All of the data set's columns, for the predicate may name others; keys have one type in all partitions.
        typed = [own.field(n) if n in own.names and n not in keys else whole.field(n) for n in whole.names]
        return pa.schema(typed)

    def counts(self) -> list[int]:
        """Rows of each partition."""
        if self.where is None:
            return [partition.rows for partition in self.partitions()]
        return [
            part.fragment.scanner(columns=[], schema=part.schema, filter=self.where).count_rows()
            for part in self.partitions()
        ]

    def columns(self) -> Any:
        """One row of zeros; what pandas wrote as an index is none of its columns."""
        import pandas as pd  # noqa: PLC0415

        names = self.dataset.schema.empty_table().select(self.names).to_pandas().columns
        return pd.DataFrame(np.zeros((1, len(names))), columns=names)

    def taken(self, wanted: Sequence[tuple[int, NDArray[np.int64]]], check: Check) -> Iterator[Taken]:
        """One partition after another."""
        partitions = self.partitions()
        return (take(self.pieces(partitions[number]), check, rows) for number, rows in wanted)

    def pieces(self, partition: Partition) -> Iterator[Piece]:
        """The rows of one partition."""
        first = 0
        for batch in partition.batches(self.names, self.where):
            yield Piece(batch.to_pandas(), partition.place, first)
            first += batch.num_rows

    def __iter__(self) -> Iterator[Piece]:
        return itertools.chain.from_iterable(map(self.pieces, self.partitions()))


_FORMAT = {"format": "parquet", "partitioning": "hive"}


def _files(path: Any) -> Any:
    """What Arrow takes for a path: itself, or the files that a pattern fits."""
    if isinstance(path, Sequence) and not isinstance(path, str):
        return [_absolute(str(one)) for one in path]
    text = str(path) if isinstance(path, PathLike) else path
    if not isinstance(text, str):
        msg = f"path must be a path, a pattern, a list of files or a pyarrow.dataset.Dataset, got {path!r}"
        raise TypeError(msg)
    text = _absolute(text)
    if not glob.has_magic(text) or "://" in text or Path(text).exists():
        return text
    found = sorted(glob.glob(text, recursive=True))  # noqa: PTH207  a pattern with a root, which Path.glob refuses
    if not found:
        msg = f"path must fit at least one file, got {text!r}"
        raise FileNotFoundError(msg)
    return found


def _absolute(path: str) -> str:
    """A path that means the same in a worker's folder; addresses stay."""
    return path if "://" in path else str(Path(path).absolute())


def _cut(groups: Sequence[Any]) -> Iterator[list[Any]]:
    """Neighbouring groups of rows, together of no more rows than a partition has where that can be."""
    part: list[Any] = []
    for group in groups:
        if part and sum(one.num_rows for one in part) + group.num_rows > _PARTITION:
            yield part
            part = []
        part.append(group)
    yield part
