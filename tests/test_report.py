"""Reports say what the records say: statistics by hand, pages that stand alone, figures that runs support."""

from __future__ import annotations

import base64
import copy
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from benchmarks.report import comparison, figures, report, variants
from benchmarks.report.comparison import Group
from benchmarks.report.report import markdown_table
from benchmarks.run import store as collected

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


def run(label="A", part="0", seed=0, auroc=0.9, **changes):
    configuration = {
        "label": label,
        "method": label.split(" (")[0],
        "arguments": {},
        "kind": "images",
        "dataset": "digits",
        "part": part,
        "protocol": "semi-supervised",
        "seed": seed,
        "max_epochs": 7,
    }
    result = {
        "metrics": {"auroc": auroc, "average_precision": 0.5, "f1": 0.25},
        "fit_seconds": 2.0,
        "score_seconds": 0.5,
        "model_mb": 0.125,
        "facts": {},
    }
    provenance = {"date": "2026-01-02T03:04:05+00:00", "commit": "abcdef0123456", "dirty": False, "machine": "vax"}
    return {
        "configuration": configuration | {key: v for key, v in changes.items() if key in configuration},
        "provenance": provenance,
        **result,
        **{key: v for key, v in changes.items() if key not in configuration},
    }


def failed(label="A", part="0", seed=0, error="ValueError: singular", **changes):
    kept = {"configuration", "provenance"}
    return {key: v for key, v in run(label, part, seed, **changes).items() if key in kept} | {"error": error}


def cells(line):
    """Of a line of a Markdown table."""
    return [cell.strip() for cell in line[1:-1].split("|")]


def block_runs(values, **changes):
    return [
        run(label, str(part), auroc=auroc, **changes) for label, row in values.items() for part, auroc in enumerate(row)
    ]


RUNS = [
    *(run("Toll", "0", seed, auroc) for seed, auroc in enumerate((0.9, 1.0))),
    *(run("Toll", "1", seed, auroc) for seed, auroc in enumerate((0.6, 0.7))),
    *(run("B", "0", seed, auroc) for seed, auroc in enumerate((0.8, 0.8))),
    *(run("B", "1", seed, auroc) for seed, auroc in enumerate((0.65, 0.65))),
    *(run("C", part, seed, 0.5) for part in "01" for seed in (0, 1)),
]


def everything():
    """What supports every figure, with failures, a hostile label, and two data sets."""
    draw = np.random.default_rng(0)
    runs = []
    for dataset in ("digits", "mnist"):
        for beta in (0, 0.1, 10):
            for part in range(6):
                norms = {"edges": [0, 1, 2, 4], "normal": [8, 2, 0], "anomalous": [1, 4, 5]}
                rare = [{"rate": rate, "auroc": 0.9, "average_precision": 10 * rate} for rate in (0.01, 0.1)]
                one = {
                    "arguments": {"beta": beta},
                    "method": "Toll",
                    "latent_norms": norms,
                    "rare": rare,
                    "roc": np.linspace(0, 1, 51).tolist(),
                    "examples": [{"image": PNG, "map": PNG, "mask": None, "score": 1.5, "anomalous": True}],
                }
                runs.append(run(f"Toll (beta={beta})", str(part), auroc=draw.uniform(0.8, 1), dataset=dataset, **one))
        runs += [run("Deep SVDD", str(part), auroc=draw.uniform(0.6, 0.9), dataset=dataset) for part in range(6)]
        runs.append(failed("<script>alert(1)</script>|", error="ValueError: <i>odd</i>", dataset=dataset))
    return runs


def record(runs, **more):
    return {"command": "run", "experiment": {"name": "e<1>", "about": "What & why"}, "runs": runs, **more}


@pytest.fixture(scope="module", name="html")
def _html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "record.json").write_text(json.dumps(record(everything())))
    report.report([folder / "record.json"], folder / "page.html", "A title")
    return (folder / "page.html").read_text()


