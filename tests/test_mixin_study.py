"""The command that asks whether targeted collapse helps other detectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.io import savemat

from benchmarks.run.store import RESULTS
from benchmarks.studies.mixin import make_table, mixin


@pytest.mark.parametrize("name", ["mixin", "mixin_ganomaly"])
def test_the_tables_of_committed_records_are_made_of_their_runs(name):
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert _cells(make_table(record["runs"])) == _cells(record["table"])


def _cells(table):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [line for line in lines if set("".join(line)) != {"-"}]


def test_a_small_run_pairs_each_host_with_itself(tmp_path):
    rng, y = np.random.default_rng(0), np.arange(160) < 20
    savemat(tmp_path / "t.mat", {"X": rng.normal(size=(160, 4)) + 6 * y[:, None], "y": y})
    arguments = {"hosts": ("Ganomaly", "AutoEncoder"), "strengths": (1.0,), "seeds": 1, "epochs": 1, "jobs": 1}
    mixin(roots=[tmp_path], names=("t",), classes=(8,), output=tmp_path / "mixin.json", **arguments)
    record = json.loads((tmp_path / "mixin.json").read_text())
    committed = json.loads((RESULTS / "mixin.json").read_text(encoding="utf-8"))
    assert {tuple(run) for run in record["runs"]} == {tuple(committed["runs"][0])}
    found = [(run["kind"], run["host"], run["data"], run["strength"]) for run in record["runs"]]
    assert found == [
        ("image", "Ganomaly", "8", 0.0),
        ("image", "Ganomaly", "8", 1.0),
        ("table", "AutoEncoder", "t", 0.0),
        ("table", "AutoEncoder", "t", 1.0),
    ]
    for bare, collapsed in (record["runs"][:2], record["runs"][2:]):
        assert 0 < collapsed["norm_normal"] < bare["norm_normal"]
    assert [line[:3] for line in _cells(record["table"])[1:]] == [
        ["Ganomaly", "digits", "1"],
        ["AutoEncoder", "tables", "1"],
    ]
