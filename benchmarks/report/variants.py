"""Variants of one method that differ in one number, and what choosing it without labels gains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.report.comparison import BLOCK, dataset_of, signed_rank
from benchmarks.run.store import Run


class Family(NamedTuple):
    """Variants of a method that differ in one number only.

    Attributes:
        labels: By that number, rising.
    """

    method: str
    argument: str
    labels: dict[float, str]


def families(runs: Sequence[Run]) -> list[Family]:
    """Those with at least three variants."""
    found: dict[tuple[str, str, str], dict[float, str]] = defaultdict(dict)
    for run in runs:
        c = run["configuration"]
        for key, value in c.get("arguments", {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = {other: v for other, v in c["arguments"].items() if other != key}
                found[c["method"], key, repr(sorted(rest.items()))][float(value)] = c["label"]
    return [
        Family(method, key, dict(sorted(labels.items())))
        for (method, key, _), labels in found.items()
        if len(labels) >= 3
    ]


class Choice(NamedTuple):
    """A number chosen on each part by what is known without anomalies, against always taking the smallest.

    Attributes:
        first: Mean metric over parts of the smallest number.
        chosen: Of the chosen one.
        best: Of the number whose own mean is highest, known in hindsight only.
        best_value: That number.
        error: Standard error of chosen minus first over parts; NaN with one part.
        worst: The lowest of chosen minus first.
        p: Wilcoxon's signed-rank test of chosen against first; ``None`` with too few parts.
        parts: Number of parts.
    """

    first: float
    chosen: float
    best: float
    best_value: float
    error: float
    worst: float
    p: float | None
    parts: int


def choose_without_labels(runs: Sequence[Run], family: Family, metric: str = "auroc") -> Choice | None:
    """Each run takes the variant that tells held-out normal samples best from splices of two of them.

    A run is a part, a split and a restart. Of equals the smallest number; ``None`` where a variant lacks that
    measurement.
    """
    from pandas import DataFrame

    values = {label: value for value, label in family.labels.items()}
    rows = [
        (
            dataset_of(run),
            str(c["part"]),
            (c["seed"], c.get("restart", 0)),
            values[c["label"]],
            run["metrics"][metric],
            run["spliced_auroc"],
        )
        for run in runs
        if (c := run["configuration"])["label"] in values
        and "error" not in run
        and run.get("spliced_auroc") is not None
    ]
    table = DataFrame(rows, columns=[*BLOCK, "draw", "value", "found", "known"])
    found, known = (
        table.pivot_table(index=[*BLOCK, "draw"], columns="value", values=name) for name in ("found", "known")
    )
    found, known = found.dropna(), known.dropna()
    if found.shape[1] < len(family.labels) or found.empty:
        return None
    taken = found.to_numpy()[np.arange(len(found)), known.to_numpy().round(12).argmax(axis=1)]
    by_part = found.groupby(level=BLOCK).mean()
    gaps = (found.assign(taken=taken)["taken"] - found.iloc[:, 0]).round(12).groupby(level=BLOCK).mean()
    first, best = by_part.mean().iloc[0], by_part.mean()
    return Choice(
        first=float(first),
        chosen=float(first + gaps.mean()),
        best=float(best.max()),
        best_value=float(best.idxmax()),
        error=float(gaps.sem()),
        worst=float(gaps.min()),
        p=signed_rank(gaps),
        parts=len(gaps),
    )