def test_means_and_ranks_by_hand():
    assert comparison.means(RUNS).loc[("digits", "0")].to_dict() == pytest.approx({"Toll": 0.95, "B": 0.8, "C": 0.5})
    # On part 1 Toll and B tie at 0.65 and share ranks 1 and 2.
    assert comparison.ranks(RUNS).to_dict() == {"Toll": 1.25, "B": 1.75, "C": 3.0}
    assert comparison.ranking(RUNS) == ["Toll", "B", "C"]


def test_a_failed_run_takes_the_last_rank_and_leaves_the_mean():
    runs = [*RUNS, failed("Toll", "1", 2)]
    assert comparison.ranks(runs).to_dict() == {"Toll": 2.0, "B": 1.5, "C": 2.5}
    assert comparison.means(runs)["Toll"].tolist() == pytest.approx([0.95, 0.65])
    assert comparison.failures(runs)["Toll"].tolist() == [0, 1]
    # Two that fail share the last two ranks.
    assert comparison.ranks([*runs, failed("C", "1", 2)]).to_dict() == {"Toll": 1.75, "B": 1.5, "C": 2.75}


def again(one, restart):
    return {**one, "configuration": one["configuration"] | {"restart": restart}}


def test_restarts_are_averaged_within_their_split_and_splits_within_their_part():
    runs = [
        run("Toll", "0", 0, 0.9),
        again(run("Toll", "0", 0, 0.7), 1),
        again(run("Toll", "0", 0, 0.5), 2),
        run("Toll", "0", 1, 0.5),
        run("Toll", "1", 0, 0.8),
        *(run("B", "0", seed, auroc) for seed, auroc in enumerate((0.6, 0.8))),
        run("B", "1", 0, 0.8),
    ]
    # Part 0: Toll has 0.7 and 0.5 on its splits, B 0.6 and 0.8.
    assert comparison.means(runs)["Toll"].tolist() == pytest.approx([0.6, 0.8])
    (one,) = comparison.differences(runs, "Toll")
    # Gaps -0.1 and 0.3 on part 0, which means 0.1, and 0 on part 1.
    assert (one.mean, one.error, one.pairs, one.blocks) == pytest.approx((0.05, 0.05, 3, 2))
    # One part: over its splits, not over its restarts.
    (one,) = comparison.differences(runs[:4] + runs[5:7], "Toll")
    assert (one.mean, one.error, one.pairs) == pytest.approx((0.1, 0.2, 2))
    assert comparison.failures([*runs, again(failed("B", "0", 0), 1)])["B"].tolist() == [1, 0]
    assert markdown_table(runs).splitlines()[0] == (
        "**digits, semi-supervised** (2 methods, 2 parts, 2 seeds, 3 restarts, 8 runs)"
    )
    two = [one | {"term_auroc": {"a": one["metrics"]["auroc"], "b": 0.5}} for one in runs]
    assert comparison.terms(two).loc["Toll"].to_dict() == pytest.approx({"score": 0.7, "a": 0.7, "b": 0.5})


def test_seeds_without_a_split_are_restarts():
    """What draws nothing is run once there, and is compared with the mean of all seeds of what draws."""
    runs = [
        *(run("Toll", part, seed, auroc) for part in "01" for seed, auroc in enumerate((0.5, 0.9))),
        *(run("KNN", part, 0, 0.8) for part in "01"),
    ]
    for one in runs:
        one["configuration"]["protocol"] = "unsupervised"
    (one,) = comparison.differences(runs, "Toll")
    assert (one.mean, one.error, one.pairs) == pytest.approx((0.1, 0, 2))
    for one in runs:
        one["configuration"]["validation_rows"] = 0.2
    # Rows are held out by seed: only the first is a pair.
    assert comparison.differences(runs, "Toll")[0].mean == pytest.approx(0.3)


def test_parts_that_a_method_was_not_run_on_rank_nobody():
    assert comparison.ranks([*RUNS, run("B", "2", auroc=0.1)]).to_dict() == {"Toll": 1.25, "B": 1.75, "C": 3.0}


