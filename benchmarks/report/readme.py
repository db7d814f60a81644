"""Write the pages of results, the README's main table and its picture, from the records in benchmarks/results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import comparison
from benchmarks.report.report import markdown_table
from benchmarks.run.store import RESULTS, Run, read, whole
from benchmarks.run.tables import markdown

README = Path(__file__).parents[2] / "README.md"
PAGES = Path(__file__).parent / "pages"

_MAIN = "<!-- table: main -->"
_CONTAMINATED = "<!-- line: contaminated -->"
_NOTE = "<!-- `python -m benchmarks readme` writes this page; its text is in benchmarks/report/pages. -->"


def readme() -> None:
    """Write benchmarks/results/*.md, the README's main table and its picture from the records."""
    from benchmarks.report.overview import overview

    for template in sorted(PAGES.glob("*.md")):
        _write(RESULTS / template.name, page(template))
    overview(RESULTS / "overview.png")
    _write(README, fill(README.read_text(encoding="utf-8")))


def _write(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def page(template: Path) -> str:
    """The text of a page with the tables of records in place of its marks ``<!-- table: NAME -->``."""
    text = template.read_text(encoding="utf-8")
    return f"{_NOTE}\n\n" + re.sub(r"<!-- table: ([\w/]+) -->", lambda mark: table_of(mark[1]), text)


def table_of(name: str) -> str:
    """The table of a record, and when, where and by which commit it was measured.

    Tables of experiments, of the paper and of the mixin are made from their runs, as they are made now; the other
    records have no more than the table.
    """
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["command"] == "run":
        table = markdown_table(read(path).runs)
    elif record["command"] == "paper":
        from benchmarks.studies.paper_table import make_table

        table = make_table(record, record["runs"])
    elif record["command"] == "mixin":
        from benchmarks.studies import mixin

        table = mixin.make_table(record["runs"])
    else:
        table = record["table"]
    made = f"{record['date'][:10]}, commit {record['commit'][:10]}, {record['machine']}, {record['cores']} cores"
    return f"{table}\n\nRecord: [{path.name}]({name}.json) ({made})."


def fill(text: str) -> str:
    """``text`` with the main table behind its mark ``<!-- table: main -->``, up to ``<!-- end -->``.

    Raises:
        ValueError: If the mark is not there once, or has no end.
    """
    before, *rest = text.split(_MAIN)
    if len(rest) != 1 or "<!-- end -->" not in rest[0]:
        msg = f"README.md must have one mark {_MAIN}, and <!-- end --> behind it"
        raise ValueError(msg)
    text = f"{before}{_MAIN}\n{main_table()}\n<!-- end -->{rest[0].partition('<!-- end -->')[2]}"
    before, mark, after = text.partition(_CONTAMINATED)
    return f"{before}{mark}\n{contaminated_line()}\n<!-- end -->{after.partition('<!-- end -->')[2]}" if mark else text


def contaminated_line() -> str:
    """What the README's quick start says of anomalies among the training rows."""
    runs = _groups("tables")["odds, unsupervised"]
    toll, twin = str(comparison.first_toll(runs)), f"{comparison.first_toll(runs)} (beta=0)"
    auroc, precision = (comparison.means(runs, metric).mean() for metric in ("auroc", "average_precision"))
    ranks = comparison.ranks(runs)
    count = len(comparison.means(runs))
    return (
        f"The rows may hold anomalies: `fit` on all rows is what most users do. Trained so on {count} tables that the "
        f"defaults were not chosen by, the mean AUROC is {auroc[toll]:.3f} and the mean average precision "
        f"{precision[toll]:.3f} ({auroc[twin]:.3f} and {precision[twin]:.3f} without the pressure on latents), the "
        f"mean rank {ranks[toll]:.1f} of {len(ranks)} detectors."
    )


def main_table() -> str:
    """What the README shows of all records: Toll, its twin with beta 0, the best other method, and a verdict."""
    classes, tables = _groups("classes"), _groups("tables")
    normal, every = (tables[f"odds, {protocol}"] for protocol in ("semi-supervised", "unsupervised"))
    rows = [
        ("digits, each class normal once: AUROC", *_beside(*_groups("digits").values()), "no difference between them"),
        (
            "MNIST, each class normal once, 1000 training images: AUROC",
            *_beside(classes["mnist, semi-supervised"]),
            "the term is why",
        ),
        (
            "Fashion-MNIST, the same",
            *_beside(classes["fashion_mnist, semi-supervised"]),
            "the term is why",
        ),
        (
            "CIFAR-10, the same",
            *_beside(classes["cifar10, semi-supervised"]),
            "near chance, as everything that reconstructs pixels; pretrained features are far ahead",
        ),
        (
            "four kinds of parts at 256 pixels, ResNet-18: AUROC, PRO",
            *_beside([run for runs in _groups("patches").values() for run in runs], pro=True),
            "level with PatchCore; the term is not why",
        ),
        (
            f"8 ODDS tables, trained on normal rows: AUROC, mean rank of {len(comparison.ranks(normal))}",
            *_beside(normal, rank=True),
            "among the best; the term adds nothing",
        ),
        (
            "the same tables, trained on all rows",
            *_beside(every, rank=True),
            "others are ahead; the term adds precision, within its error",
        ),
        (
            "Arrhythmia with the authors' settings: F1",
            *_arrhythmia(),
            "choosing the step needs no labels",
        ),
        ("inspecting one image, beyond the backbone", *_inspection(), "two fifths of PatchCore's time"),
    ]
    heads = ["data", "Toll", "its twin, beta 0", "best other", "verdict"]
    return markdown([dict(zip(heads, row, strict=True)) for row in rows])


def _groups(name: str) -> dict[str, list[Run]]:
    found = comparison.grouped(read(RESULTS / f"{name}.json").runs)
    return {f"{group.dataset}, {group.protocol}": runs for group, runs in found.items()}


def _beside(runs: list[Run], *, pro: bool = False, rank: bool = False) -> tuple[str, str, str]:
    """The first Toll, its twin with beta 0, and of the methods that are not ours the one with the best mean rank.

    Where maps count too, it is the one with the best mean AUROC: one that has none worth the name may rank high.
    """
    auroc, overlap, ranks = comparison.means(runs).mean(), comparison.means(runs, "pro").mean(), comparison.ranks(runs)

    def text(label: str) -> str:
        return f"{auroc[label]:.3f}" + f", {overlap[label]:.3f}" * pro + f", {ranks[label]:.2f}" * rank

    toll = str(comparison.first_toll(runs))
    order = list(auroc.sort_values(ascending=False).index) if pro else comparison.ranking(runs)
    other = next(label for label in order if "Toll" not in label)
    return f"{toll} {text(toll)}", text(f"{toll} (beta=0)"), f"{other} {text(other)}"


def _arrhythmia() -> tuple[str, str, str]:
    """Mean and standard deviation of the test F1: the step chosen without labels, the twin's, the authors' choice."""
    from benchmarks.studies.paper_table import finished

    record = json.loads((RESULTS / "paper_arrhythmia.json").read_text())
    done, twins = finished(record, record["runs"])

    def text(choice: str, runs: Sequence[Mapping[str, Any]]) -> str:
        found = [run["protocols"][choice]["total"] for run in runs]
        return f"{statistics.mean(found):.3f} ± {statistics.pstdev(found):.3f}"

    twin = text("label-free", twins) if twins else "not run"
    return f"Toll {text('label-free', done)}", twin, f"Toll, step chosen by labelled anomalies, {text('paper', done)}"


def _inspection() -> tuple[str, str, str]:
    """Milliseconds in OpenVINO and megabytes beyond the backbone."""
    toll, core, _ = json.loads((RESULTS / "deployment.json").read_text())["rows"]

    def text(row: dict[str, list[float]]) -> str:
        return f"{row['OpenVINO, ms'][1]:.1f} ms, {row['model, MB'][1]:.1f} MB"

    return f"PatchToll {text(toll)}", "the same", f"PatchCore with 1 % of the patches {text(core)}"
