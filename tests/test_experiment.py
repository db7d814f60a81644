"""Experiments: data sets, methods, what is measured, and runs that go on where they were."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from image_files import write_mnist
from PIL import Image
from scipy.io import savemat

from benchmarks.data.datasets import DATASETS, PROTOCOLS, Limits
from benchmarks.data.tables import copied, find_table, halves
from benchmarks.interfaces import Budget, Detector, Scored, Split
from benchmarks.methods.registry import METHODS, build
from benchmarks.methods.tables import DETERMINISTIC, PYOD, TableDetector
from benchmarks.run import evaluate, experiment
from benchmarks.run.experiment import EXPERIMENTS, run, with_experiment
from benchmarks.run.metrics import DRAWS, image_metrics, pixel_metrics, rare, spliced
from benchmarks.run.plan import Plan, plan_of


def split_of(name, part, protocol=PROTOCOLS[0], seed=0, limits=None, **arguments):
    return DATASETS[name].split(arguments, part, protocol, seed, limits or Limits())


# -- data sets -----------------------------------------------------------------------------------


def test_halves_train_on_normal_rows_only():
    x, y = np.arange(30.0)[:, None], (np.arange(30) < 10).astype(int)
    train, test, labels = halves(x, y, seed=0)
    assert len(train) == 10
    assert (train >= 10).all()
    assert sorted(np.concatenate([train, test]).ravel()) == list(range(30))
    np.testing.assert_array_equal(labels, test.ravel() < 10)


@pytest.fixture
def odds(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(60) < 10
    savemat(tmp_path / "t.mat", {"X": rng.normal(size=(60, 4)) + 6 * y[:, None], "y": y})
    return tmp_path


def test_protocols_of_a_table(odds):
    normal = split_of("odds", "t", root=odds)
    assert (len(normal.train), len(normal.validation), len(normal.test), normal.anomalous.sum()) == (25, 0, 35, 10)
    everything = split_of("odds", "t", "unsupervised", root=odds)
    assert torch.equal(everything.train, everything.test)
    assert everything.anomalous.sum() == 10
    held_out = split_of("odds", "t", limits=Limits(validation_rows=0.2), root=odds)
    assert (len(held_out.train), len(held_out.validation)) == (20, 5)
    assert len(split_of("odds", "t", "unsupervised", limits=Limits(max_rows=30), root=odds).train) == 30


@pytest.fixture
def adbench(tmp_path):
    """A folder like ADBench's, with two tables; every row is another."""
    draw = np.random.default_rng(0)
    for name, rows in (("1_few", 60), ("2_many", 1200)):
        y = np.arange(rows) % 6 == 0
        np.savez(tmp_path / f"{name}.npz", X=draw.normal(size=(rows, 3)) + 3 * y[:, None], y=y.astype(int))
    savemat(tmp_path / "3_old.mat", {"X": draw.normal(size=(40, 3)), "y": np.arange(40) < 5})
    return tmp_path


def test_the_common_protocol_copies_test_rows_of_small_tables(adbench):
    assert DATASETS["adbench"].parts({"root": adbench}) == ["1_few", "2_many", "3_old"]
    rows = np.load(adbench / "1_few.npz")["X"]
    leaking = split_of("adbench", "1_few", "bootstrap", root=adbench)
    assert len(leaking.train) + len(leaking.test) == 1000
    assert (~leaking.anomalous).sum() == pytest.approx(len(leaking.train), abs=1)
    assert {row.tobytes() for row in leaking.test.numpy()} <= {row.tobytes() for row in rows}
    # Each of 50 normal rows is drawn about 8 times into each half: nearly every test row is known.
    assert copied(leaking.train.numpy(), leaking.test.numpy())[~leaking.anomalous].mean() > 0.95
    assert not copied(leaking.train.numpy(), leaking.test.numpy())[leaking.anomalous].any()
    other = split_of("adbench", "1_few", "bootstrap", seed=1, root=adbench)
    assert other.train.shape != leaking.train.shape or not torch.equal(other.train, leaking.train)
    clean = split_of("adbench", "1_few", root=adbench)
    assert not copied(clean.train.numpy(), clean.test.numpy()).any()