def test_groups_are_kinds_data_sets_with_arguments_and_protocols():
    made = run("A", dataset="gaussian", kind="table")
    made["configuration"]["dataset_arguments"] = {"factors": 2, "root": "/somewhere"}
    groups = comparison.grouped([run(), made, run(protocol="unsupervised")])
    assert list(groups) == [
        Group("images", "digits", "semi-supervised"),
        Group("table", "gaussian (factors=2)", "semi-supervised"),
        Group("images", "digits", "unsupervised"),
    ]


def test_differences_by_hand():
    toll = comparison.first_toll(RUNS)
    b, c = comparison.differences(RUNS, toll)
    # Parts' mean gaps: -0.15 and 0; their standard deviation over the root of 2 is 0.075.
    assert (b.label, b.mean, b.error, b.pairs, b.blocks, b.p) == ("B", *map(pytest.approx, (-0.075, 0.075)), 4, 2, None)
    assert c.mean == pytest.approx(-0.3)
    # One part: gaps of its seeds, -0.1 and -0.2.
    (lone,) = comparison.differences([r for r in RUNS if r["configuration"]["part"] == "0"][:4], toll)
    assert (lone.mean, lone.error) == (pytest.approx(-0.15), pytest.approx(0.05))


def test_holm_by_hand():
    rng = np.random.default_rng(1)
    reference = rng.uniform(0.5, 0.6, 8)
    values = {"Toll": reference, "A": reference + 0.1, "B": reference + rng.normal(0, 0.01, 8), "C": reference}
    values["A"] = values["A"] + np.arange(8) / 100  # no ties
    raw = [wilcoxon(values[label] - reference).pvalue for label in "AB"]
    assert raw[0] == pytest.approx(2 / 2**8)
    found = {one.label: one.p for one in comparison.differences(block_runs(values), "Toll")}
    assert found["A"] == pytest.approx(3 * 2 / 2**8)
    assert found["B"] == pytest.approx(min(1, max(2 * raw[1], 3 * raw[0])))
    assert found["C"] == 1


@pytest.mark.parametrize(
    ("gaps", "p"),
    [
        # Of 64 signs, 2 are as far out as all alike, and 4 as far as all but the smallest.
        ([1, 2, 3, 4, 5, 6], 2 / 64),
        ([-1, 2, 3, 4, 5, 6], 4 / 64),
        # Ties share rank 3.5; one gap of 0 leaves five, whose 32 signs have 2 that are as far out.
        ([2, 2, 2, 2, 2, 2], 2 / 64),
        ([0, 2, 2, 2, 2, 2], 2 / 32),
        ([0, 0, 0, 0, 0, 0], 1),
        # Ranks 1.5, 1.5, 3, 4, 5, 6: without one of the first two, as far out as all 21 are, or 19.5.
        ([-1, 1, 2, 3, 4, 5], 2 * 3 / 64),
        ([1, 2, 3, 4, 5], None),
    ],
)
def test_signed_ranks_by_hand(gaps, p):
    assert comparison.signed_rank(pd.Series(gaps, dtype=float)) == (None if p is None else pytest.approx(p))


def test_signed_ranks_are_those_of_scipy():
    rng = np.random.default_rng(2)
    for count in (6, 8, 9, 13, 14, 17):
        for gaps in (rng.normal(0.5, 1, count), rng.integers(-2, 4, count).astype(float)):
            expected = wilcoxon(gaps).pvalue
            assert comparison.signed_rank(pd.Series(gaps)) == pytest.approx(expected, rel=1e-9), gaps


def test_critical_differences_need_methods_and_parts():
    rng = np.random.default_rng(0)
    values = {
        "A": 0.9 + rng.uniform(0, 0.01, 5),
        "B": 0.8 + rng.uniform(0, 0.01, 5),
        "C": 0.7 + rng.uniform(0, 0.01, 5),
    }
    found = comparison.nemenyi(block_runs(values))
    # Ranks 1, 2, 3 on each of 5 parts: Friedman's statistic is 10, with 2 degrees of freedom.
    assert found.friedman == pytest.approx(np.exp(-5))
    assert found.ranks.to_dict() == {"A": 1, "B": 2, "C": 3}
    # Demsar 2006: the critical difference of 3 methods is 2.343 sqrt(3 * 4 / (6 * 5)) = 1.48.
    assert found.p.loc["A", "B"] > 0.05 > found.p.loc["A", "C"]
    assert comparison.nemenyi(block_runs({label: row[:4] for label, row in values.items()})) is None
    assert comparison.nemenyi(block_runs({label: values[label] for label in "AB"})) is None
    left_out = comparison.nemenyi([*block_runs(values | {"D": values["A"]}), failed("D", "0", 1)]).left_out
    assert left_out == ["D"]


