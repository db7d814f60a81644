"""Toll beside other models in anomalib's benchmark."""

from __future__ import annotations

from functools import partial

import pandas as pd
import timm
import yaml
from anomalib.engine import Engine
from anomalib.pipelines import Benchmark


def test_benchmark_beside_another_model(mvtec_root, tmp_path, monkeypatch):
    # Padim asks for pretrained weights, which a test must not download; random ones do here.
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **(k | {"pretrained": False})))
    # A benchmark has no trainer section, and Ganomaly no max_epochs of its own.
    monkeypatch.setattr("anomalib.pipelines.benchmark.job.Engine", partial(Engine, max_epochs=1))
    path = tmp_path / "benchmark.yaml"
    content = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {"class_path": {"grid": ["Toll", "Padim", "Ganomaly"]}},
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
    assert table["model.class_path"].tolist() == ["Toll", "Padim", "Ganomaly"]
    assert table["image_AUROC"].between(0, 1).all()