def test_the_common_protocol_splits_larger_tables_in_their_order(adbench):
    table = np.load(adbench / "2_many.npz")
    normal = table["X"][table["y"] == 0]
    for seed in (0, 1):
        split = split_of("adbench", "2_many", "bootstrap", seed, root=adbench)
        np.testing.assert_array_equal(split.train, normal[:500])
        np.testing.assert_array_equal(split.test, np.concatenate([normal[500:], table["X"][table["y"] == 1]]))
        np.testing.assert_array_equal(split.anomalous, np.arange(700) >= 500)


def test_copies_by_hand():
    train = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert copied(train, np.array([[3.0, 4.0], [3.0, 2.0], [1.0, 2.0]])).tolist() == [True, False, True]


def test_adbench_without_and_with_copies(adbench):
    given = {"datasets": [{"adbench": {"root": str(adbench)}}], "methods": ["KNN", "PCA"]}
    record = small(adbench, adbench, **given, protocols=["semi-supervised", "bootstrap"])
    assert len(record["runs"]) == 2 * 2 * 3
    found = {(c["protocol"], c["part"]): r["samples"]["copied"] for r in record["runs"] for c in [r["configuration"]]}
    assert {part: n for (protocol, part), n in found.items() if protocol == "semi-supervised"} == {
        "1_few": 0,
        "2_many": 0,
        "3_old": 0,
    }
    assert found["bootstrap", "2_many"] == 0
    assert min(found["bootstrap", "1_few"], found["bootstrap", "3_old"]) > 400
    assert "**adbench, bootstrap: copies of test rows of small tables among the training rows**" in record["table"]


def test_parts_of_the_digits_do_not_meet():
    split = split_of("digits", "8")
    flat = [{image.numpy().tobytes() for image in part} for part in split[:3]]
    assert not flat[0] & flat[2]
    assert not flat[0] & flat[1]
    assert 0 < (~split.anomalous).sum() < 50 < split.anomalous.sum()
    assert split.train.shape[1:] == (1, 8, 8)


def test_image_sets_are_drawn_down_without_looking_at_labels(tmp_path):
    write_mnist(tmp_path)
    assert DATASETS["mnist"].parts({"root": tmp_path}) == [str(c) for c in range(10)]
    whole = split_of("mnist", "3", root=tmp_path)
    few = split_of("mnist", "3", limits=Limits(max_train=4, max_test=20), root=tmp_path)
    assert whole.train.dtype == torch.uint8
    assert (len(few.train), len(few.test), len(few.anomalous)) == (4, 20, 20)
    # Images of class c are noise around 20 c.
    assert few.train.float().mean() == pytest.approx(69.5, abs=2)
    classes = (few.test.float().mean(dim=(1, 2, 3)) - 9.5).div(20).round()
    np.testing.assert_array_equal(classes.numpy() != 3, few.anomalous)


def test_a_folder_in_mvtecs_layout(mvtec_root):
    assert DATASETS["mvtec"].parts({"root": mvtec_root}) == ["part"]
    assert DATASETS["mvtec"].parts({"root": mvtec_root / "part"}) == ["part"]
    for root in (mvtec_root, mvtec_root / "part"):
        split = split_of("mvtec", "part", root=root, image_size=32)
        assert [tuple(part.shape) for part in split[:3]] == [(10, 3, 32, 32), (2, 3, 32, 32), (8, 3, 32, 32)]
        # The spot is where the mask is.
        bright = split.test.float().mean(dim=1).numpy() > 220
        assert split.masks[split.anomalous].any(axis=(1, 2)).all()
        assert not split.masks[~split.anomalous].any()
        assert (bright & split.masks).sum() > 0.7 * bright.sum() > 0
    with pytest.raises(FileNotFoundError, match="root must hold train/good"):
        DATASETS["mvtec"].parts({"root": mvtec_root / "part/test"})


