"""A page, and Markdown beside it, that show what recorded runs say, from the records alone."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.report import comparison
from benchmarks.report.comparison import Difference, Group, Run
from benchmarks.report.published import PUBLISHED
from benchmarks.report.variants import choose_without_labels, families
from benchmarks.run.store import CONFIGURATION, RESULTS, Experiment, collected, read, whole

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


def report(
    records: list[Path] | None = None,
    output: Path = Path("report.html"),
    title: str = "Anomaly detectors compared",
) -> None:
    """One HTML page of tables, tests and figures, and its tables as Markdown beside it.

    Args:
        records: Collected records, or folders of single runs; by default those of run in benchmarks/results.
        output: The page; the Markdown has its name with the suffix .md.
        title: Of both.

    Raises:
        ValueError: If a file is no record, or there are no runs.
        FileNotFoundError: If there is no such file.
    """
    if output.suffix == ".md":
        msg = f"output must not end in .md, as the Markdown beside it does, got {output}"
        raise ValueError(msg)
    experiments = [read(path) for path in (collected() if records is None else records)]
    if not experiments:
        msg = f"records must name at least one record of run, got {records or f'none in {RESULTS}'}"
        raise ValueError(msg)
    page = _page(title, experiments)
    sections = [f"## {one.name}\n\n{one.about}\n\n{markdown_table(one.runs)}" for one in experiments]
    with whole(output) as html, whole(output.with_suffix(".md")) as markdown:
        html.write_text(page, encoding="utf-8")
        markdown.write_text("\n\n".join([f"# {title}", *sections]) + "\n", encoding="utf-8")
    print(f"report {output}, {output.with_suffix('.md')}")


def markdown_table(runs: Sequence[Run]) -> str:
    """A table for each group of runs, with the differences to Toll, what failed, and what others published."""
    return "\n\n".join(_markdown(group, mine) for group, mine in comparison.grouped(runs).items())


def _lines(table: Table, corner: str = "method") -> list[str]:
    lines = ["| " + " | ".join([corner, *table.head]) + " |", "|---" * (len(table.head) + 1) + "|"]
    for label, row in table.rows.items():
        cells = [f"**{cell.text}**" if cell.best else cell.text for cell in row]
        lines.append("| " + " | ".join(_plain(text) for text in (label, *cells)) + " |")
    return lines


def _markdown(group: Group, runs: list[Run]) -> str:
    table, by_part = summary(group, runs), parts(runs)
    if len(by_part.head) <= 10 and sum(len(name) + 3 for name in by_part.head) <= 60:
        rows = {label: row + by_part.rows[label] for label, row in table.rows.items()}
        table = Table(table.head + by_part.head, rows)
    lines = [f"**{_heading(group)}** ({_extent(runs)})", "", *_lines(table)]
    toll = comparison.first_toll(runs)
    found = comparison.differences(runs, toll) if toll else []
    if found:
        each = "; ".join(f"{_plain(one.label)} {_difference(one)} ({_p(one)})" for one in found)
        what = f"AUROC minus that of {_plain(found[0].reference)}, mean ± standard error (Wilcoxon over parts, Holm)"
        lines += ["", f"{what}: {each}."]
    if (alone := terms(runs)).rows:
        lines += ["", "AUROC of Toll's score and of each of its terms alone:", "", *_lines(alone)]
    lines += [f"\n{_plain(text)}" for text in (*_choices(runs), *_failures(runs), *_published(group, runs)[1])]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _heading(group: Group) -> str:
    return f"{group.dataset}, {group.protocol}"


def _extent(runs: Sequence[Run]) -> str:
    configurations = [run["configuration"] for run in runs]
    found = {name: len({str(c[name]) for c in configurations}) for name in ("label", "part", "seed")}
    counts = {"method": found["label"], "part": found["part"], "seed": found["seed"], "run": len(runs)}
    return ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())


def summary(group: Group, runs: Sequence[Run]) -> Table:
    """Accuracy and cost of each method, the lowest mean rank first."""
    frame, failed = comparison.frame(runs), comparison.failures(runs).sum()
    columns = {
        "mean rank": _cells(comparison.ranks(runs), 2, min),
        "AUROC": _cells(comparison.means(runs).mean(), 4, max, failed),
        _PUBLISHED: _published(group, runs)[0],
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


def _choices(runs: Sequence[Run]) -> list[str]:
    """What choosing a number without labels gains over the smallest, for each family of variants."""
    texts = []
    for family in families(runs):
        if one := choose_without_labels(runs, family):
            error = f" ± {one.error:.4f}" * (one.error >= 0)
            tested = "too few parts for a test" if one.p is None else f"Wilcoxon p = {one.p:.2g}"
            texts.append(
                f"{family.argument} of {family.method} chosen on each part by the AUROC of held-out normal samples "
                f"against splices of two of them: {one.chosen:.4f}, against {one.first:.4f} at "
                f"{min(family.labels):g} ({one.chosen - one.first:+.4f}{error}, {tested}, worst part {one.worst:+.3f}, "
                f"{one.parts} parts); the best single value in hindsight, {one.best_value:g}, has {one.best:.4f}."
            )
    return texts


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


def _published(group: Group, runs: Sequence[Run]) -> tuple[dict[str, Cell], list[str]]:
    """What others published of the methods that were run, by label, and a remark on other methods.

    They all trained on normal samples only, so nothing is published of the unsupervised protocol.
    """
    known = {} if group.protocol == "unsupervised" else PUBLISHED.get(group.dataset, {})
    texts = {_key(method): f"{percent / 100:.3f}" for method, percent in known.items()}
    here = {run["configuration"]["label"]: _key(run["configuration"]["method"]) for run in runs}
    rest = ", ".join(f"{method} {texts[_key(method)]}" for method in known if _key(method) not in here.values())
    remark = f"Published by others, mean over all parts, not measured here: {rest}."
    return {label: Cell(texts.get(key, "")) for label, key in here.items()}, [remark] if rest else []


def _failures(runs: Sequence[Run]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run in runs:
        if "error" in run:
            c = run["configuration"]
            found[str(c["label"]), str(run["error"])[:300]].append(str(c["part"]))
    return [
        f"{_FAILED} {label}, {len(where)} failed, on {', '.join(dict.fromkeys(where))}: {error}"
        for (label, error), where in found.items()
    ]


def _difference(one: Difference) -> str:
    return f"{one.mean:+.4f}" + f" ± {one.error:.4f}" * (one.error >= 0)  # NaN where there is one pair


def _p(one: Difference) -> str:
    if one.p is None:
        return "too few for a test"
    return "p < 0.001" if one.p < 0.001 else f"p = {one.p:.2g}"


def _tested(runs: Sequence[Run]) -> Table:
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


def _origin(runs: Sequence[Run]) -> dict[str, str]:
    """Where runs come from: every value where they differ."""
    every = [run.get("provenance") or {} for run in runs]

    def distinct(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values if value})) or "unknown"

    dates = sorted(str(p["date"])[:16].replace("T", " ") for p in every if "date" in p)
    commits = [p.get("commit", "")[:10] + " with uncommitted changes" * bool(p.get("dirty")) for p in every]
    packages = sorted({name for p in every for name in p.get("packages", {})})
    return {
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))) + " UTC" if dates else "unknown",
        "commit": distinct(commits),
        "machine": distinct(f"{p['machine']}, {p.get('cores', '?')} cores" for p in every if "machine" in p),
        "Python": distinct(p.get("python") for p in every),
        **{name: distinct(p.get("packages", {}).get(name) for p in every) for name in packages},
    }


def _shared(runs: Sequence[Run]) -> dict[str, str]:
    """Settings that all runs share, but for what names them."""
    first, *rest = [run["configuration"] for run in runs]
    return {
        name: json.dumps(value)
        for name, value in first.items()
        if name not in {*CONFIGURATION, "arguments", "files", "version"} and all(c.get(name) == value for c in rest)
    }


def _page(title: str, experiments: Sequence[Experiment]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from benchmarks.report.figures import drawings, sweeps

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **blocks)
    sections = []
    for i, (name, about, runs) in enumerate(experiments):
        groups: list[dict[str, Any]] = []
        swept: dict[tuple[str, str], list[Run]] = {}
        for j, (group, mine) in enumerate(comparison.grouped(runs).items()):
            swept.setdefault((group.kind, group.protocol), []).extend(mine)
            shown = {"heading": _heading(group), "extent": _extent(mine), "figures": drawings(mine, f"e{i}g{j}-")}
            shown |= {
                "summary": summary(group, mine),
                "parts": parts(mine),
                "tested": _tested(mine),
                "terms": terms(mine),
            }
            groups.append(shown | {"remarks": [*_failures(mine), *_published(group, mine)[1]]})
        curves = [one for j, mine in enumerate(swept.values()) for one in sweeps(mine, f"e{i}s{j}-")]
        section = {"name": name, "about": about, "extent": _extent(runs), "groups": groups, "sweeps": curves}
        sections.append(section | {"origin": _origin(runs), "settings": _shared(runs)})
    every = [run for experiment in experiments for run in experiment.runs]
    return environment.get_template("page.html.j2").render(
        title=title,
        experiments=sections,
        runs=len(every),
        failed=sum("error" in run for run in every),
        origin={name: text for name, text in _origin(every).items() if name in {"date", "commit", "machine"}},
        dirty=any((run.get("provenance") or {}).get("dirty") for run in every),
        testable=comparison.TESTABLE,
    )
