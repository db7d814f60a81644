"""How time and memory of TollDetector's default fit and of its scores grow with rows and with columns."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.costs.speed import warm
from benchmarks.quiet import apart
from benchmarks.report.style import COLORS, STYLE
from benchmarks.run.measure import in_new_process, peak_memory
from benchmarks.run.store import RESULTS, finish, provenance, whole
from benchmarks.run.tables import markdown
from toll_plugin.core.checks import check_integer, check_option

#: What is measured of a table.
MEASURED = ("fit, s", "score, s", "memory, MB")

#: Rows that are drawn and written at a time.
_PIECE = 4096


def write_table(path: Path, rows: int, columns: int) -> None:
    """A table of normal values in single precision as a file that can be mapped."""
    import numpy as np

    draw = np.random.default_rng(0)
    table = np.lib.format.open_memmap(path, "w+", np.float32, (rows, columns))
    for start in range(0, rows, _PIECE):
        part = table[start : start + _PIECE]
        part[...] = draw.standard_normal(part.shape, dtype=np.float32)
    table.flush()


def measure(path: Path, warm_steps: int) -> dict[str, float]:
    """:data:`MEASURED` of a table that is mapped; memory is what both take at most, its own pages aside."""
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    from toll_plugin.pyod import TollDetector

    torch.set_num_threads(1)
    x = np.load(path, mmap_mode="r")
    detector, seconds = TollDetector(), []
    with threadpool_limits(1):
        warm(warm_steps)
        with peak_memory(files=False) as peak:
            for work in (detector.fit, detector.decision_function):
                start = time.perf_counter()
                work(x)
                seconds.append(time.perf_counter() - start)
    return dict(zip(MEASURED, (*seconds, *peak), strict=True))


def _table(runs: Sequence[dict[str, Any]]) -> str:
    return markdown(
        [
            {"rows": f"{run['rows']:,}", "columns": f"{run['columns']:,}", "data, MB": f"{run['data, MB']:.4g}"}
            | {name: f"{run[name]:.3g}" for name in MEASURED}
            for run in runs
        ]
    )


def plot(path: Path, along: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Seconds and megabytes along each of ``"rows"`` and ``"columns"``, whose runs are ``along``."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "figure.facecolor": "white", "text.parse_math": True}):
        figure = Figure(figsize=(9, 5.5), dpi=90)
        panels = figure.subplots(2, len(along), sharex="col", squeeze=False)
        for (name, runs), line in zip(along.items(), panels.T, strict=True):
            other = "columns" if name == "rows" else "rows"
            size = [run[name] for run in runs]
            for axes, lines, unit in zip(
                line, (MEASURED[:2], (MEASURED[2], "data, MB")), ("seconds", "MB"), strict=True
            ):
                for what, color in zip(lines, COLORS, strict=False):
                    label = what.partition(",")[0]
                    axes.plot(size, [run[what] for run in runs], color=color, marker="o", label=label)
                axes.set(xscale="log", yscale="log", ylabel=unit)
                axes.legend()
            line[0].set_title(f"{name}, of {runs[0][other]:,} {other}", fontsize=10)
            line[1].set_xlabel(name)
        with whole(path) as part:
            figure.savefig(part, format=path.suffix[1:])


def growth(
    rows: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    of_columns: int = 16,
    columns: tuple[int, ...] = (8, 32, 128, 512, 2_048, 8_192, 16_384),
    of_rows: int = 1_000,
    warm_steps: int = 2500,
    output: Path = RESULTS / "growth.json",
    figure: Path = RESULTS / "growth.png",
) -> None:
    """Time and memory of a default fit and of scoring the same rows, each table in a process of its own, one thread.

    Tables are generated, single precision, and mapped from a file. A fit takes 300 steps whatever the rows, and scores
    each of them at its end.

    Args:
        rows: Sizes of the tables that grow in rows.
        of_columns: Their columns.
        columns: Sizes of the tables that grow in columns.
        of_rows: Their rows.
        warm_steps: Of a training before all others, after which a process has its compiled loops.
        output: Where the record goes.
        figure: Where the picture goes, by its ending a PNG, SVG or PDF.
    """
    sizes = {"rows": [(n, of_columns) for n in rows], "columns": [(of_rows, n) for n in columns]}
    for name, given in (("rows", rows), ("columns", columns)):
        for i, size in enumerate(given):
            check_integer(f"{name}[{i}]", size, minimum=2)
        if not given:
            msg = f"{name} must hold at least one size, got {given!r}"
            raise ValueError(msg)
    check_option("figure's ending", figure.suffix, (".png", ".svg", ".pdf"))
    record = {"command": "growth", **provenance()}
    along: dict[str, list[dict[str, Any]]] = {}
    for name, tables in sizes.items():
        along[name] = []
        for shape in tables:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "table.npy"
                write_table(path, *shape)
                found = in_new_process("benchmarks.costs.growth", path, warm_steps)
            of = {"rows": shape[0], "columns": shape[1], "data, MB": 4e-6 * shape[0] * shape[1]}
            along[name].append(of | found)
    plot(figure, along)
    runs = [run for found in along.values() for run in found]
    finish(output, {**record, "table": _table(runs), "runs": runs})


if __name__ == "__main__":
    with apart():
        measured = measure(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(measured))