def test_one_model_for_all_parts_of_a_folder(tmp_path, mvtec_root):
    for name, kept in (("part", 12), ("other", 6)):
        shutil.copytree(mvtec_root / "part", tmp_path / name)
        for path in sorted((tmp_path / name / "train/good").iterdir())[kept:]:
            path.unlink()
    alone = [split_of("mvtec", name, root=tmp_path, image_size=32) for name in ("other", "part")]
    joined = split_of("mvtec", "part", root=tmp_path, image_size=32, joined=True)
    for name in ("train", "validation"):
        expected = torch.cat([getattr(split, name) for split in alone]).flatten(1)
        found = getattr(joined, name).flatten(1)
        assert sorted(found.tolist()) == sorted(expected.tolist())  # drawn in another order
    assert torch.equal(joined.test, alone[1].test)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_of_ones_own(tmp_path, suffix):
    frame = pd.DataFrame({"a": [0.5, 1, 2, 3, 9], "b": range(5), "bad": [0, 0, 0, 0, 1]})
    path = tmp_path / f"sensors.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    assert DATASETS["file"].parts({"path": str(path)}) == ["sensors"]
    split = split_of("file", "sensors", "unsupervised", path=str(path), label="bad")
    np.testing.assert_array_equal(split.train.numpy(), frame[["a", "b"]].to_numpy())
    assert split.anomalous.tolist() == [False] * 4 + [True]
    with pytest.raises(ValueError, match=r"label must name a column .*, got 'label'"):
        split_of("file", "sensors", path=str(path))
    with pytest.raises(ValueError, match="must hold 1 for an anomaly"):
        split_of("file", "sensors", path=str(path), label="b")


def test_a_file_with_words_is_refused(tmp_path):
    pd.DataFrame({"a": ["x", "y"], "label": [0, 1]}).to_csv(tmp_path / "w.csv", index=False)
    with pytest.raises(ValueError, match="must be numbers, got 'a'"):
        split_of("file", "w", path=str(tmp_path / "w.csv"))
    frame = pd.DataFrame({"a": [1.0, np.nan], "label": [0, 1]})
    frame.to_csv(tmp_path / "index.csv")
    with pytest.raises(ValueError, match="a row number is no feature"):
        split_of("file", "index", path=str(tmp_path / "index.csv"))
    with pytest.raises(ValueError, match="got nan in column 'a', row 1"):
        split_of("file", "index", path=str(tmp_path / "index.csv"), drop=["Unnamed: 0"])
    with pytest.raises(ValueError, match="needs a path"):
        DATASETS["file"].parts({})


def _folder(tmp_path, mvtec_root, suffix=".png"):
    """The part with images of another kind, and its masks."""
    for path in (mvtec_root / "part").rglob("*.png"):
        to = tmp_path / "part" / path.relative_to(mvtec_root / "part")
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.save(to if "ground_truth" in path.parts else to.with_suffix(suffix))
    return tmp_path / "part"


