"""Scores of Parquet files as Parquet files: partition by partition, here or on a cluster, resumed after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from toll_plugin import __version__
from toll_plugin.pyod.base import CarefulDetector
from toll_plugin.pyod.files import replacing
from toll_plugin.pyod.persistence import fingerprint
from toll_plugin.pyod.scale.batches import BatchScorer, Errors
from toll_plugin.pyod.scale.parquet import Parquet, Partition
from toll_plugin.pyod.scale.writing import PartitionWriter, here, on_workers

__all__ = ["ScoredParquet", "score_parquet"]

#: What a target was written from; readers of Parquet leave out names that begin so.
_PLAN = "_toll.json"


class ScoredParquet(NamedTuple):
    """What :func:`score_parquet` wrote.

    Attributes:
        rows: Rows of the target.
        flagged: Those of them whose score is NaN.
        partitions: Files of the target.
        resumed: Those that an earlier call had finished.
    """

    rows: int
    flagged: int
    partitions: int
    resumed: int


def score_parquet(
    detector: CarefulDetector,
    source: Any,
    target: str | PathLike[str],
    *,
    keys: Sequence[str] = (),
    errors: Errors = "raise",
    client: Any = None,
    progress: bool = True,
) -> ScoredParquet:
    """Write the score of every row of Parquet files to a folder of Parquet files.

    The target has a file for each partition of the source (a file, or about a million rows of a larger one), whose
    rows are in the order of the source. Each is written beside its place and then renamed, so that it is complete
    or not there. A call that was killed, or for which the disk had no room, is made again as it was: partitions that
    are finished are left as they are. One call at a time may write to a target.

    Scores are those of ``decision_function``, to the last bit, on one machine and on many (whose processors are
    of one kind, for which the libraries choose the same instructions). Memory holds a few batches of a partition.

    Args:
        detector: Fitted.
        source: A :class:`Parquet`, or what it takes for a path.
        target: A folder that is new, empty, or left by an earlier call with the same arguments; for a cluster,
            one that all machines see by the same path.
        keys: Columns to write beside ``score``, such as an identifier. All other columns of the source are features.
        errors: ``"raise"`` (default) stops at a row that cannot be scored; ``"flag"`` gives it the score NaN.
        client: A ``distributed.Client``, whose workers then do it, each partition on one thread. Partitions of a
            worker that is lost are done by others. Default: this process does.
        progress: Show a bar. Default True.

    Returns:
        How many rows there are, and how many of them have no score.

    Raises:
        NotFittedError: If the detector is not fitted.
        FileExistsError: If the target is a file, or a folder with anything else in it.
        FileNotFoundError: If there is no source.
        ValueError: If a row or a column cannot be scored, with partition, row and column; or if the target lies
            in the source.
        RuntimeError: If a worker has other versions of the libraries.
        OSError: If the disk is full; finished partitions stay.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import pandas as pd
        >>> from toll_plugin.pyod import TollDetector
        >>> rows = pd.DataFrame(np.random.default_rng(0).normal(size=(100, 2)), columns=["a", "b"])
        >>> detector = TollDetector(max_steps=5).fit(rows)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows.assign(id=range(100)).to_parquet(f"{folder}/rows.parquet")
        ...     source, target = f"{folder}/rows.parquet", f"{folder}/scores"
        ...     found = score_parquet(detector, source, target, keys=["id"], progress=False)
        ...     scores = pd.read_parquet(target)
        >>> found.rows, list(scores.columns)
        (100, ['id', 'score'])
    """
    scorer = BatchScorer(detector, keys=keys, errors=errors)
    rows = source if isinstance(source, Parquet) else Parquet(source)
    partitions = rows.partitions(scorer.keys)
    folder = Path(target).resolve()
    inside = [part.path for part in partitions if folder in Path(part.path).resolve().parents]
    if inside:
        msg = f"target must not hold the source, but {str(target)!r} has {inside[0]!r}"
        raise ValueError(msg)
    _claim(folder, _plan(scorer, rows, partitions))
    writer = PartitionWriter(scorer, scorer.features(dict.fromkeys([*rows.names, *scorer.keys])), rows.where, folder)
    missing = [part for part in partitions if writer.finished(part) is None]
    work = here(writer, missing) if client is None else on_workers(client, writer, missing)
    total, left = (sum(part.rows for part in parts) for parts in (partitions, missing))
    bar = tqdm(total=total, initial=total - left, desc="score", unit="row", unit_scale=True, disable=not progress)
    with bar, closing(work):
        for part in work:
            bar.update(part.rows)
    counts = [writer.finished(part) for part in partitions]
    written, flagged = (sum(count[i] for count in counts if count) for i in range(2))
    return ScoredParquet(written, flagged, len(partitions), len(partitions) - len(missing))


def _plan(scorer: BatchScorer, rows: Parquet, partitions: Sequence[Partition]) -> dict[str, Any]:
    """What decides what is written; a second call must have the same to go on."""
    return {
        "detector": fingerprint(scorer.detector),
        "keys": scorer.keys,
        "errors": scorer.errors,
        "columns": rows.names,
        "where": None if rows.where is None else str(rows.where),
        "partitions": [[Path(part.path).name, list(part.groups), part.rows] for part in partitions],
    }


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make the target ours, or find that it is.

    Raises:
        FileExistsError: If something else is there.
    """
    path = folder / _PLAN
    if path.is_file() and any(folder.glob("part-*.parquet")):
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in plan.items() if before.get(name) != value]
        if other:
            msg = f"target must be new or left by the same call, but {str(folder)!r} was written with other {other}"
            raise FileExistsError(msg)
        _clean(folder)
        return
    if folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {path, *_left(folder)}):
        msg = f"target must be new, an empty folder or left by the same call, but {str(folder)!r} holds something else"
        raise FileExistsError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    with replacing(path) as part:
        part.write_text(json.dumps(plan | {"written by": f"toll-plugin {__version__}"}), encoding="utf-8")


def _left(folder: Path) -> list[Path]:
    """What a process that was killed left beside the files."""
    return [*folder.glob(f".{_PLAN}.*.part"), *folder.glob(".part-*.parquet.*.part")]


def _clean(folder: Path) -> None:
    for path in _left(folder):
        path.unlink(missing_ok=True)
