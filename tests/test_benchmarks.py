"""The benchmarks measure what they say."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks.costs import speed
from benchmarks.data.datasets import Limits
from benchmarks.interfaces import Budget
from benchmarks.run import measure
from benchmarks.run.plan import plan_of
from benchmarks.run.store import Runs, finish
from benchmarks.run.tables import markdown, mean_and_error
from toll_plugin.core import DenseAutoencoder, TollLoss


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
    torch.manual_seed(3)
    network = DenseAutoencoder(5, (4,), 2)
    rows, loss = torch.from_numpy(x).float(), TollLoss(0.1)
    before = loss(rows, *network(rows)).item()
    torch.manual_seed(3)
    trained = speed._plain_loop(x, (4,), 2, 16, epochs=20)
    assert [tuple(p.shape) for p in trained.parameters()] == [tuple(p.shape) for p in network.parameters()]
    assert loss(rows, *trained(rows)).item() < 0.9 * before


class _Clock:
    """Each call takes its own seconds, by turns."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, *seconds):
        left = iter(seconds)

        def call():
            self.now += next(left)

        return call


def test_medians_leave_the_first_run_out(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(measure, "time", clock)
    work = {"a": clock.taking(100, 1, 5, 3), "b": clock.taking(100, 8, 7, 6)}
    assert measure.median_seconds(work, repeats=3) == {"a": 3, "b": 7}


def test_a_line_of_the_speed_table_by_hand():
    assert speed.row("fit", "PyOD", theirs=0.5, ours=0.2) == {
        "what": "fit",
        "beside": "PyOD",
        "theirs": "500 ms",
        "ours": "200 ms",
        "theirs / ours": "2.50",
    }
    assert speed.row("one row", "PyOD", 0.02, 0.01, "us", 1e6 / 200)["theirs"] == "100 us"


def test_a_table_shows_numbers_as_they_are_written():
    lines = markdown([{"what": "a", "value": "0.50"}, {"what": "b"}]).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "--" not in line] == [
        ["what", "value"],
        ["a", "0.50"],
        ["b", ""],
    ]


def test_names_of_kept_runs_have_not_changed(tmp_path):
    """Runs that users keep must be found again."""
    images = plan_of(
        [{"digits": {"parts": [8]}}], [{"Toll": {"beta": 0.0}}], ["semi-supervised"], 1, Limits(), Budget(), [], 0
    )
    rows = plan_of([{"gaussian": {"parts": ["16"]}}], ["KNN"], ["unsupervised"], 1, Limits(), Budget(), [0.01], 0)
    names = [
        Runs(tmp_path).path(label, configuration).name
        for plan in (images, rows)
        for label, configuration, _ in plan.calls()
    ]
    assert names == [
        "digits_8_semi-supervised_Toll-beta-0-_0_b8af8fa278.json",
        "gaussian_16_unsupervised_KNN_0_3e749e81ac.json",
    ]


def test_a_kept_run_is_found_as_it_was_written(tmp_path):
    """A file as earlier versions wrote it."""
    runs, configuration = Runs(tmp_path), {"class": 0, "seed": 0}
    path = runs.path("class0", configuration)
    text = json.dumps({"configuration": configuration, "weights": False, "auroc": 0.5}, indent=1) + "\n"
    path.write_text(text)
    assert runs.find("class0", configuration) == {"configuration": configuration, "weights": False, "auroc": 0.5}
    runs.keep("class0", configuration, {"auroc": 0.5})
    assert path.read_text() == text


def test_a_record_reads_as_it_was_written(tmp_path):
    record = {"table": '| "runs": null |', "runs": [{"auroc": 0.5, "runs": None}, {"auroc": 1.0}], "last": 1}
    finish(tmp_path / "record.json", record)
    text = (tmp_path / "record.json").read_text()
    assert json.loads(text) == record
    assert '\n  {"auroc": 1.0}\n' in text