@pytest.mark.parametrize("suffix", [".jpg", ".BMP"])
def test_a_folder_without_masks_and_with_other_files(tmp_path, mvtec_root, suffix):
    folder = _folder(tmp_path, mvtec_root, suffix)
    assert split_of("mvtec", "part", root=folder, image_size=32).masks is not None
    (folder / "ground_truth/spot/000_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"each must have a mask in ground_truth, got none for .*000{suffix}"):
        split_of("mvtec", "part", root=folder, image_size=32)
    shutil.rmtree(folder / "ground_truth")
    split = split_of("mvtec", "part", root=folder, image_size=32)
    assert split.masks is None
    assert split.anomalous.sum() == 4
    with pytest.raises(ValueError, match="a part of mvtec must be one of 'part', got 'screw'"):
        split_of("mvtec", "screw", root=folder)


def test_images_of_16_bits_are_scaled_and_masks_stay_whole(tmp_path, mvtec_root):
    folder = _folder(tmp_path, mvtec_root)
    as_it_was = split_of("mvtec", "part", root=folder, image_size=32)
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
        if "ground_truth" in path.parts:
            Image.fromarray((grey > 0).astype(np.uint8)).save(path)  # 0 and 1 instead of 0 and 255
        else:
            Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    split = split_of("mvtec", "part", root=folder, image_size=32)
    np.testing.assert_array_equal(split.masks, as_it_was.masks)
    assert (split.test.int() - as_it_was.test.int()).abs().max() <= 1


def test_rows_that_are_held_out_are_drawn(tmp_path):
    """Files are often sorted by label."""
    savemat(tmp_path / "t.mat", {"X": np.arange(100.0)[:, None], "y": np.arange(100) < 20})
    split = split_of("odds", "t", "unsupervised", limits=Limits(validation_rows=0.2), root=tmp_path)
    assert 0 < (split.validation < 20).sum() < 15
    assert sorted(torch.cat([split.validation, split.train]).ravel().tolist()) == list(range(100))


def test_missing_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no other\.mat or other\.npz in"):
        find_table("other", [tmp_path])
    with pytest.raises(FileNotFoundError, match=r"no \.mat or \.npz table in"):
        DATASETS["adbench"].parts({"root": tmp_path})


def test_made_rows_hide_anomalies_from_single_columns():
    split = split_of("gaussian", "64+16", "unsupervised")
    x, bad = split.train.numpy(), split.anomalous
    assert x.shape[1] == 80
    # No column's mean or spread tells them; the distance to the span of normal rows does.
    assert np.abs(x[bad].mean(axis=0) - x[~bad].mean(axis=0)).max() < 0.5
    _, _, axes = np.linalg.svd(x[~bad][:, :64], full_matrices=False)
    far = np.linalg.norm(x[:, :64] @ axes[12:].T, axis=1)
    assert image_metrics(bad, far)["auroc"] > 0.9


# -- metrics -------------------------------------------------------------------------------------

BAD = np.array([False, False, True, True])


def test_metrics_by_hand():
    # Ranked 0.9 bad, 0.8 normal, 0.7 bad, 0.1 normal.
    found = image_metrics(BAD, np.array([0.1, 0.8, 0.7, 0.9]))
    assert found["auroc"] == pytest.approx(3 / 4)
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["f1"] == pytest.approx(1 / 2)


def test_pixel_metrics_of_a_perfect_and_of_an_even_map():
    masks = np.zeros((2, 8, 8), bool)
    masks[1, 2:4, 2:4] = True
    assert pixel_metrics(masks, masks.astype(float)) == {"pixel_auroc": 1.0, "pro": pytest.approx(1.0)}
    # Scores outside [0, 1] are no logits, and a small map is enlarged.
    assert pixel_metrics(masks, 50 + 100 * masks)["pixel_auroc"] == 1.0
    assert pixel_metrics(masks, np.ones((2, 4, 4)))["pixel_auroc"] == pytest.approx(0.5)


def test_rare_anomalies_by_hand():
    bad, scores = np.arange(120) >= 100, np.arange(120.0)
    found = rare(bad, scores, 0.01, seed=0)
    assert (found["auroc"], found["average_precision"], found["precision_at_top"]) == (1, 1, 1)
    # Half of the anomalies score below everything: with one drawn, precision at the top is a half on average.
    scores[110:] = -1
    found = rare(bad, scores, 0.01, seed=0)
    assert found["precision_at_top"] == pytest.approx(0.5, abs=0.35)
    assert found["precision_at_top"] * DRAWS == pytest.approx(round(found["precision_at_top"] * DRAWS))
    assert rare(bad, scores, 0.001, seed=0) is None
    assert rare(bad, scores, 0.5, seed=0) is None


class Distance(Detector):
    """The norm of a sample's distance from the training mean."""

    def fit(self, split):
        self.mean = split.train.mean(dim=0)

    def score(self, samples):
        norms = (samples - self.mean).flatten(1).norm(dim=1).double().numpy()
        return Scored(norms, {"latent": norms}, (samples - self.mean).abs().mean(dim=1).numpy())

    def size(self):
        return 8 * self.mean.numel()

    def facts(self):
        return {"epochs": 0}


def images_split():
    draw = torch.Generator().manual_seed(0)
    train, validation = torch.rand(20, 1, 8, 8, generator=draw) / 4, torch.rand(6, 1, 8, 8, generator=draw) / 4
    test = torch.rand(10, 1, 8, 8, generator=draw) / 4
    bad = np.arange(10) >= 6
    test[6:, :, :4, :4] += 0.6
    masks = np.zeros((10, 8, 8), bool)
    masks[6:, :4, :4] = True
    return Split(train, validation, test, bad, masks)


def test_what_is_measured_of_a_run():
    found = evaluate.evaluate(Distance(), images_split(), 0, rates=(0.2, 0.9), examples=2)
    assert found["metrics"] == {"auroc": 1, "average_precision": 1, "f1": 1, "pixel_auroc": 1, "pro": pytest.approx(1)}
    assert found["term_auroc"] == {"latent": 1.0}
    assert [entry["rate"] for entry in found["rare"]] == [0.2]
    assert 0 <= found["spliced_auroc"] <= 1
    assert found["model_mb"] == pytest.approx(64 * 8 / 1e6)
    assert found["samples"] == {"train": 20, "validation": 6, "test": 10, "anomalies": 4}
    assert found["roc"][0] >= 0
    assert found["roc"][-1] == 1
    assert len(found["roc"]) == 51
    assert sum(found["latent_norms"]["normal"]) == 6
    assert sum(found["latent_norms"]["anomalous"]) == 4
    assert [example["anomalous"] for example in found["examples"]] == [True, True, False]
    assert found["facts"] == {"epochs": 0}
    json.dumps(found, allow_nan=False)


def test_scores_that_cannot_be_ranked_are_an_error():
    class Broken(Distance):
        def score(self, samples):
            scores = super().score(samples).scores
            scores[0] = np.nan
            return Scored(scores)

    with pytest.raises(FloatingPointError, match="1 of 10 scores are not a number"):
        evaluate.evaluate(Broken(), images_split(), 0)
    split = images_split()
    with pytest.raises(ValueError, match="must hold normal and anomalous samples, got 0 anomalies of 10"):
        evaluate.evaluate(Distance(), split._replace(anomalous=np.zeros(10, bool)), 0)


def test_infinite_scores_are_ranked():
    class Far(Distance):
        def score(self, samples):
            scores = super().score(samples).scores
            return Scored(np.where(scores > 2, np.inf, scores))

    assert evaluate.evaluate(Far(), images_split(), 0)["metrics"]["auroc"] == 1


def test_spliced_samples_need_held_out_ones():
    split = images_split()
    detector = Distance()
    detector.fit(split)
    assert spliced(detector, split.validation[:1]) is None


# -- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TollDetector", "KNN", "IForest"])
def test_table_methods(odds, name):
    split = split_of("odds", "t", root=odds)
    given = {"max_steps": 50} if name == "TollDetector" else {}
    first, again = (build("table", name, Budget(), 3, given) for _ in range(2))
    for detector in (first, again):
        detector.fit(split)
    found = first.score(split.test)
    np.testing.assert_array_equal(found.scores, again.score(split.test).scores)
    assert image_metrics(split.anomalous, found.scores)["auroc"] > 0.9
    assert first.size() > 0
    if name == "TollDetector":
        # Each term is its share of the score.
        np.testing.assert_allclose(found.scores, found.terms["reconstruction"] + found.terms["latent"])


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_the_term_of_collapsed_detectors_joins_their_hosts_score(odds, weight):
    split = split_of("odds", "t", root=odds)
    given = {"epoch_num": 2, "batch_size": 8, "collapse_weight": 0.5, "collapse_score_weight": weight}
    detector = build("table", "CollapsedAutoEncoder", Budget(), 0, given)
    detector.fit(split)
    found = detector.score(split.test)
    assert set(found.terms) == ({"host", "latent"} if weight else {"host"})
    if weight:
        np.testing.assert_allclose(found.terms["host"] + weight * found.terms["latent"], found.scores)
        rows = torch.from_numpy(detector._scaler.transform(split.test.numpy())).float()
        with torch.no_grad():
            norms = detector.model.model.eval().encoder(rows).norm(dim=1)
        np.testing.assert_allclose(found.terms["latent"], norms, rtol=1e-4)
    assert detector.model.collapse_score_weight == weight  # as it was before scoring
    assert detector.model.collapse_weight == 0.5


@pytest.mark.parametrize("name", ["AutoEncoder", "VAE", "LUNAR", "DIF", "DeepSVDD", "ALAD"])
def test_seeds_reach_detectors_that_train_networks(odds, name):
    split = split_of("odds", "t", root=odds)
    few = {"epoch_num": 1, "batch_size": 8}
    short = {"AutoEncoder": few, "VAE": few, "LUNAR": {"n_epochs": 1}, "ALAD": {"epochs": 1}}
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = []
    for seed in (0, 0, 1):
        detector = build("table", name, Budget(), seed, short.get(name, {}))
        detector.fit(split)
        found.append(detector.score(split.test).scores)
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_a_score_without_the_latent_has_no_latent_term(odds):
    detector = build("table", "TollDetector", Budget(), 0, {"beta": 0.0, "score_scale": "none", "max_steps": 20})
    split = split_of("odds", "t", root=odds)
    detector.fit(split)
    assert set(detector.score(split.test).terms) == {"reconstruction"}


@pytest.mark.parametrize("name", [name for name in PYOD if name not in ("AutoEncoder", "VAE", "LUNAR", "DIF", "ALAD")])
def test_which_detectors_draw(name):
    """The others, which train networks, are tested above."""
    split = split_of("gaussian", "16", rows=80)
    found = []
    for seed in (0, 1):
        detector = build("table", name, Budget(), seed, {"epochs": 1} if name == "DeepSVDD" else {})
        detector.fit(split)
        found.append(detector.score(split.test).scores)
    assert np.array_equal(*found) == (name in DETERMINISTIC)


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        ("table", "IForest", {"random_state": 5}),
        ("images", "PaDiM", {"pre_trained": False}),
        ("images", "Toll", {"seed": 1}),
    ],
)
def test_what_the_experiment_sets_is_no_argument(kind, name, arguments):
    argument = next(iter(arguments))
    with pytest.raises(ValueError, match=f"{argument} of {name} is set by the experiment, .*, got"):
        build(kind, name, Budget(), 0, arguments)