def test_markdown_by_hand():
    lines = markdown_table(
        [*RUNS, failed("C", "1", 2), run("C", "0", 2, 0.5, facts={"pretrained": False})]
    ).splitlines()
    assert lines[0] == "**digits, semi-supervised** (3 methods, 2 parts, 3 seeds, 14 runs)"
    head, _, toll, b, c = (cells(line) for line in lines[2:7])
    costs = ["fit s", "score s", "MB"]
    assert head == ["method", "mean rank", "AUROC", "minus Toll", "AP", "F1", *costs, "runs", "note", "0", "1"]
    tail = ["**0.500**", "**0.250**", "2", "0.5", "0.12", "4", ""]
    assert toll == ["Toll", "**1.25**", "**0.8000**", "", *tail, "**0.950**", "**0.650**"]
    assert b == ["B", "1.75", "0.7250", "-0.0750 ± 0.0750", *tail, "0.800", "**0.650**"]  # too few for a test
    assert c[:6] == ["C", "3.00", "0.5000†", "-0.3000 ± 0.1500", "0.500†", "0.250†"]
    assert c[9:11] == ["5, 1 failed", "random weights"]
    assert lines[8] == "† C, 1 failed, on 1: ValueError: singular"


def test_markdown_leaves_out_what_the_heading_says():
    text = markdown_table([run("Toll", auroc=0.9), run("B|x", auroc=0.8)])
    assert text.splitlines()[0] == "**digits, semi-supervised** (2 methods, 1 part, 1 seed, 2 runs)"
    # No rank, part or difference of one run each, and no number of runs that is the same for all.
    assert cells(text.splitlines()[2]) == ["method", "AUROC", "AP", "F1", "fit s", "score s", "MB"]
    assert r"| B\|x " in text


