"""Tables of what runs say: a row for each method, the lowest mean rank first."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.report import comparison
from benchmarks.report.comparison import Difference, Group
from benchmarks.report.published import PUBLISHED
from benchmarks.report.variants import choose_without_labels, families
from benchmarks.run.store import Run

if TYPE_CHECKING:
    from pandas import Series

_METRICS = {"average_precision": "AP", "f1": "F1", "pixel_auroc": "pixel AUROC", "pro": "PRO"}
_COSTS = {"fit_seconds": "fit s", "score_seconds": "score s", "model_mb": "MB"}
_PUBLISHED = "published (not measured here)"
_ALIASES = {"iforest": "if"}
_FAILED = "†"


class Cell(NamedTuple):
    """A value, whether it is the best of its column, and how strongly to shade it, from 0 to 1."""

    text: str
    best: bool = False
    shade: float | None = None


class Table(NamedTuple):
    """Heads of the columns behind the method's, and a row for each method."""

    head: list[str]
    rows: dict[str, list[Cell]]


def summary(group: Group, runs: Sequence[Run]) -> Table:
    """Accuracy and cost of each method, the lowest mean rank first."""
    frame, failed = comparison.frame(runs), comparison.failures(runs).sum()
    columns = {
        "mean rank": _cells(comparison.ranks(runs), 2, min),
        "AUROC": _cells(comparison.means(runs).mean(), 4, max, failed),
        _PUBLISHED: published(group, runs)[0],
    }
    for name, head in _METRICS.items():
        if name in frame and frame[name].notna().any():
            columns[head] = _cells(comparison.means(runs, name).mean(), 3, max, failed)
    by_label = frame.groupby("label")
    for name, head in _COSTS.items():
        costs = by_label[name].median()
        columns[head] = {label: Cell(_cost(cost)) for label, cost in costs.items()}
    columns["runs"] = {
        label: Cell(f"{count - failed[label]}" + f", {failed[label]} failed" * bool(failed[label]))
        for label, count in by_label.size().items()
    }
    columns["note"] = {label: Cell(_note(runs, label)) for label in failed.index}
    columns = {head: cells for head, cells in columns.items() if any(cell.text for cell in cells.values())}
    return Table(list(columns), {row: [cells[row] for cells in columns.values()] for row in comparison.ranking(runs)})


def terms(runs: Sequence[Run]) -> Table:
    """Mean AUROC of the score and of its terms alone, where a method has both."""
    found = comparison.terms(runs)
    rows = {
        label: list(_cells(found.loc[label].rename(str), 4, max).values())
        for label in comparison.ranking(runs)
        if label in found.index
    }
    return Table([str(name) for name in found.columns], rows)


def parts(runs: Sequence[Run]) -> Table:
    """AUROC of each method on each part."""
    means, failed = comparison.means(runs), comparison.failures(runs)
    low = max(0.5, float(means.min().min()))
    rows: dict[str, list[Cell]] = {label: [] for label in comparison.ranking(runs)}
    for block, values in means.iterrows():
        cells = _cells(values, 3, max, failed.loc[block])
        for label, row in rows.items():
            row.append(cells[label]._replace(shade=max(0.0, (values[label] - low) / max(1 - low, 1e-9))))
    return Table([str(part) for _, part in means.index], rows)


def tested(runs: Sequence[Run]) -> Table:
    """Differences to the first Toll and to the best; p-values below 0.05 are marked."""
    order = comparison.ranking(runs)
    head: list[str] = []
    rows: dict[str, list[Cell]] = {label: [] for label in order}
    for reference in dict.fromkeys((comparison.first_toll(runs) or order[0], order[0])):
        head += [f"minus {reference}", "Wilcoxon, Holm", "pairs"]
        found = {one.label: one for one in comparison.differences(runs, reference)}
        for label, row in rows.items():
            if one := found.get(label):
                row += [Cell(_difference(one)), Cell(_p(one), one.p is not None and one.p < 0.05), Cell(str(one.pairs))]
            else:
                row += [Cell("-"), Cell(""), Cell("")]
    return Table(head, rows)


def leak(clean: Sequence[Run], leaking: Sequence[Run]) -> Table:
    """AUROC of two protocols side by side, apart for parts where most normal test rows are copies and for others.

    Args:
        clean: Runs by a protocol that copies no rows.
        leaking: Runs of the same methods and parts by one that does.
    """
    means = [comparison.means(runs) for runs in (clean, leaking)]
    table = Table([], {label: [] for label in comparison.ranking(clean) if label in means[1]})
    copied = copied_parts(leaking)
    for name, chosen in (("copies", True), ("others", False)):
        one, other = (values[[(part in copied) == chosen for _, part in values.index]] for values in means)
        gaps = other - one
        if gaps.empty:
            continue
        table.head.extend(f"{name}: {head}" for head in ("semi-supervised", "bootstrap", "difference"))
        columns = [_cells(values.mean(), 3, max) for values in (one, other)]
        for label, row in table.rows.items():
            error = f" ± {gaps[label].sem():.3f}" if gaps[label].count() > 1 else ""
            row += [*(cells[label] for cells in columns), Cell(f"{gaps[label].mean():+.3f}{error}")]
    return table