def test_classic_detectors_see_the_pixels_of_images():
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    detector = TableDetector("KNN", Budget(), 0)
    detector.fit(Split(images, images[:0], images, np.zeros(30, bool)))
    rows = images.flatten(1).double() / 255
    fifth = torch.cdist(rows[:1], rows).topk(5, largest=False)[0][
        0, 4
    ]  # PyOD's KNN takes the largest of five, itself among them
    assert detector.score(images[:1]).scores[0] == pytest.approx(float(fifth))


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"methods for table are TollDetector, KNN, .*, got 'Toll'"):
        build("table", "Toll", Budget(), 0, {})


# -- experiments ---------------------------------------------------------------------------------


def small(tmp_path, odds, **given):
    arguments = {
        "datasets": [{"odds": {"root": str(odds)}}],
        "methods": ["KNN", {"KNN": {"n_neighbors": 2}}],
        "seeds": 1,
        "runs": tmp_path / "kept",
        "output": tmp_path / "out.json",
        "page": tmp_path / "page.html",
    }
    run(name="small", **arguments | given)
    return json.loads((tmp_path / "out.json").read_text())


def test_an_experiment_ends_in_a_record_and_a_page(tmp_path, odds, capsys):
    record = small(tmp_path, odds)
    assert {"commit", "dirty", "date", "packages", "cores", "command"} <= set(record)
    assert [r["configuration"]["label"] for r in record["runs"]] == ["KNN", "KNN (n_neighbors=2)"]
    assert record["table"] in capsys.readouterr().out
    assert "KNN (n_neighbors=2)" in (tmp_path / "page.html").read_text()
    assert str(tmp_path) not in json.dumps([r for r in record["runs"] if r.pop("configuration")])


