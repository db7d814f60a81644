"""The command that asks whether targeted collapse helps other detectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.io import savemat

from benchmarks.data.datasets import Limits
from benchmarks.data.tables import CHECK
from benchmarks.interfaces import Budget, Split
from benchmarks.methods.registry import build
from benchmarks.run.store import RESULTS
from benchmarks.studies.mixin import BATCH, SCORES, TABLES, make_table, mixin, scores_of
from benchmarks.studies.mixin_images import Pictures, contaminated, in_units_of
from toll_plugin.pyod import CollapsedAutoEncoder


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("mixin*.json")))
def test_the_tables_of_committed_records_are_made_of_their_runs(name):
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert _cells(make_table(record["runs"])) == _cells(record["table"])


def _cells(table):
    # Older tables have the error and the p-value of a single pair, too.
    table = table.replace(" ± nan (p nan)", "")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [line for line in lines if set("".join(line)) != {"-"}]


@pytest.fixture
def root(tmp_path):
    rng, y = np.random.default_rng(0), np.arange(160) < 20
    savemat(tmp_path / "t.mat", {"X": rng.normal(size=(160, 4)) + 6 * y[:, None], "y": y})
    return tmp_path


def test_a_small_run_pairs_each_host_with_itself(root):
    arguments = {"hosts": ("Ganomaly", "AutoEncoder"), "strengths": (1.0,), "seeds": 1, "epochs": 1, "jobs": 1}
    arguments |= {"pressures": (1.0,), "max_epochs": 5, "names": ("t",), "classes": (8,), "max_test": 100}
    mixin(roots=[root], **arguments, output=root / "mixin.json")
    record = json.loads((root / "mixin.json").read_text())
    images, tables = record["runs"][:3], record["runs"][3:]
    committed = json.loads((RESULTS / "mixin.json").read_text(encoding="utf-8"))
    (keys,) = {tuple(run) for run in images}
    assert set(keys) - set(committed["runs"][0]) == {"contamination", "weight", "auroc_in_units"}
    assert {(run["kind"], run["host"], run["data"]) for run in images} == {("image", "Ganomaly", "8")}
    assert [(run["weight"], run["strength"]) for run in images] == [(0.0, 0.0), (1.0, 1.0), ("auto", 1.0)]
    assert [(run["protocol"], run["weight"]) for run in tables] == [
        (protocol, weight) for protocol in ("semi-supervised", "unsupervised") for weight in (0.0, 0.1, "auto")
    ]
    for bare, *collapsed in (images, tables[:3], tables[3:]):
        assert all(0 < run["norm_normal"] < bare["norm_normal"] for run in collapsed)
    lines = [line[:3] for line in _cells(record["table"]) if line != [""] * len(line)]
    assert lines[1:4] == [["Ganomaly", "digits", "1"]] * 3
    assert lines[-6:] == [["AutoEncoder", run["protocol"], "1"] for run in tables]


def test_images_are_paired_by_data_and_seed_and_each_score_with_the_bare_host():
    def run(data, seed, weight, strength, auroc, contamination=0.0):
        score = {"auroc": auroc, "auroc_with_term": auroc + 0.01, "auroc_in_units": auroc + 0.02}
        norm = 2.0 if weight == 0 else 0.5
        about = {"kind": "image", "host": "Fre", "data": data, "contamination": contamination, "seed": seed}
        return about | {"weight": weight, "strength": strength, "norm_normal": norm} | score

    runs = [run("1", 0, 0.0, 0.0, 0.5), run("1", 0, 0.02, 1.0, 0.6), run("1", 0, "auto", 1.0, 0.7)]
    runs += [run("8", 0, 0.0, 0.0, 0.7), run("8", 0, 0.02, 1.0, 0.6), run("8", 0, "auto", 1.0, 0.7)]
    runs += [run("mnist 8", 0, 0.0, 0.0, 0.7, 0.1), run("part", 0, 0.0, 0.0, 0.7, 0.1)]
    _, bare, fixed, auto, mnist, part = _cells(make_table(runs))
    assert bare[:6] == ["Fre", "digits", "2", "0.600", "0", ""]
    assert bare[6].startswith("+0.0100 ± 0.0000")
    assert bare[7].startswith("+0.0200 ± 0.0000")
    # The gaps are 0.1 and -0.1, or 0.2 and 0: their deviation is 0.2 / sqrt(2).
    assert fixed[4] == "x 1"
    assert fixed[5].startswith("+0.0000 ± 0.1000")
    assert auto[4] == "auto x 1"
    assert auto[5].startswith("+0.1000 ± 0.1000")
    assert auto[7].startswith("+0.1200 ± 0.1000")
    assert auto[8] == "x 0.25"
    assert mnist[6] == part[6] == "+0.0100"  # one pair has no error
    assert [line[1] for line in (mnist, part)] == ["mnist, 10 % anomalies", "part, 10 % anomalies"]


def test_the_score_in_units_is_the_models_own():
    split = Pictures.digits(8).split(0, 32, Limits(max_train=32, max_test=20), 0.0)
    arguments = {"image_size": 32, "collapse_weight": "auto"}
    detector = build("images", "CollapsedGanomaly", Budget(1), 0, arguments)
    detector.fit(split)
    own = detector.score(split.test)
    assert own.terms.keys() == {"host"}
    detector.model.collapse_weight, detector.model.collapse_score_weight = 0.0, 1.0
    known, new = (detector.score(images).terms for images in (split.validation, split.test))
    np.testing.assert_allclose(in_units_of(known, new), own.scores, rtol=1e-4)


def test_anomalies_replace_a_share_of_the_images_to_learn_from():
    images = torch.arange(200.0).view(-1, 1, 1, 1)
    anomalous = np.repeat([False, True], [20, 80])
    split = Split(images[:60], images[60:100], images[100:], anomalous, anomalous[:, None, None])
    found = contaminated(split, 0.1, seed=0)
    train, validation, test = (set(part.flatten().tolist()) for part in found[:3])
    assert [len(part) for part in (train, validation, test)] == [60, 40, 90]
    assert [sum(value >= 120 for value in part) for part in (train, validation)] == [6, 4]
    assert not (train | validation) & test
    assert {value for value in test if value < 120} == set(range(100, 120))
    np.testing.assert_array_equal(found.anomalous, found.test.flatten().numpy() >= 120)
    np.testing.assert_array_equal(found.masks[:, 0, 0], found.anomalous)
    same = contaminated(split, 0.0, seed=0)
    assert all(torch.equal(*pair) for pair in zip(same[:3], split[:3], strict=True))
    for share in (0.5, 1.0):
        with pytest.raises(ValueError, match="contamination must be below 1 and leave half of the 80 anomalies"):
            contaminated(split, share, seed=0)


def test_hosts_run_on_digits_mnist_and_folders(mvtec_root, monkeypatch, tmp_path):
    calls = []

    def note(_, found, *__):
        calls.extend(found)
        return [
            {
                "kind": "image",
                "host": call[0],
                "data": call[1],
                "seed": 0,
                "weight": 0.0,
                "strength": 0.0,
                "auroc": 0.5,
                "norm_normal": 1.0,
            }
            for call in found
        ]

    monkeypatch.setattr("benchmarks.studies.mixin.run_all", note)
    only = {"strengths": (), "pressures": (), "seeds": 1, "classes": (3,), "mnist": (8,), "contamination": 0.25}
    mixin(hosts=("Fre", "Draem"), folders=[mvtec_root / "part"], **only, max_test=8, output=tmp_path / "mixin.json")
    found = [call[:6] for call in calls]
    arm = (0, False, 0.0, 0.25)
    assert found == [
        (host, data, *arm)
        for host, data in (("Fre", "3"), ("Fre", "mnist 8"), ("Fre", "part"), ("Draem", "3"), ("Draem", "mnist 8"))
    ]
    split = calls[2][6]()
    assert split.train.shape == (10, 3, 128, 128)
    assert len(split.test) == 8 - 2


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
