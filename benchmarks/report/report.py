"""A page, and Markdown beside it, that show what recorded runs say, from the records alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import comparison, tables
from benchmarks.report.comparison import Group
from benchmarks.run.store import CONFIGURATION, RESULTS, Experiment, Run, collected, read, whole
from benchmarks.run.tables import markdown

if TYPE_CHECKING:
    from pandas import DataFrame


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
    with whole(output) as html, whole(output.with_suffix(".md")) as beside:
        html.write_text(page, encoding="utf-8")
        beside.write_text("\n\n".join([f"# {title}", *sections]) + "\n", encoding="utf-8")
    print(f"report {output}, {output.with_suffix('.md')}")


def markdown_table(runs: Sequence[Run]) -> str:
    """A table for each group of runs, with the differences to Toll, what failed, and what others published.

    Where a data set was split with and without copies of test rows, another table has both.
    """
    groups = comparison.grouped(runs)
    blocks = [_markdown(group, mine) for group, mine in groups.items()]
    return "\n\n".join([*blocks, *(_both(group, groups) for group in groups if _twin(group) in groups)])


def _twin(group: Group) -> Group | None:
    """The group without copies that one with copies is compared with."""
    return group._replace(protocol="semi-supervised") if group.protocol == "bootstrap" else None


def _both(group: Group, groups: Mapping[Group | None, list[Run]]) -> str:
    """The Markdown of :func:`tables.leak`."""
    leaking = groups[group]
    parts = len({str(run["configuration"]["part"]) for run in leaking})
    copied = len(tables.copied_parts(leaking))
    heading = f"**{group.dataset}, semi-supervised and bootstrap side by side: AUROC**"
    told = (
        f"(of {parts} parts, {copied} where most normal test rows of bootstrap are copies, and the others; difference: "
        "bootstrap minus semi-supervised, mean ± standard error over parts)"
    )
    return f"{heading} {told}\n\n{_text(_frame(tables.leak(groups[_twin(group)], leaking)))}"


def _markdown(group: Group, runs: list[Run]) -> str:
    frame, by_part = _frame(tables.summary(group, runs)), _frame(tables.parts(runs))
    head, gaps = tables.gaps(runs)
    if gaps:
        frame.insert(frame.columns.get_loc("AUROC") + 1, head, frame.index.map(gaps).fillna(""))
    if runs[0]["configuration"]["kind"] == "table" and "AP" in frame and by_part.shape[1] > 1:
        ranks, (_, gaps) = comparison.ranks(runs, "average_precision"), tables.gaps(runs, "average_precision")
        frame.insert(frame.columns.get_loc("AP"), "rank in AP", frame.index.map(lambda label: f"{ranks[label]:.2f}"))
        if gaps:
            frame.insert(frame.columns.get_loc("AP") + 1, f"AP {head}", frame.index.map(gaps).fillna(""))
    if len(set(frame["runs"])) == 1:  # said by the heading
        frame = frame.drop(columns="runs")
    if by_part.shape[1] == 1:  # the mean is the part's own, and the order its rank
        frame = frame.drop(columns="mean rank")
    elif by_part.shape[1] <= 10 and sum(len(name) + 3 for name in by_part) <= 60:
        frame = frame.join(by_part)
    blocks = [f"**{_heading(group)}** ({_extent(runs)})", _text(frame)]
    if (alone := tables.terms(runs)).rows:
        blocks += ["AUROC of Toll's score and of each of its terms alone:", _text(_frame(alone))]
    blocks += map(_plain, (*tables.choices(runs), *tables.failures(runs), *tables.published(group, runs)[1]))
    return "\n\n".join(blocks)


def _frame(table: tables.Table) -> DataFrame:
    """The texts of a table, the best of each column bold, with a row for each method."""
    from pandas import DataFrame

    rows = {label: [f"**{c.text}**" if c.best else c.text for c in row] for label, row in table.rows.items()}
    return DataFrame.from_dict(rows, orient="index", columns=table.head).rename_axis("method")


def _text(frame: DataFrame) -> str:
    """A frame as Markdown, whatever stands in labels."""
    return markdown(frame.reset_index().map(_plain).rename(columns=_plain).to_dict("records"))


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _heading(group: Group) -> str:
    leaks = ": copies of test rows of small tables among the training rows" * (group.protocol == "bootstrap")
    return f"{group.dataset}, {group.protocol}{leaks}"


def _extent(runs: Sequence[Run]) -> str:
    configurations = [{"restart": 0, **run["configuration"]} for run in runs]
    found = {name: len({str(c[name]) for c in configurations}) for name in ("label", "part", "seed", "restart")}
    counts = {"method": found["label"], "part": found["part"], "seed": found["seed"]}
    counts |= {"restart": found["restart"]} if found["restart"] > 1 else {}
    counts["run"] = len(runs)
    return ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())


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
        if name not in {*CONFIGURATION, "restart", "arguments", "files", "version"}
        and all(c.get(name) == value for c in rest)
    }


def _page(title: str, experiments: Sequence[Experiment]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from benchmarks.report.figures import drawings, sweeps

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **blocks)
    sections = []
    for name, about, runs in experiments:
        groups: list[dict[str, Any]] = []
        swept: dict[tuple[str, str], list[Run]] = {}
        by_group = comparison.grouped(runs)
        for group, mine in by_group.items():
            swept.setdefault((group.kind, group.protocol), []).extend(mine)
            shown = {"heading": _heading(group), "extent": _extent(mine), "figures": drawings(mine)}
            shown |= {
                "summary": tables.summary(group, mine),
                "parts": tables.parts(mine),
                "tested": tables.tested(mine),
                "terms": tables.terms(mine),
                "leak": tables.leak(by_group[twin], mine) if (twin := _twin(group)) in by_group else None,
            }
            groups.append(shown | {"remarks": [*tables.failures(mine), *tables.published(group, mine)[1]]})
        curves = [one for mine in swept.values() for one in sweeps(mine)]
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