def test_restarts_are_other_initial_weights_on_the_same_split(tmp_path, odds, monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.methods.registry.build", lambda *given: seen.append(given[3]) or build(*given))
    methods = ["KNN", {"IForest": {"n_estimators": 5}, "as": "few trees"}]
    record = small(tmp_path, odds, methods=methods, seeds=2, restarts=2)
    found = [(c["label"], c["seed"], c.get("restart")) for c in (r["configuration"] for r in record["runs"])]
    assert found == [
        ("KNN", 0, None),
        ("few trees", 0, None),
        ("few trees", 0, 1),
        ("KNN", 1, None),
        ("few trees", 1, None),
        ("few trees", 1, 1),
    ]
    assert seen == [0, 0, 1000, 1, 1, 1001]
    scores = {key: r["roc"] for key, r in zip(found, record["runs"], strict=True)}
    assert record["runs"][0]["samples"] == record["runs"][2]["samples"]
    assert len(scores) == 6
    assert record["table"].startswith("**odds, semi-supervised** (2 methods, 1 part, 2 seeds, 2 restarts, 6 runs)")


@pytest.mark.parametrize(("seeds", "restarts"), [(1, 3), (3, 1)])
def test_all_rows_have_no_split_to_repeat(seeds, restarts):
    def cells(**limits):
        given = [{"gaussian": {"parts": ["16"]}}], ["KNN", "IForest"], ["unsupervised"], seeds
        plan = plan_of(*given, Limits(**limits), Budget(), [], 0, restarts)
        return [(c["label"], c["seed"], c.get("restart", 0)) for _, c, _ in plan.calls()]

    assert cells() == [("KNN", 0, 0), ("IForest", 0, 0), ("IForest", 1, 0), ("IForest", 2, 0)]
    # Rows that are held out are drawn by the seed.
    held_out = cells(validation_rows=0.2)
    assert [cell for cell in held_out if cell[0] == "KNN"] == [("KNN", seed, 0) for seed in range(seeds)]
    assert len(held_out) == seeds + seeds * restarts


def test_finished_runs_are_shared_and_not_run_again(tmp_path, odds, capsys, monkeypatch):
    first = small(tmp_path, odds)
    monkeypatch.setattr(experiment, "_run", None)  # nothing may be run
    again = small(tmp_path, odds)
    assert "2 of 2 runs are in" in capsys.readouterr().out
    for one, other in zip(again["runs"], first["runs"], strict=True):
        assert one | {"provenance": None} == other | {"provenance": None}


def test_changed_files_are_run_again(tmp_path, odds, capsys):
    small(tmp_path, odds)
    savemat(odds / "t.mat", {"X": np.random.default_rng(1).normal(size=(60, 4)), "y": np.arange(60) < 10})
    small(tmp_path, odds)
    assert "runs are in" not in capsys.readouterr().out


def test_a_failed_run_is_recorded_and_tried_again(tmp_path, odds, capsys):
    broken = [{"KNN": {"n_neighbors": 1000}}, "IForest"]
    with pytest.raises(SystemExit, match="1 of 2 runs failed, the first with ValueError"):
        small(tmp_path, odds, methods=broken)
    record = json.loads((tmp_path / "out.json").read_text())
    assert "ValueError" in record["runs"][0]["error"]
    assert record["runs"][1]["metrics"]["auroc"] > 0.9
    assert "n_neighbors=1000" in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit):
        small(tmp_path, odds, methods=broken)
    assert "1 of 2 runs are in" in capsys.readouterr().out


