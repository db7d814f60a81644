"""Pages of results and the README's table and picture say what the records say."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from benchmarks.report.readme import PAGES, fill, main_table, readme, table_of
from benchmarks.run.store import RESULTS


def _records():
    return {str(path.relative_to(RESULTS).with_suffix("")): path for path in RESULTS.glob("**/*.json")}


def test_every_record_stands_on_one_page():
    shown = [name for path in PAGES.glob("*.md") for name in re.findall(r"<!-- table: (.*?) -->", path.read_text())]
    assert sorted(shown) == sorted(_records())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command writes, from a copy of the records."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(RESULTS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "*.png"))
    (folder / "README.md").write_text("before\n<!-- table: main -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("readme", "overview"):
            patch.setattr(f"benchmarks.report.{module}.RESULTS", folder)
        patch.setattr("benchmarks.report.readme.README", folder / "README.md")
        readme()
    return folder


def test_the_committed_pages_are_those_that_the_command_writes(written):
    names = {path.name for path in PAGES.glob("*.md")}
    assert {path.name for path in written.glob("*.md")} - {"README.md"} == names
    assert {path.name for path in RESULTS.glob("*.md")} == names
    for name in names:
        text = (RESULTS / name).read_text(encoding="utf-8")
        assert text == (written / name).read_text(encoding="utf-8")
        _, title, lead = text.split("\n\n")[:3]
        assert title.startswith("# ")
        assert len(lead.splitlines()) == 3  # sentences
        assert "<!-- table" not in text
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (RESULTS / target).exists()


def test_the_readme_has_the_main_table_between_its_marks(written):
    text = (written / "README.md").read_text()
    assert text == f"before\n<!-- table: main -->\n{main_table()}\n<!-- end -->\nafter <!-- end -->\n"
    assert fill(text) == text
    for broken in ("none", "<!-- table: main -->", "<!-- end --><!-- table: main -->", 2 * text):
        with pytest.raises(ValueError, match="one mark <!-- table: main -->"):
            fill(broken)


def test_the_readmes_picture(written):
    for path in (written / "overview.png", RESULTS / "overview.png"):
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            assert picture.width > 1000


def test_a_table_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.report.readme.RESULTS", tmp_path)
    made = {"date": "2026-01-02T03:04:05", "commit": "abcdef0123456", "machine": "vax", "cores": 2}
    (tmp_path / "speed.json").write_text(json.dumps({"command": "speed", "table": "| a |", **made}))
    assert (
        table_of("speed") == "| a |\n\nRecord: [speed.json](speed.json) (2026-01-02, commit abcdef0123, vax, 2 cores)."
    )


def test_classes_that_were_not_run_are_no_rows():
    rows = [line for line in table_of("paper_mnist").splitlines() if re.match(r"\| \d +\|", line)]
    assert [row[2] for row in rows] == ["0", "1"]


def _mean(name, label, metric="auroc", **where):
    """Mean over parts of the mean over seeds, by hand."""
    runs = json.loads((RESULTS / f"{name}.json").read_text())["runs"]
    parts = {}
    for one in runs:
        c = one["configuration"]
        if c["label"] == label and all(c[key] == value for key, value in where.items()):
            parts.setdefault(c["part"], []).append(one["metrics"][metric])
    return np.mean([np.mean(values) for values in parts.values()])


def test_the_main_table_is_that_of_the_records():
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in main_table().splitlines())
    assert head == ["data", "Toll", "its twin, beta 0", "best other", "verdict"]
    assert len(rows) == 9
    digits, mnist, _, cifar, screw, normal, contaminated, arrhythmia, inspection = (row[1:4] for row in rows)
    assert digits == [
        f"Toll {_mean('digits', 'Toll'):.3f}",
        f"{_mean('digits', 'Toll (beta=0)'):.3f}",
        f"DenoisingAE {_mean('digits', 'DenoisingAE'):.3f}",
    ]
    assert mnist[1] == f"{_mean('classes', 'Toll (beta=0)', dataset='mnist'):.3f}"
    assert cifar[2] == f"KNN {_mean('classes', 'KNN', dataset='cifar10'):.3f}"
    for cell, label in zip(screw, ("PatchToll", "PatchToll (beta=0)", "PatchCore"), strict=True):
        assert cell.endswith(f"{_mean('patches', label):.3f}, {_mean('patches', label, 'pro'):.3f}")
    for row, protocol in ((normal, "semi-supervised"), (contaminated, "unsupervised")):
        assert row[0].startswith(f"TollDetector {_mean('tables', 'TollDetector', protocol=protocol):.3f}, ")
    assert normal[2].startswith("LUNAR")
    assert contaminated[2].startswith("OCSVM")
    assert arrhythmia[0] == "Toll 0.692 ± 0.000"
    assert inspection[0] == "PatchToll 16.7 ms, 3.2 MB"


def test_the_benchmarks_readme_names_every_command_and_experiment():
    text = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r'^        "(\w+)": ', (RESULTS.parent / "__main__.py").read_text(), re.MULTILINE)
    experiments = [path.stem for path in (RESULTS.parent / "experiments").glob("*.yaml")]
    assert len(commands) >= 12
    for name in (*commands, *experiments):
        assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text) or f"benchmarks {name}" in text, name
    for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
        assert (RESULTS.parent / target).exists(), target
