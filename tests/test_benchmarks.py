"""The benchmarks measure what they say."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks.costs import speed
from benchmarks.run.records import finish, mean_and_error


def test_paired_differences_by_hand():
    # Mean 0.1, standard deviation 0.0816, over the root of 4.
    assert mean_and_error([0.1, 0.0, 0.2, 0.1]) == "+0.1000 ± 0.0408"


def test_an_interrupted_write_leaves_the_earlier_record(tmp_path):
    path = tmp_path / "record.json"
    finish(path, {"table": "old"})
    with pytest.raises(TypeError):
        finish(path, {"table": "new", "broken": object()})
    assert json.loads(path.read_text())["table"] == "old"


def test_the_command_line(monkeypatch, capsys):
    from benchmarks.__main__ import main

    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "report" in capsys.readouterr().out


def test_the_plain_loop_of_the_speed_table_trains_the_same_network():
    x = np.random.default_rng(0).normal(size=(64, 5))
    taken = speed.median_seconds({"a": lambda: speed._plain_loop(x, (4,), 2, 16, 1)}, repeats=1)
    assert taken["a"] > 0


def test_a_record_reads_as_it_was_written(tmp_path):
    record = {"table": '| "runs": null |', "runs": [{"auroc": 0.5, "runs": None}, {"auroc": 1.0}], "last": 1}
    finish(tmp_path / "record.json", record)
    text = (tmp_path / "record.json").read_text()
    assert json.loads(text) == record
    assert '\n  {"auroc": 1.0}\n' in text