def test_what_cannot_be_written_fails_as_one_run(tmp_path, odds, monkeypatch):
    real = evaluate.image_metrics
    monkeypatch.setattr(evaluate, "image_metrics", lambda *given: real(*given) | {"f1": float("nan")})
    with pytest.raises(SystemExit, match="2 of 2 runs failed, the first with ValueError: Out of range float"):
        small(tmp_path, odds)
    assert len(json.loads((tmp_path / "out.json").read_text())["runs"]) == 2


def test_parts_must_be_a_list(tmp_path, odds):
    for parts in (8, "t"):
        with pytest.raises(ValueError, match=f"parts of odds must be a list, got {parts!r}"):
            small(tmp_path, odds, datasets=[{"odds": {"root": str(odds), "parts": parts}}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["Knn"]}, "an entry of methods must be .*KNN.*, got 'Knn'"),
        ({"datasets": ["odd"]}, "an entry of datasets must be .*odds.*, got 'odd'"),
        ({"datasets": [{"odds": {"folder": "x"}}]}, "an argument of odds must be .*root.*, got 'folder'"),
        ({"methods": [{"KNN": {}, "LOF": {}}]}, "one name with its arguments"),
        ({"protocols": ["supervised"]}, "an entry of protocols must be"),
        ({"seeds": 0}, "seeds must be"),
        ({"restarts": 0}, "restarts must be"),
        ({"methods": [{"KNN": {}, "as": 3}]}, "as must be what tables call a method, got 3"),
        ({"methods": [{"KNN": {}, "as": " "}]}, "as must be what tables call a method, got ' '"),
        ({"methods": [{"as": "x"}]}, "one name with its arguments"),
        ({"methods": [{"KNN": "x"}]}, "one name with its arguments"),
        ({"datasets": [{"odds": {}, "as": "x"}]}, "one name with its arguments"),
        ({"methods": ["KNN", {"LOF": {}, "as": "KNN"}]}, "got 'KNN' twice on odds t"),
        ({"rates": [1.5]}, "an entry of rates must be below 1, got 1.5"),
        ({"validation_rows": 1.0}, "validation_rows must be below 1"),
        ({"jobs": 0}, "jobs must not be 0"),
        ({"methods": ["KNN", "KNN"]}, "must differ in what tables show of them, got 'KNN' twice on odds t"),
        ({"methods": ["Toll"]}, "none of methods, .*'Toll'.*, takes the data of .*'odds'"),
    ],
)
def test_what_cannot_be_run_is_said_first(tmp_path, odds, given, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, odds, **given)
    assert not (tmp_path / "out.json").exists()


