"""The benchmarks measure what they say."""

from __future__ import annotations

import json
import sys

import pytest

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


def test_the_command_line(monkeypatch, capsys):
    from benchmarks.__main__ import main

    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "digits" in capsys.readouterr().out
