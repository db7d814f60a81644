"""Several parts as one data set: who lands where, and the test of each part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import TaskType
from conftest import draw
from contracts import engine, run_cli
from sklearn.metrics import roc_auc_score

from toll_plugin.anomalib import JoinedFolders, PatchToll


@pytest.fixture(scope="module")
def roots(tmp_path_factory, mvtec_root):
    """``part`` of 12 training images, and a folder of two more: ``nut`` of 5 smaller ones, ``bolt`` of 3."""
    root, draws = tmp_path_factory.mktemp("more"), np.random.default_rng(1)
    for name, count in (("nut", 5), ("bolt", 3)):
        for i in range(count):
            draw(root / name / f"train/good/{i:03d}.png", draws, bad=False, size=(30, 30))
        for i in range(2):
            draw(root / name / f"test/good/{i:03d}.png", draws, bad=False, size=(30, 30))
            for kind in ("dent", "scratch"):
                draw(root / name / f"test/{kind}/{i:03d}.png", draws, bad=True, size=(30, 30))
    return [mvtec_root / "part", root]


def _counts(dataset):
    """Images of each part, and how many of them are anomalous."""
    found: dict[str, list[int]] = {}
    for sample in dataset.samples.itertuples():
        counts = found.setdefault(Path(sample.image_path).parents[2].name, [0, 0])
        counts[0] += 1
        counts[1] += int(sample.label_index)
    return {name: tuple(counts) for name, counts in found.items()}


def _ready(*arguments, **options):
    data = JoinedFolders(*arguments, **options)
    data.setup()
    return data


def test_each_part_gives_its_share(roots):
    data = _ready(roots)
    assert data.parts == ["part", "bolt", "nut"]
    assert _counts(data.train_data) == {"part": (10, 0), "nut": (4, 0), "bolt": (2, 0)}
    assert _counts(data.val_data) == {"part": (2, 0), "nut": (1, 0), "bolt": (1, 0)}
    assert _counts(data.test_data) == {"part": (8, 4), "nut": (6, 4), "bolt": (6, 4)}
    assert not {*data.train_data.samples.image_path} & {*data.val_data.samples.image_path}
    assert {*_ready(roots).val_data.samples.image_path} == {*data.val_data.samples.image_path}
    assert {*_ready(roots, seed=1).val_data.samples.image_path} != {*data.val_data.samples.image_path}


def test_masks_belong_to_their_images(roots):
    data = _ready(roots)
    assert data.task == TaskType.SEGMENTATION
    for item in data.test_data:
        assert bool(item.gt_mask.any()) == bool(item.gt_label)
        if item.gt_label:  # a spot is brighter than all around it
            assert (item.image.amax(dim=0)[item.gt_mask > 0] > 0.95).all()


def test_without_all_masks_pixels_are_not_measured(roots, tmp_path):
    shutil.copytree(roots[1] / "nut", tmp_path / "nut")
    shutil.rmtree(tmp_path / "nut/ground_truth")
    data = _ready([roots[0], tmp_path])
    assert data.task == TaskType.CLASSIFICATION
    assert _counts(data.test_data) == {"part": (8, 4), "nut": (6, 4)}
    assert data.test_data[0].gt_mask is None
    # Both kinds of part have their own way alone.
    assert _ready(tmp_path).task == TaskType.CLASSIFICATION
    assert data.of("part").test_part == "part"


def test_the_test_of_one_part_changes_nothing_else(roots):
    whole, one = _ready(roots), _ready(roots).of("nut")
    one.setup()
    assert (one.test_part, whole.test_part, one.category, whole.category) == ("nut", None, "nut", "all")
    assert _counts(one.test_data) == {"nut": (6, 4)}
    assert _counts(whole.test_data) == {"part": (8, 4), "nut": (6, 4), "bolt": (6, 4)}
    for split in ("train_data", "val_data"):
        assert getattr(one, split).samples.equals(getattr(whole, split).samples)


def test_one_model_for_all_parts_and_the_auroc_of_each(roots, tmp_path):
    data = JoinedFolders(roots, train_batch_size=4, eval_batch_size=3)
    model = PatchToll(image_size=32, layers=["layer1"], pre_trained=False, max_steps=5, seed=0, visualizer=False)
    runner = engine(tmp_path)
    runner.fit(model, datamodule=data)
    assert model.post_processor.promise["held_out"] == 4
    for part in data.parts:
        (results,) = runner.test(model, datamodule=data.of(part))
        batches = runner.predict(model, datamodule=data.of(part))
        assert {Path(path).parents[2].name for batch in batches for path in batch.image_path} == {part}
        labels = torch.cat([batch.gt_label for batch in batches])
        expected = roc_auc_score(labels, torch.cat([batch.pred_score for batch in batches]))
        assert results["image_AUROC"] == pytest.approx(expected)
        assert 0 <= results["pixel_AUROC"] <= 1
    (results,) = runner.test(model, datamodule=data)
    assert 0 <= results["image_AUROC"] <= 1


def test_on_the_command_line(roots, tmp_path):
    common = ["--model", "PatchToll", "--model.layers", '["layer1"]', "--model.pre_trained", "false"]
    common += ["--model.image_size", "32", "--model.max_steps", "2", "--trainer.enable_progress_bar", "false"]
    common += ["--data", "toll_plugin.anomalib.JoinedFolders"]
    common += ["--data.roots", json.dumps([str(root) for root in roots])]
    run_cli("train", *common)
    (checkpoint,) = tmp_path.glob("results/PatchToll/JoinedFolders/all/v0/weights/lightning/*.ckpt")
    cli = run_cli("test", *common, "--data.test_part", "bolt", "--ckpt_path", str(checkpoint))
    assert len(cli.datamodule.test_data) == 6
    assert 0 <= float(cli.engine.trainer.callback_metrics["image_AUROC"]) <= 1


def test_bad_arguments(roots, tmp_path):
    with pytest.raises(FileNotFoundError, match="roots must be parts with train/good, or folders of such parts"):
        JoinedFolders(tmp_path)
    with pytest.raises(ValueError, match="roots must hold parts of different names"):
        JoinedFolders([roots[1], roots[1] / "nut"])
    with pytest.raises(ValueError, match="test_part must be one of 'part', 'bolt', 'nut', got 'gear'"):
        JoinedFolders(roots, test_part="gear")
    with pytest.raises(ValueError, match="test_part must be one of"):
        JoinedFolders(roots).of("gear")
    for ratio in (0, 1, 1.5):
        with pytest.raises(ValueError, match="val_ratio must be"):
            JoinedFolders(roots, val_ratio=ratio)
    draw(tmp_path / "one/train/good/0.png", np.random.default_rng(0), bad=False)
    draw(tmp_path / "one/test/good/0.png", np.random.default_rng(0), bad=False)
    with pytest.raises(ValueError, match="train/good must hold at least two images, one to validate with, got 1 in"):
        _ready(tmp_path)
