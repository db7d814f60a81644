"""The command that asks whether targeted collapse helps other detectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.io import savemat

from benchmarks.data.tables import CHECK
from benchmarks.run.store import RESULTS
from benchmarks.studies.mixin import BATCH, SCORES, TABLES, make_table, mixin, scores_of
from toll_plugin.pyod import CollapsedAutoEncoder


@pytest.mark.parametrize("name", ["mixin", "mixin_ganomaly", "mixin_tables"])
def test_the_tables_of_committed_records_are_made_of_their_runs(name):
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert _cells(make_table(record["runs"])) == _cells(record["table"])


def _cells(table):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [line for line in lines if set("".join(line)) != {"-"}]


@pytest.fixture
def root(tmp_path):
    rng, y = np.random.default_rng(0), np.arange(160) < 20
    savemat(tmp_path / "t.mat", {"X": rng.normal(size=(160, 4)) + 6 * y[:, None], "y": y})
    return tmp_path


def test_a_small_run_pairs_each_host_with_itself(root):
    arguments = {"hosts": ("Ganomaly", "AutoEncoder"), "strengths": (1.0,), "seeds": 1, "epochs": 1, "jobs": 1}
    arguments |= {"pressures": (1.0,), "max_epochs": 5, "names": ("t",), "classes": (8,)}
    mixin(roots=[root], **arguments, output=root / "mixin.json")
    record = json.loads((root / "mixin.json").read_text())
    images, tables = record["runs"][:2], record["runs"][2:]
    committed = json.loads((RESULTS / "mixin.json").read_text(encoding="utf-8"))
    assert {tuple(run) for run in images} == {tuple(committed["runs"][0])}
    found = [(run["kind"], run["host"], run["data"], run["strength"]) for run in images]
    assert found == [("image", "Ganomaly", "8", 0.0), ("image", "Ganomaly", "8", 1.0)]
    assert [(run["protocol"], run["weight"]) for run in tables] == [
        (protocol, weight) for protocol in ("semi-supervised", "unsupervised") for weight in (0.0, 0.1, "auto")
    ]
    for bare, *collapsed in (images, tables[:3], tables[3:]):
        assert all(0 < run["norm_normal"] < bare["norm_normal"] for run in collapsed)
    lines = [line[:3] for line in _cells(record["table"]) if line != [""] * len(line)]
    assert lines[1] == ["Ganomaly", "digits", "1"]
    assert lines[-6:] == [["AutoEncoder", run["protocol"], "1"] for run in tables]


def test_tables_are_paired_by_table_with_seeds_averaged_first():
    def run(data, seed, weight, auroc):
        return {
            "host": "VAE",
            "data": data,
            "protocol": "unsupervised",
            "seed": seed,
            "weight": weight,
            "strength": 1.0,
            "auroc": auroc,
            **{f"auroc_{name}": auroc + 0.01 for name in SCORES},
        }

    runs = [run("a", 0, 0.0, 0.5), run("a", 1, 0.0, 0.6), run("b", 0, 0.0, 0.7), run("b", 1, 0.0, 0.8)]
    runs += [run("a", 0, "auto", 0.6), run("a", 1, "auto", 0.8), run("b", 0, "auto", 0.7), run("b", 1, "auto", 0.9)]
    _, none, auto = _cells(make_table(runs))
    # The gaps of a are 0.1 and 0.2, of b 0 and 0.1: 0.15 and 0.05, whose deviation is 0.1 / sqrt(2).
    assert auto[:5] == ["VAE", "unsupervised", "2", "0.650", "auto x 1"]
    assert auto[5].startswith("+0.1000 ± 0.0500")
    assert auto[6].startswith("+0.1100 ± 0.0500")
    assert none[4:6] == ["0", ""]
    assert none[6].startswith("+0.0100 ± 0.0000")


def test_the_mahalanobis_score_is_the_detectors_own():
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(80, 4)), rng.normal(size=(9, 4))
    detector = CollapsedAutoEncoder(collapse_weight="auto", epoch_num=2, batch_size=16).fit(x)
    own = detector.decision_function(new)
    detector.set_params(collapse_score_weight=0.0)
    found = []
    for rows in (x, new):
        with detector.collapse.watch(detector) as latent:
            scores = detector.decision_function(rows)
        found += [scores, np.concatenate([one.output.detach().double().numpy() for one in latent.passes])]
    scores = scores_of(*found, weight=0.1)
    assert scores.keys() == SCORES.keys()
    np.testing.assert_allclose(scores["mahalanobis"], own, rtol=1e-6)
    np.testing.assert_allclose(scores["sum"], found[2] + 0.1 * np.sqrt((found[3] ** 2).sum(axis=1)))
    norms = [np.sqrt((latents**2).sum(axis=1)) for latents in found[1::2]]
    expected = found[2] / np.median(found[0]) + 0.5 * norms[1] / np.median(norms[0])
    np.testing.assert_allclose(scores["plain"], expected)


def test_defaults_are_not_chosen_by_tables_kept_for_the_check():
    assert not {name.split("_", 1)[-1].lower() for name in TABLES} & set(CHECK)
    assert len(set(TABLES)) == 20


def test_unknown_protocols_are_refused(tmp_path):
    with pytest.raises(ValueError, match="protocols must be one of 'semi-supervised', 'unsupervised', got 'bootstrap'"):
        mixin(protocols=("bootstrap",), output=tmp_path / "mixin.json")


@pytest.mark.parametrize("protocol", ["semi-supervised", "unsupervised"])
def test_no_row_is_alone_in_a_batch(protocol, root):
    rng, y = np.random.default_rng(0), np.arange(97) < 32  # 65 to test on, or 97
    savemat(root / "t.mat", {"X": rng.normal(size=(97, 4)), "y": y})
    arguments = {"hosts": ("AE1SVM",), "names": ("t",), "protocols": (protocol,), "pressures": ()}
    mixin(roots=[root], **arguments, seeds=1, max_epochs=1, jobs=1, output=root / "mixin.json")
    assert 97 % BATCH == 1
    assert len(json.loads((root / "mixin.json").read_text())["runs"]) == 2
