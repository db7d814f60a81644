"""The benchmarks measure what they say."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from scipy.io import savemat

from benchmarks import speed, tables
from benchmarks.digits import _paired, _run, _table, digits
from benchmarks.readme import fill
from benchmarks.records import finish

RUNS = [
    {"method": "A", "class": 0, "seed": 0, "auroc": 0.9},
    {"method": "A", "class": 1, "seed": 0, "auroc": 0.7},
    {"method": "A", "class": 0, "seed": 1, "auroc": 1.0},
    {"method": "A", "class": 1, "seed": 1, "auroc": 0.8},
    {"method": "B", "class": 0, "seed": 0, "auroc": 0.8},
    {"method": "B", "class": 1, "seed": 0, "auroc": 0.7},
    {"method": "B", "class": 0, "seed": 1, "auroc": 0.8},
    {"method": "B", "class": 1, "seed": 1, "auroc": 0.7},
]


def test_table_by_hand():
    lines = _table(RUNS).splitlines()
    assert lines[0] == "| method | 0 | 1 | mean ± sd over seeds |"
    # Seeds have means 0.8 and 0.9: mean 0.85, standard deviation 0.0707.
    assert lines[2] == "| A | 0.950 | 0.750 | 0.8500 ± 0.0707 |"
    assert lines[3] == "| B | 0.800 | 0.700 | 0.7500 ± 0.0000 |"


def test_paired_difference_by_hand():
    # Gaps 0.1, 0.0, 0.2, 0.1: mean 0.1, standard deviation 0.0816, over the root of 4.
    assert _paired(RUNS, "A", "B") == "A minus B: +0.1000 ± 0.0408 (standard error, 4 pairs)"


def test_methods_meet_the_same_test_images():
    knn, toll = _run("KNN", 0.0, 3, 0, 2), _run("Toll, beta 1", 1.0, 3, 0, 2)
    assert 0.9 < knn["auroc"] <= 1
    assert 0 <= toll["auroc"] <= 1
    assert toll["epochs"] == 2
    again = _run("Toll, beta 1", 1.0, 3, 0, 2)
    assert again["auroc"] == toll["auroc"]


def test_a_record_carries_where_it_comes_from(tmp_path, capsys):
    digits(seeds=1, classes=[1], betas=[0.0], max_epochs=1, jobs=1, output=tmp_path / "digits.json")
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["table"] in capsys.readouterr().out
    assert {"commit", "dirty", "date", "packages", "cores", "max_epochs"} <= set(record)
    assert [run["method"] for run in record["runs"]] == ["KNN", "Toll, beta 0"]


def test_an_interrupted_write_leaves_the_earlier_record(tmp_path):
    path = tmp_path / "record.json"
    finish(path, {"table": "old"})
    with pytest.raises(TypeError):
        finish(path, {"table": "new", "broken": object()})
    assert json.loads(path.read_text())["table"] == "old"


def test_filling_tables_is_stable(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.readme.RESULTS", tmp_path)
    (tmp_path / "digits.json").write_text(json.dumps({"table": "| new |"}))
    text = "before\n\n<!-- table: digits -->\n\nafter\n"
    once = fill(text)
    assert once == "before\n\n<!-- table: digits -->\n| new |\n<!-- end -->\n\nafter\n"
    assert fill(once) == once
    (tmp_path / "other.json").write_text(json.dumps({"table": ""}))
    with pytest.raises(ValueError, match="no mark <!-- table: other -->"):
        fill(text)
    with pytest.raises(ValueError, match=r"marks without a record in .*: lost$"):
        fill(text + "<!-- table: lost -->")


def test_the_command_line(monkeypatch, capsys):
    from benchmarks.__main__ import main

    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "digits" in capsys.readouterr().out


TABLES = [
    {"method": "TollDetector", "table": "a", "seed": 0, "protocol": "p", "auroc": 0.9, "ap": 0.5, "fit_seconds": 1.0},
    {"method": "TollDetector", "table": "b", "seed": 0, "protocol": "p", "auroc": 0.7, "ap": 0.6, "fit_seconds": 3.0},
    {"method": "KNN", "table": "a", "seed": 0, "protocol": "p", "auroc": 0.8, "ap": 0.5, "fit_seconds": 0.1},
    {"method": "KNN", "table": "b", "seed": 0, "protocol": "p", "auroc": 0.8, "ap": 0.2, "fit_seconds": 0.1},
    {"method": "LOF", "table": "a", "seed": 0, "protocol": "p", "auroc": 0.6, "ap": 0.1, "fit_seconds": 0.1},
    {"method": "LOF", "table": "b", "seed": 0, "protocol": "p", "auroc": 0.5, "ap": 0.1, "fit_seconds": 0.1},
]


def test_ranks_by_hand():
    assert tables._ranks(TABLES, "auroc") == {"TollDetector": 1.5, "KNN": 1.5, "LOF": 3.0}
    # Average precision: a tie on table a, Toll first on b.
    assert tables._ranks(TABLES, "ap") == {"TollDetector": 1.25, "KNN": 1.75, "LOF": 3.0}


def test_variants_are_shown_but_not_ranked():
    twin = [run | {"method": "TollDetector, beta 0", "auroc": run["auroc"] - 0.1} for run in TABLES[:2]]
    lines = tables._table(TABLES + twin, "p").splitlines()
    assert lines[2].startswith("| TollDetector | 0.900 | 0.700 | 0.8000 | 1.50 | 0.550 | 1.25 |")
    assert lines[-1].startswith("| TollDetector, beta 0 | 0.800 | 0.600 | 0.7000 | | 0.550 | |")
    # Gaps 0.1 and 0.1.
    assert tables._paired(TABLES + twin, "p", "TollDetector, beta 0", "auroc") == "+0.1000 ± 0.0000"


def test_halves_train_on_normal_rows_only():
    x, y = np.arange(30.0)[:, None], (np.arange(30) < 10).astype(int)
    train, test, labels = tables.halves(x, y, seed=0)
    assert len(train) == 10
    assert (train >= 10).all()
    assert sorted(np.concatenate([train, test]).ravel()) == list(range(30))
    np.testing.assert_array_equal(labels, test.ravel() < 10)


def test_a_detector_that_fails_counts_as_chance(tmp_path, monkeypatch):
    savemat(tmp_path / "t.mat", {"X": np.random.default_rng(0).normal(size=(40, 3)), "y": np.arange(40) < 4})
    monkeypatch.setitem(tables.PYOD, "Broken", "knn")
    run = tables._run("Broken", "t", 0, "contaminated", [tmp_path])
    assert run["auroc"] == 0.5
    assert run["ap"] == pytest.approx(0.1)
    assert "Broken" in run["error"]
    with pytest.raises(FileNotFoundError, match=r"no other\.mat or other\.npz in"):
        tables.load("other", [tmp_path])


def test_the_plain_loop_of_the_speed_table_trains_the_same_network():
    x = np.random.default_rng(0).normal(size=(64, 5))
    taken = speed._seconds({"a": lambda: speed._plain_loop(x, (4,), 2, 16, 1)}, repeats=1)
    assert taken["a"] > 0
