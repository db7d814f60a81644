"""Every YAML in configs/ runs through the real command line, on tiny data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from contracts import run_cli

CONFIGS = Path(__file__).parents[1] / "configs"

#: What makes each config small. A config without an entry fails, so that none goes untested.
SMALL = {
    "collapsed_ganomaly.yaml": ["--trainer.max_epochs", "1"],
    "digits.yaml": ["--trainer.max_epochs", "1"],
    "folder.yaml": ["--trainer.max_epochs", "1", "--model.image_size", "16", "--data.root", "{mvtec}/part"],
}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.name)
def test_config_trains_and_tests(path, mvtec_root, tmp_path):
    small = [argument.format(mvtec=mvtec_root) for argument in SMALL[path.name]]
    common = ["--config", str(path), *small, "--trainer.enable_progress_bar", "false"]
    name = yaml.safe_load(path.read_text())["model"]["class_path"]
    cli = run_cli("train", "--model", name, *common)
    metrics = cli.engine.trainer.callback_metrics
    assert 0 <= float(metrics["image_AUROC"]) <= 1
    assert len(list(tmp_path.rglob("config.yaml"))) == 1
    (checkpoint,) = tmp_path.glob(f"results/{name}/**/v0/weights/lightning/*.ckpt")
    again = run_cli("test", "--model", name, *common, "--ckpt_path", str(checkpoint))
    assert float(again.engine.trainer.callback_metrics["image_AUROC"]) == pytest.approx(float(metrics["image_AUROC"]))