def test_missing_weights_are_named(tmp_path, odds):
    with pytest.raises(FileNotFoundError, match=r"there is no file weights, .*nowhere\.pth"):
        small(tmp_path, odds, weights=Path("nowhere.pth"))


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_understood(path, monkeypatch):
    """Its YAML is what ``run`` takes, and every method in it finds data."""
    from jsonargparse import auto_cli

    taken = {}
    words = with_experiment(["run", path.stem, "--jobs=2"])

    def only_plan(*given):
        taken["plan"] = plan = real(*given)
        return plan

    real = plan_of
    monkeypatch.setattr(experiment, "plan_of", only_plan)
    monkeypatch.setattr(Plan, "calls", lambda _: iter(()))
    with pytest.raises(ValueError, match="none of methods"):
        auto_cli({"run": run}, args=words)
    plan = taken["plan"]
    kinds = {DATASETS[choice.name].kind for choice in plan.datasets}
    for method in plan.methods:
        assert any(method.name in METHODS[kind] for kind in kinds), method
        for kind in kinds:
            if method.name in METHODS[kind]:
                build(kind, method.name, plan.budget, 0, method.arguments)
    for choice in plan.datasets:
        assert set(choice.arguments) <= {"parts", *DATASETS[choice.name].arguments}
    labels = [method.label for method in plan.methods]
    assert len(set(labels)) == len(labels)
    assert set(yaml.safe_load(path.read_text())) >= {"about", "datasets", "methods"}


def test_names_of_experiments(tmp_path):
    assert with_experiment(["run", "--seeds=1"]) == ["run", "--seeds=1"]
    assert with_experiment(["report", "quick"]) == ["report", "quick"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("seeds: 1\n")
    assert with_experiment(["run", str(mine), "--jobs=2"]) == ["run", "--name=mine", f"--config={mine}", "--jobs=2"]
    with pytest.raises(FileNotFoundError, match=r"there is no experiment 'slow': name a YAML file or one of .*quick"):
        with_experiment(["run", "slow"])


def test_flags_override_the_yaml(tmp_path, odds, monkeypatch):
    from benchmarks.__main__ import main

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"datasets": [{"odds": {"root": str(odds)}}], "methods": ["LOF"], "seeds": 3}))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", str(path), "--seeds", "1", "--methods=[KNN]"])
    main()
    runs = json.loads((tmp_path / "runs/mine/record.json").read_text())["runs"]
    assert [(r["configuration"]["method"], r["configuration"]["seed"]) for r in runs] == [("KNN", 0)]


def test_list_shows_everything(capsys):
    experiment.list_()
    shown = capsys.readouterr().out
    for name in ("quick", "TollDetector", "PatchCore", "MemAE", "gaussian", "not found here"):
        assert name in shown


def test_other_weights_are_another_run(tmp_path):
    def configuration(content):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        plan = plan_of(["digits"], ["KNN"], [], 1, Limits(), Budget(weights=path), [], 0)
        return next(plan.calls())[1]

    first, other = configuration(b"a"), configuration(b"b")
    assert first != other
    assert str(tmp_path) not in json.dumps(first)
    assert first == configuration(b"a")
