"""Figures of a report: images for a light page, whose style sheet inverts them for a dark one."""

from __future__ import annotations

import base64
import itertools
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

from benchmarks.report import plots
from benchmarks.report.style import STYLE, colors
from benchmarks.report.variants import families
from benchmarks.run.store import Run


class Drawing(NamedTuple):
    """What stands in a ``<figure>``: an SVG in base64, or the maps of several methods; and what it shows."""

    title: str
    caption: str
    svg: str = ""
    samples: Sequence[dict[str, Any]] = ()
    labels: Sequence[str] = ()


def drawings(runs: Sequence[Run]) -> list[Drawing]:
    """Every figure of one group that its runs support."""
    makers = (plots.boxes, plots.roc, plots.norms, plots.critical_difference, plots.time, plots.rare)
    return [*filter(None, (_drawn(maker, runs) for maker in makers)), *_maps(runs)]


def sweeps(runs: Sequence[Run]) -> list[Drawing]:
    """AUROC against each numeric argument in which at least three variants of a method differ, and in nothing else."""
    return [*filter(None, (_drawn(plots.sweep, runs, family) for family in families(runs)))]


def _drawn(maker: Any, *arguments: Any) -> Drawing | None:
    from matplotlib import rc_context

    with rc_context(STYLE):
        made = maker(*arguments)
        if made is None:
            return None
        figure, title, caption = made
        stream = BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return Drawing(title, caption, base64.b64encode(stream.getvalue()).decode())


def _draw(run: Run) -> tuple[int, int]:
    return run["configuration"]["seed"], run["configuration"].get("restart", 0)


def _maps(runs: Sequence[Run]) -> list[Drawing]:
    """A row for each test sample that was kept, a column for each method that makes maps."""
    samples: dict[tuple[Any, ...], dict[str, Any]] = {}
    kept: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.get("examples"):
            kept[run["configuration"]["label"]].append(run)
    for label, mine in kept.items():
        first = min(_draw(run) for run in mine)
        each = [run for run in mine if _draw(run) == first]
        parts = ([(run["configuration"]["part"], one) for one in run["examples"]] for run in each)
        for part, one in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*parts))):
            if one.get("map"):
                row = {name: one.get(name) for name in ("image", "mask", "anomalous")}
                sample = samples.setdefault((part, one["image"], one["anomalous"]), {**row, "found": {}})
                sample["found"][label] = {"map": one["map"], "score": one["score"]}
    if not samples:
        return []
    bad, good = ([one for one in samples.values() if one["anomalous"] is kind] for kind in (True, False))
    shown = [*bad[:8], *good[:2]]
    # Toll's methods first, as in the other figures.
    labels = [label for label in colors(runs) if any(label in one["found"] for one in shown)]
    caption = "Each map is on the scale of all maps of its method on the test set; below it, the image's score."
    return [Drawing("Anomaly maps side by side", caption, samples=shown, labels=labels)]
