"""Every block of the guide to large tables runs, in its order; those of engines that are not installed are skipped."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from page_blocks import ROOT, blocks

pytest.importorskip("pyarrow")
pytest.importorskip("distributed")

GUIDE = "toll_plugin/pyod/scale/README.md"
OWN, ENGINES = {"toll_plugin", "dask", "distributed", "pandas"}, ("pyspark", "ray", "mlflow")


def engine(code: str) -> str | None:
    return next((name for name in ENGINES if f"import {name}" in code or f"from {name}" in code), None)


def run(code: str, names: dict) -> None:
    # Threads do for workers, since test_scale_parquet.py has processes, which import everything anew.
    code = code.replace("LocalCluster(", "LocalCluster(processes=False, ")
    exec(compile(code, "<block>", "exec"), names)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 4)), columns=list("abcd"))
    rows.to_csv(folder / "sensors.csv", index=False)
    (folder / "sensors").mkdir()
    rows = rows.assign(id=np.arange(200))
    for i in range(2):
        rows[100 * i : 100 * i + 100].to_parquet(folder / f"sensors/{i}.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def names(place):
    """What the blocks without another engine leave behind."""
    found = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for _, code in blocks(GUIDE):
            if engine(code) is None:
                run(code, found)
    return found


@pytest.fixture
def scores(names, place):
    """By row, as one process writes them."""
    assert "found" in names
    return pd.read_parquet(place / "scores").set_index("id")["score"].sort_index()


def test_the_guide_runs_and_both_ways_to_score_agree(names, place, scores):
    found = names["found"]
    assert (found.rows, found.flagged) == (200, 0)
    rows = pd.read_parquet(place / "sensors")
    np.testing.assert_array_equal(scores, names["detector"].decision_function(rows[list("abcd")]))
    assert (place / "scores_of_two/part-000001.parquet").read_bytes() == (
        place / "scores/part-000001.parquet"
    ).read_bytes()
    assert names["stream"].decision_scores_.shape == (50,)


@pytest.mark.parametrize("name", ENGINES)
def test_other_engines_give_the_same_bits(name, names, place, scores, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.chdir(place)
    (code,) = (code for _, code in blocks(GUIDE) if engine(code) == name)
    run(code, names)
    if name == "mlflow":
        batch = pd.read_parquet(place / "sensors/0.parquet")
        found = names["mlflow"].pyfunc.load_model("model").predict(batch)
    else:
        found = pd.read_parquet(place / f"scores_of_{name.removeprefix('py')}")
    found = found.set_index("id")["score"].sort_index()
    np.testing.assert_array_equal(found, scores[found.index])
    assert len(found) == (100 if name == "mlflow" else 200)


def test_links_of_the_guide_lead_somewhere():
    assert ((ROOT / GUIDE).parent / "../../../benchmarks/results/costs.md").exists()
    assert "## Tables that do not fit in memory" in (ROOT / "benchmarks/report/pages/costs.md").read_text()