def copied_parts(runs: Sequence[Run]) -> list[str]:
    """Parts in which most normal test rows equal a training row."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        if samples := run.get("samples"):
            share = samples.get("copied", 0) / (samples["test"] - samples["anomalies"])
            found[str(run["configuration"]["part"])].append(share)
    return [part for part, shares in found.items() if sum(shares) / len(shares) > 0.5]


def choices(runs: Sequence[Run]) -> list[str]:
    """What choosing a number without labels gains over the smallest, for each family of variants."""
    texts = []
    for family in families(runs):
        if one := choose_without_labels(runs, family):
            error = f" ± {one.error:.4f}" * (one.error >= 0)
            test = "too few parts for a test" if one.p is None else f"Wilcoxon p = {one.p:.2g}"
            texts.append(
                f"{family.argument} of {family.method} chosen on each part by the AUROC of held-out normal samples "
                f"against splices of two of them: {one.chosen:.4f}, against {one.first:.4f} at "
                f"{min(family.labels):g} ({one.chosen - one.first:+.4f}{error}, {test}, worst part {one.worst:+.3f}, "
                f"{one.parts} parts); the best single value in hindsight, {one.best_value:g}, has {one.best:.4f}."
            )
    return texts


def failures(runs: Sequence[Run]) -> list[str]:
    """Which method failed where, and with which error."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run in runs:
        if "error" in run:
            c = run["configuration"]
            found[str(c["label"]), str(run["error"])[:300]].append(str(c["part"]))
    return [
        f"{_FAILED} {label}, {len(where)} failed, on {', '.join(dict.fromkeys(where))}: {error}"
        for (label, error), where in found.items()
    ]


def published(group: Group, runs: Sequence[Run]) -> tuple[dict[str, Cell], list[str]]:
    """What others published of the methods that were run, by label, and a remark on other methods.

    They all trained on normal samples only, so nothing is published of the unsupervised protocol.
    """
    known = {} if group.protocol == "unsupervised" else PUBLISHED.get(group.dataset, {})
    texts = {_key(method): f"{percent / 100:.3f}" for method, percent in known.items()}
    here = {run["configuration"]["label"]: _key(run["configuration"]["method"]) for run in runs}
    rest = ", ".join(f"{method} {texts[_key(method)]}" for method in known if _key(method) not in here.values())
    remark = f"Published by others, mean over all parts, not measured here: {rest}."
    return {label: Cell(texts.get(key, "")) for label, key in here.items()}, [remark] if rest else []


def gaps(runs: Sequence[Run], metric: str = "auroc") -> tuple[str, dict[str, str]]:
    """Head and cells of a column of paired differences; no cells where each has a single pair.

    They are differences to the first Toll, or, where there is none, of ``NAME, variant`` to ``NAME``.
    """
    toll = comparison.first_toll(runs)
    if toll:
        head, found = f"minus {toll}", comparison.differences(runs, toll, metric)
    else:
        labels = {run["configuration"]["label"] for run in runs}
        bases = sorted({base for label in labels if (base := label.partition(", ")[0]) in labels - {label}})
        head = "minus the one without"
        found = [
            one
            for base in bases
            for one in comparison.differences(runs, base, metric)
            if one.label.startswith(f"{base}, ")
        ]
    if all(one.pairs == 1 for one in found):
        return head, {}
    return head, {one.label: _difference(one) + f" ({_p(one)})" * (one.p is not None) for one in found}


def _difference(one: Difference) -> str:
    return f"{one.mean:+.4f}" + f" ± {one.error:.4f}" * (one.error >= 0)  # NaN where there is one pair


def _p(one: Difference) -> str:
    if one.p is None:
        return "too few for a test"
    return "p < 0.001" if one.p < 0.001 else f"p = {one.p:.2g}"


def _cells(values: Series, digits: int, best: Any, failed: Series | None = None) -> dict[str, Cell]:
    """Values that look equal are equally best; what lacks failed runs is marked and cannot be."""
    values = values.round(digits)
    marked = {label: failed is not None and bool(failed[label]) for label in values.index}
    able = [value for label, value in values.dropna().items() if not marked[label]]
    top = best(able) if len(able) > 1 else None
    texts = {label: f"{value:.{digits}f}".replace("nan", "-") for label, value in values.items()}
    return {
        label: Cell(texts[label] + _FAILED * marked[label], best=value == top and not marked[label])
        for label, value in values.items()
    }


def _cost(cost: float) -> str:
    return "-" if math.isnan(cost) else f"{cost:.0f}" if cost >= 100 else f"{cost:.2g}"


def _note(runs: Sequence[Run], label: str) -> str:
    """What the facts say of pretrained weights."""
    given = [run.get("facts", {}).get("pretrained") for run in runs if run["configuration"]["label"] == label]
    words = {None: "", True: "pretrained", False: "random weights", "random": "random weights"}
    return ", ".join(sorted({words.get(value, str(value)) for value in given} - {""}))


def _key(method: str) -> str:
    name = re.sub(r"[^a-z0-9]", "", method.lower())
    return _ALIASES.get(name, name)