def test_protocols_with_and_without_copies_stand_side_by_side(tmp_path):
    def both(part, copied, found):
        return [
            run(label, part, auroc=auroc, protocol=protocol, samples={"test": 30, "anomalies": 10, "copied": copies})
            for label, values in found.items()
            for protocol, auroc, copies in zip(("semi-supervised", "bootstrap"), values, (20, copied), strict=True)
        ]

    runs = both("few", 19, {"Toll": (0.8, 0.9), "KNN": (0.7, 0.98)})
    runs += both("less", 11, {"Toll": (0.6, 0.8), "KNN": (0.5, 0.9)})
    runs += both("many", 10, {"Toll": (0.9, 0.85), "KNN": (0.95, 0.85)})
    title, _, *lines = markdown_table(runs).splitlines()[-6:]
    assert title.startswith("**digits, semi-supervised and bootstrap side by side: AUROC** (of 3 parts, 2 where most ")
    head, _, *rows = map(cells, lines)
    groups = [f"{name}: {kind}" for name in ("copies", "others") for kind in ("semi-supervised", "bootstrap")]
    assert head == ["method", *groups[:2], "copies: difference", *groups[2:], "others: difference"]
    # The differences of Toll are 0.1 and 0.2, those of KNN 0.28 and 0.4.
    assert rows == [
        ["Toll", "**0.700**", "0.850", "+0.150 ± 0.050", "0.900", "**0.850**", "-0.050"],
        ["KNN", "0.600", "**0.940**", "+0.340 ± 0.060", "**0.950**", "**0.850**", "-0.100"],
    ]
    leaking = [one for one in runs if one["configuration"]["protocol"] == "bootstrap"]
    assert "side by side" not in markdown_table(leaking)
    (tmp_path / "record.json").write_text(json.dumps(record(runs)))
    report.report([tmp_path / "record.json"], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("AUROC by both protocols") == 2  # a caption and its label


def test_tables_have_ranks_and_differences_in_average_precision():
    runs = []
    for label, values in {"Toll": (0.9, 0.7), "Other": (0.8, 0.8)}.items():
        for part, value in enumerate(values):
            runs.append(run(label, str(part), kind="table"))
            runs[-1]["metrics"] = {"auroc": 0.9, "average_precision": value, "f1": 0.5}
    head, _, *rows = map(cells, markdown_table(runs).splitlines()[2:6])
    at = head.index("rank in AP")
    assert head[at : at + 3] == ["rank in AP", "AP", "AP minus Toll"]
    assert {row[0]: row[at : at + 3] for row in rows} == {
        "Toll": ["1.50", "**0.800**", ""],
        "Other": ["1.50", "**0.800**", "+0.0000 ± 0.1000"],
    }


def test_variants_are_compared_with_what_they_vary_where_there_is_no_toll():
    values = {"A": (0.5, 0.6), "A, more": (0.7, 0.7), "B": (0.9, 0.9), "B, more": (0.8, 0.8)}
    text = markdown_table(block_runs(values))
    head, _, *rows = map(cells, text.splitlines()[2:8])
    at = head.index("minus the one without")
    assert {row[0]: row[at] for row in rows} == {
        "A": "",
        "A, more": "+0.1500 ± 0.0500",
        "B": "",
        "B, more": "-0.1000 ± 0.0000",
    }


def test_differences_are_tested_on_enough_parts():
    values = {"Toll": np.linspace(0.6, 0.7, 6), "A": np.linspace(0.7, 0.9, 6)}
    assert "(p = 0.031)" in markdown_table(block_runs(values))


def test_published_numbers_stand_apart_and_only_with_their_data_sets():
    runs = [run("DeepSVDD", dataset="mnist"), run("iforest", dataset="mnist"), run("Toll", dataset="mnist")]
    text = markdown_table(runs)
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert lines[0][2] == "published (not measured here)"
    assert {line[0]: line[2] for line in lines[2:]} == {"DeepSVDD": "0.948", "iforest": "0.923", "Toll": ""}
    assert "MemAE 0.975" in text.splitlines()[-1]
    assert "ublished" not in markdown_table([run("DeepSVDD"), run("Toll")])
    assert "ublished" not in markdown_table([run("DeepSVDD", dataset="mnist", protocol="unsupervised")])


def test_an_experiment_that_failed_throughout_is_reported(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record([failed("Toll"), failed("B")])))
    report.report([path], tmp_path / "page.html")
    assert "<figure>" not in (tmp_path / "page.html").read_text()
    assert "† B, 1 failed, on 0: ValueError: singular" in (tmp_path / "page.md").read_text()


