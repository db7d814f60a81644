"""Toll and PatchToll in anomalib's pipelines: its benchmark beside other models, its ensemble on tiles."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import timm
import yaml
from anomalib.engine import Engine
from anomalib.pipelines import Benchmark
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from conftest import draw


@pytest.fixture(autouse=True)
def _nothing_downloaded(monkeypatch):
    """Backbones that ask for pretrained weights get random ones."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **(k | {"pretrained": False})))


def test_benchmark_beside_other_models(mvtec_root, tmp_path, monkeypatch):
    # A benchmark has no trainer section, and without one Toll would train for 1000 epochs.
    monkeypatch.setattr("anomalib.pipelines.benchmark.job.Engine", partial(Engine, max_epochs=1))
    path = tmp_path / "benchmark.yaml"
    content = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {"class_path": {"grid": ["Toll", "Padim", "Dfm"]}},
            "data": {
                "class_path": "Folder",
                "init_args": {
                    "name": "part",
                    "root": str(mvtec_root / "part"),
                    "normal_dir": "train/good",
                    "normal_test_dir": "test/good",
                    "abnormal_dir": "test/spot",
                    "train_batch_size": 4,
                    "num_workers": 0,
                },
            },
        },
    }
    path.write_text(yaml.safe_dump(content))
    benchmark = Benchmark()
    benchmark.run(benchmark.get_parser().parse_args(["--config", str(path)]))
    (results,) = tmp_path.glob("runs/benchmark/*/results.csv")
    table = pd.read_csv(results)
    assert table["model.class_path"].tolist() == ["Toll", "Padim", "Dfm"]
    assert table["image_AUROC"].between(0, 1).all()


@pytest.mark.parametrize("name", ["Toll", "PatchToll"])
def test_tiled_ensemble(name, tmp_path, monkeypatch):
    """With a model's defaults only: anomalib's ensemble takes no ``init_args`` (its issue 2898)."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    root = tmp_path / "mvtec"
    for folder, count in (("train/good", 12), ("test/good", 4), ("test/spot", 4)):
        for i in range(count):
            draw(root / "part" / folder / f"{i:03d}.png", rng, bad="spot" in folder, size=(64, 128))
    content = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path / "results"),
        "tiling": {"tile_size": [64, 64], "stride": 64, "image_size": [64, 128]},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": {
            "class_path": "anomalib.data.MVTecAD",
            "init_args": {
                "root": str(root),
                "category": "part",
                "train_batch_size": 4,
                "num_workers": 0,
                "val_split_mode": "same_as_test",
                "test_split_mode": "from_dir",
            },
        },
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {"model": {"class_path": name}, "trainer": {"max_epochs": 2}},
    }
    path = tmp_path / "ensemble.yaml"
    path.write_text(yaml.safe_dump(content))
    train = TrainTiledEnsemble()
    train.run(train.get_parser().parse_args(["--config", str(path)]))
    evaluate = EvalTiledEnsemble(train.root_dir)
    evaluate.run(evaluate.get_parser().parse_args(["--config", str(path)]))
    assert len(list(train.root_dir.glob("weights/lightning/model0_[01].ckpt"))) == 2
    (results,) = train.root_dir.glob("*.csv")
    found = pd.read_csv(results).iloc[0]
    assert set(found.index) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
    assert found["image_AUROC"] > 0.9
    assert found["pixel_AUROC"] > 0.9
