"""Tables that do not fit in memory: seconds and memory of fit and scores, on one process and on a cluster."""

from __future__ import annotations

import filecmp
import json
import logging
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.report.style import COLORS
from benchmarks.run.measure import in_new_process
from benchmarks.run.store import RESULTS, finish, provenance, whole
from benchmarks.run.tables import markdown
from toll_plugin.core.checks import check_integer, check_option

Found = dict[str, Any]


def scale(
    rows: Sequence[int] = (2_000_000, 10_000_000, 50_000_000),
    features: int = 30,
    in_memory: int = 2_000_000,
    file_rows: int = 1_000_000,
    workers: int = 2,
    folder: Path | None = None,
    output: Path = RESULTS / "scale.json",
    figure: Path = RESULTS / "scale.png",
) -> None:
    """Rows per second and memory of TollDetector on Parquet files, which are generated and deleted afterwards.

    For each number of rows, a new process fits by the default parameters and writes all scores, then scores
    rows that lie in memory, and has a Dask cluster on this machine write all scores again. Memory is the largest
    of a process.

    Args:
        rows: Numbers of rows, each a whole number of files.
        features: Columns, in single precision.
        in_memory: Rows of the table in memory, at most the smallest of ``rows``.
        file_rows: Rows per file.
        workers: Of the cluster, with one thread each.
        folder: Where the files are written; by default the system's temporary folder.
        output: Where the record goes.
        figure: Where the picture goes, by its ending a PNG, SVG or PDF.
    """
    check_option("figure's ending", figure.suffix, (".png", ".svg", ".pdf"))
    check_integer("file_rows", file_rows, minimum=1)
    for count in rows:
        if count < in_memory or count % file_rows:
            msg = f"rows must be whole files of {file_rows} and at least in_memory, {in_memory}, got {count}"
            raise ValueError(msg)
    record = {"command": "scale", **provenance(), "features": features, "in_memory": in_memory, "workers": workers}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        _check_room(Path(place), 4 * features * max(rows))
        source = Path(place) / "rows"
        source.mkdir()
        for i in range(max(rows) // file_rows):
            _write(source / f"{i:05d}.parquet", i, file_rows, features)
        files = [count // file_rows for count in sorted(rows)]
        found = [in_new_process("benchmarks.costs.scale", source, few, in_memory, workers) for few in files]
    _plot(figure, found, workers)
    finish(output, {**record, "rows": found, "table": markdown([_line(one, workers) for one in found])})


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.5 * needed:
        msg = f"folder must have {1.5 * needed / 1e9:.1f} GB free for the files and the scores, got {free / 1e9:.1f}"
        raise OSError(msg)


def _write(path: Path, seed: int, count: int, features: int) -> None:
    """Rows near a space of a third of their columns, one in a hundred of them off it."""
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(2**32).standard_normal((features // 3 + 1, features), dtype=np.float32)
    x = rng.standard_normal((count, len(mixed)), dtype=np.float32) @ mixed
    x += 0.3 * rng.standard_normal(x.shape, dtype=np.float32)
    x[::100] += rng.standard_normal(x[::100].shape, dtype=np.float32)
    columns = {f"c{i}": x[:, i] for i in range(features)}
    table = pa.table({"id": np.arange(seed * count, (seed + 1) * count), **columns})
    parquet.write_table(table, path, row_group_size=1 << 17)


def _measure(source: Path, files: int, in_memory: int, workers: int) -> Found:
    """Fit and scores of some of the files in one process, scores of a table in memory, and those of a cluster."""
    import pandas as pd
    from distributed import Client, LocalCluster

    from toll_plugin.pyod import Parquet, TollDetector, score_parquet

    paths, found = sorted(source.glob("*.parquet"))[:files], {}
    rows = Parquet(paths, columns=[name for name in Parquet(paths).names if name != "id"])
    with tempfile.TemporaryDirectory(dir=source.parent) as place, threadpool_limits(1):
        one, many = Path(place) / "one", Path(place) / "many"
        with _timed(found, "fit"):
            detector = TollDetector().fit(rows)
        with _timed(found, "score"):
            found["rows"] = score_parquet(detector, rows, one, keys=["id"]).rows
        found["MB"] = _peak()  # before there is a table in memory
        frame = pd.read_parquet(paths[: -(-in_memory * files // found["rows"])], columns=rows.names)[:in_memory]
        found["in memory, rows"] = len(frame)
        with _timed(found, "in memory"):
            scores = detector.decision_function(frame)
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        )
        with cluster, Client(cluster) as client:
            client.run(_import)  # which a worker does at its first task
            with _timed(found, "cluster"):
                score_parquet(detector, rows, many, keys=["id"], client=client)
            found["MB of a worker"] = max(client.run(_peak).values())
        written = pd.read_parquet(sorted(one.glob("*.parquet"))[: len(paths)], columns=["score"])["score"][:in_memory]
        parts = sorted(path.name for path in one.glob("*.parquet"))
        same = filecmp.cmpfiles(one, many, parts, shallow=False)[0] == parts
        found["same bits"] = bool(same and np.array_equal(written, scores))
    return found


def _import() -> None:
    import toll_plugin.pyod  # noqa: F401


@contextmanager
def _timed(found: Found, name: str) -> Iterator[None]:
    """Keep the seconds of a block, and those of this process's work in it."""
    start, work = time.perf_counter(), time.process_time()
    yield
    found[f"{name}, s"] = time.perf_counter() - start
    found[f"{name}, s of work"] = time.process_time() - work


def _peak() -> float:
    """The largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # resource counts in what the process was forked from
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _speed(found: Found, name: str, kind: str = "s") -> float:
    """Rows per second."""
    count = found["in memory, rows"] if name == "in memory" else found["rows"]
    return float(count / found[f"{name}, {kind}"])


def _line(found: Found, workers: int) -> dict[str, str]:
    ratios = [_speed(found, "score", kind) / _speed(found, "in memory", kind) for kind in ("s", "s of work")]
    return {
        "rows": f"{found['rows'] / 1e6:g} million",
        "fit, s": f"{found['fit, s']:.0f}",
        "scores, s": f"{found['score, s']:.0f}",
        "MB": f"{found['MB']:.0f}",
        "rows per s": f"{_speed(found, 'score'):,.0f}",
        "in memory, rows per s": f"{_speed(found, 'in memory'):,.0f}",
        "ratio": f"{ratios[0]:.2f}",
        "ratio of work": f"{ratios[1]:.2f}",
        f"{workers} workers, s": f"{found['cluster, s']:.0f}",
        "speed-up": f"{found['score, s'] / found['cluster, s']:.2f}",
        "MB of a worker": f"{found['MB of a worker']:.0f}",
        "same bits": "yes" if found["same bits"] else "NO",
    }


def _plot(path: Path, found: Sequence[Found], workers: int) -> None:
    """Seconds and memory against rows, in one process and in several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    millions = [one["rows"] / 1e6 for one in found]
    for name, label, color in (
        ("fit, s", "fit", COLORS[2]),
        ("score, s", "scores, one process", COLORS[0]),
        ("cluster, s", f"scores, {workers} workers", COLORS[1]),
    ):
        left.plot(millions, [one[name] for one in found], "o-", color=color, label=label)
    for name, label, color in (
        ("MB", "fit and scores, one process", COLORS[0]),
        ("MB of a worker", f"scores, one of {workers} workers", COLORS[1]),
    ):
        right.plot(millions, [one[name] for one in found], "o-", color=color, label=label)
    left.set(xlabel="million rows", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    right.set(xlabel="million rows", ylabel="largest memory, MB", xlim=(0, None), ylim=(0, None))
    for panel in (left, right):
        panel.legend(fontsize="small")
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:])


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