class Tags(HTMLParser):
    VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "path", "use"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.targets, self.sources = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, _, attrs):
        self._note(attrs)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def _note(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in {"href", "xlink:href", "src"}:
                self.sources.append(value)
            self.targets += re.findall(r"url\(#([^)]+)\)", value or "")


def test_the_page_is_well_formed_and_stands_alone(html):
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    assert len(tags.ids) == len(set(tags.ids))
    inline = ("#", "data:image/png;base64,", "data:image/svg+xml;base64,")
    assert all(source.startswith(inline) for source in tags.sources)
    targets = {*tags.targets, *(source[1:] for source in tags.sources if source.startswith("#"))}
    assert targets <= set(tags.ids)
    assert "@import" not in html
    assert "<script" not in html
    drawn = [base64.b64decode(source.partition(",")[2]) for source in tags.sources if "svg+xml" in source]
    assert len(drawn) == html.count("<figure>")
    for svg in drawn:
        assert ET.fromstring(svg).tag.endswith("svg")
        assert not re.search(rb'href="(?!#)|<script|@import', svg)  # it stands alone, too
    assert "prefers-color-scheme: dark) { figure > img" in html


def test_the_page_shows_labels_escaped_failures_and_settings(html):
    for text in (
        "&lt;script&gt;alert(1)&lt;/script&gt;|",
        "ValueError: &lt;i&gt;odd&lt;/i&gt;",
        "e&lt;1&gt;",
        "A title",
    ):
        assert text in html
    for label in ("Toll (beta=0)", "Toll (beta=0.1)", "Toll (beta=10)", "Deep SVDD", "What &amp; why", "max_epochs"):
        assert label in html
    assert "uncommitted" not in html
    assert html.count("published (not measured here)") == 1


def test_every_figure_that_is_supported_and_no_other(html):
    titles = re.findall(r"<h4>(.*?)</h4>", html)
    each = ["AUROC of every run", "ROC curves", "Latent norms", "Critical differences", "Accuracy and time"]
    each += ["Rare anomalies", "Anomaly maps side by side"]
    assert titles == ["Toll: AUROC against beta", *each, *each]
    assert html.count('alt="ROC curves"') == 2
    assert [one.title for one in figures.drawings(RUNS)] == ["AUROC of every run", "Accuracy and time"]
    assert figures.drawings([failed()]) == []


def test_maps_of_the_same_sample_stand_in_one_row():
    def example(image, of, anomalous=True):
        return {"image": image, "map": of, "mask": None, "score": 1.0, "anomalous": anomalous}

    runs = [
        run("A", "0", 1, examples=[example("late", "later")]),
        run("A", "0", 0, examples=[example("x", "Ax"), example("y", "Ay"), example("n", "An", False)]),
        run("B", "0", 0, examples=[example("y", "By"), example("n", "Bn", False)]),
        run("A", "1", 0, examples=[example("x", "A1")]),
        run("C", "0", 0, examples=[example("x", None)]),
    ]
    (drawing,) = (one for one in figures.drawings(runs) if one.samples)
    assert list(drawing.labels) == ["A", "B"]
    found = [(row["image"], {label: one["map"] for label, one in row["found"].items()}) for row in drawing.samples]
    # Parts take turns, anomalies come first, of the first seed only.
    assert found == [
        ("x", {"A": "Ax"}),
        ("x", {"A": "A1"}),
        ("y", {"A": "Ay", "B": "By"}),
        ("n", {"A": "An", "B": "Bn"}),
    ]


def test_an_argument_is_swept_only_by_itself():
    def sweep(*arguments):
        return figures.sweeps([run(f"Toll {given}", method="Toll", arguments=given) for given in arguments])

    assert [one.title for one in sweep(*({"beta": beta} for beta in (0, 1, 100)))] == ["Toll: AUROC against beta"]
    assert sweep({"beta": 0}, {"beta": 1}) == []
    assert sweep({"beta": 0}, {"beta": 1}, {"beta": 2, "lr": 1}) == []
    assert sweep({"bias": False}, {"bias": True}, {}) == []


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    figures.drawings(RUNS)
    assert dict(mpl.rcParams) == before


def test_uncommitted_changes_are_warned_of(tmp_path):
    dirty = copy.deepcopy(RUNS)
    dirty[3]["provenance"]["dirty"] = True
    (tmp_path / "r.json").write_text(json.dumps(record(dirty)))
    report.report([tmp_path / "r.json"], tmp_path / "page.html")
    assert 'class="warning"' in (tmp_path / "page.html").read_text()


def test_a_folder_of_single_runs(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    for i, one in enumerate(RUNS):
        (folder / f"{i}.json").write_text(json.dumps(one))
    report.report([folder], tmp_path / "page.html")
    assert markdown_table(RUNS).splitlines()[2] in (tmp_path / "page.md").read_text()
    (folder / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match=r"odd\.json is no record of run: a run lacks label"):
        collected.read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no record of run: Expecting"),
        ("[]", "has no list of runs"),
        ('{"table": ""}', "has no list of runs"),
        ('{"runs": []}', "holds no runs"),
        ('{"runs": [3]}', "lacks label"),
        (json.dumps({"runs": [{"configuration": run()["configuration"]}]}), "lacks metrics or an error"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.json.*{message}"):
        report.report([path], tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="gone"):
        report.report([tmp_path / "gone.json"])


def test_by_default_the_collected_records_of_run(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.run.store.RESULTS", tmp_path)
    (tmp_path / "speed.json").write_text('{"command": "speed"}')
    with pytest.raises(ValueError, match="at least one record of run"):
        report.report(output=tmp_path / "page.html")
    (tmp_path / "mine.json").write_text(json.dumps(record(RUNS)))
    report.report(output=tmp_path / "page.html")
    assert "e&lt;1&gt;" in (tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match=r"output must not end in \.md"):
        report.report(output=tmp_path / "page.md")


def test_an_interrupted_write_leaves_the_earlier_page(tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text(json.dumps(record(RUNS)))
    report.report([tmp_path / "r.json"], tmp_path / "page.html")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    written = type(tmp_path).write_text

    def interrupted(path, text, **options):
        if ".md" in path.name:
            raise KeyboardInterrupt
        return written(path, text, **options)

    monkeypatch.setattr(type(tmp_path), "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.report([tmp_path / "r.json"], tmp_path / "page.html", "Another title")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def _sweep(values):
    """A run for each beta on each part: AUROC, and what is known without labels."""
    return [
        run(f"Toll (beta={beta:g})", str(part), auroc=auroc, arguments={"beta": beta}, spliced_auroc=known)
        for beta, row in values.items()
        for part, (auroc, known) in enumerate(row)
    ]


SWEEP = {0.0: [(0.8, 0.6), (0.9, 0.9)], 1.0: [(0.7, 0.7), (0.95, 0.5)], 10.0: [(0.85, 0.7), (0.5, 0.4)]}


def test_a_number_chosen_without_labels_by_hand():
    (family,) = variants.families(_sweep(SWEEP))
    assert family.labels == {0.0: "Toll (beta=0)", 1.0: "Toll (beta=1)", 10.0: "Toll (beta=10)"}
    found = variants.choose_without_labels(_sweep(SWEEP), family)
    # Part 0 takes beta 1, the smaller of two that are known to be equal; part 1 takes beta 0.
    assert found.first == pytest.approx(0.85)
    assert found.chosen == pytest.approx((0.7 + 0.9) / 2)
    assert found.worst == pytest.approx(-0.1)
    assert found.error == pytest.approx(0.05)
    assert (found.best, found.best_value, found.parts, found.p) == (pytest.approx(0.85), 0.0, 2, None)
    assert "worst part -0.100" in markdown_table(_sweep(SWEEP))


def test_nothing_is_chosen_by_what_was_not_measured():
    runs = _sweep(SWEEP)
    del runs[0]["spliced_auroc"]
    (family,) = variants.families(runs)
    assert variants.choose_without_labels(runs, family).parts == 1
    assert variants.choose_without_labels([one | {"spliced_auroc": None} for one in runs], family) is None
    assert variants.families(_sweep({0.0: SWEEP[0.0], 1.0: SWEEP[1.0]})) == []


def test_terms_alone_by_hand():
    both = [
        run("Toll", str(part), auroc=auroc, term_auroc={"reconstruction": 0.5, "latent": auroc - 0.2})
        for part, auroc in enumerate((0.9, 0.7))
    ]
    table = markdown_table([*both, run("B", "0", term_auroc={"latent": 0.1})])
    lines = [cells(line) for line in table.partition("terms alone:")[2].splitlines() if line.startswith("|")]
    assert lines[0] == ["method", "score", "reconstruction", "latent"]
    assert lines[2] == ["Toll", "**0.8000**", "0.5000", "0.6000"]
    assert "terms alone" not in markdown_table(RUNS)


def test_a_collected_record_reads_as_its_runs(tmp_path):
    shared = {"commit": "abc", "dirty": True, "machine": "vax", "date": "2026-01-01"}
    runs = [one | {"traceback": "/home/me/x.py", "weights": False} for one in RUNS]
    record = {
        "command": "run",
        "experiment": {"name": "n", "about": "a"},
        **shared,
        "runs": collected.lean(runs, shared),
    }
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert "/home/me" not in (tmp_path / "r.json").read_text()
    assert "vax" not in json.dumps(record["runs"])
    found = collected.read(tmp_path / "r.json")
    assert (found.name, found.about) == ("n", "a")
    assert found.runs == RUNS
