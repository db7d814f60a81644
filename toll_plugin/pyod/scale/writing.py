"""One partition's scores as a file, and who writes it: this process, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from toll_plugin import __version__
from toll_plugin.pyod.files import replacing
from toll_plugin.pyod.scale.batches import BatchScorer
from toll_plugin.pyod.scale.parquet import Partition

__all__ = ["PartitionWriter", "here", "on_workers"]

#: In a file's footer: rows without a score.
_FLAGGED = "toll.flagged"


class PartitionWriter:
    """Scores one partition and writes its file; can be pickled.

    Args:
        scorer: Gives the scores.
        features: The columns that it scores.
        where: The rows.
        folder: The target.
    """

    def __init__(self, scorer: BatchScorer, features: Sequence[str], where: Any, folder: Path) -> None:
        self.scorer, self.features, self.where, self.folder = scorer, list(features), where, folder
        self.versions = _versions()

    def path(self, partition: Partition) -> Path:
        """The partition's file."""
        return self.folder / f"part-{partition.number:06d}.parquet"

    def finished(self, partition: Partition) -> tuple[int, int] | None:
        """Rows of the partition's file, and those of them that are flagged; ``None`` if it is not finished."""
        from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415

        try:
            found = parquet.read_metadata(self.path(partition))
        except (FileNotFoundError, ArrowInvalid):  # a machine that lost its power may leave an empty file
            return None
        return found.num_rows, int(found.metadata[_FLAGGED.encode()])

    def __call__(self, partition: Partition) -> Partition:
        """Write the file.

        Raises:
            RuntimeError: If the versions here are not those where the writer was made.
        """
        import pyarrow as pa  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415

        found = _versions()
        if found != self.versions:
            other = [
                f"{name} {found[name]} (not {ours})" for name, ours in self.versions.items() if found[name] != ours
            ]
            msg = f"workers must have the versions of the caller, got one with {', '.join(other)}"
            raise RuntimeError(msg)
        keys, first, flagged = self.scorer.keys, 0, 0
        schema = pa.schema([*(partition.schema.field(key) for key in keys), pa.field("score", pa.float64())])
        columns = list(dict.fromkeys([*self.features, *keys]))
        with replacing(self.path(partition)) as part, parquet.ParquetWriter(part, schema) as file:
            for batch in partition.batches(columns, self.where):
                scores = self.scorer.scores(batch.select(self.features).to_pandas(), partition.place, first)
                kept = [batch.column(key) for key in keys]
                file.write_batch(pa.record_batch([*kept, pa.array(scores)], schema=schema))
                first += len(scores)
                flagged += int(np.isnan(scores).sum())
            file.add_key_value_metadata({_FLAGGED: str(flagged)})
        return partition


def here(writer: PartitionWriter, partitions: Sequence[Partition]) -> Generator[Partition, None, None]:
    """The partitions as this process finishes them."""
    for partition in partitions:
        yield writer(partition)


def on_workers(
    client: Any, writer: PartitionWriter, partitions: Sequence[Partition]
) -> Generator[Partition, None, None]:
    """The partitions as the workers of a Dask cluster finish them."""
    from distributed import as_completed  # noqa: PLC0415  whoever has no cluster need not have it

    # A task gives the model, and not scatter, since what a lost worker held is computed again and not gone.
    shared = client.submit(_same, writer, pure=False)
    futures = client.map(_call, partitions, writer=shared, pure=False)
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        client.cancel([*futures, shared])


def _same(writer: PartitionWriter) -> PartitionWriter:
    return writer


def _call(partition: Partition, writer: PartitionWriter) -> Partition:
    return writer(partition)


@cache
def _versions() -> dict[str, str]:
    """Versions that decide the last bits of a score."""
    return {"toll-plugin": __version__} | {name: version(name) for name in ("numpy", "pandas", "pyarrow", "torch")}
