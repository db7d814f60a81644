"""Every YAML in configs/ runs through the real command line, on tiny data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from contracts import run_cli
from image_files import write_cifar, write_mnist

CONFIGS = Path(__file__).parents[1] / "configs"

#: What makes each config small. A config without an entry fails, so that none goes untested.
_PAPER = ["--trainer.max_steps", "2", "--data.train_batch_size", "4", "--trainer.val_check_interval", "1"]
SMALL = {
    "cifar10.yaml": _PAPER,
    "cifar100.yaml": [*_PAPER, "--data.train_batch_size", "2"],
    "collapsed_ganomaly.yaml": ["--trainer.max_epochs", "1"],
    "fashion_mnist.yaml": _PAPER,
    "mnist.yaml": _PAPER,
    "patch_toll.yaml": [
        *("--data.root", "{mvtec}/part", "--model.image_size", "64"),
        *("--model.pre_trained", "false", "--model.max_steps", "5"),
    ],
    "digits.yaml": ["--trainer.max_epochs", "1"],
    "folder.yaml": ["--trainer.max_epochs", "1", "--model.image_size", "16", "--data.root", "{mvtec}/part"],
}


#: Configs of PyOD's detectors, which no command line of anomalib runs.
DETECTORS = [CONFIGS / "paper/arrhythmia.yaml"]


@pytest.fixture
def image_root(tmp_path, monkeypatch):
    """A folder with all four image sets, where ``root: null`` looks."""
    root = tmp_path / "images"
    for name in ("MNIST", "FashionMNIST"):
        write_mnist(root, name)
    for name in ("CIFAR10", "CIFAR100"):
        write_cifar(root, name, monkeypatch)
    monkeypatch.setenv("TOLL_DATA_ROOT", str(root))


@pytest.mark.parametrize("path", sorted({*CONFIGS.rglob("*.yaml")} - {*DETECTORS}), ids=lambda p: p.name)
@pytest.mark.usefixtures("image_root")
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


@pytest.mark.parametrize("path", DETECTORS, ids=lambda p: p.name)
def test_config_of_a_detector(path):
    from toll_plugin.pyod import TollDetector

    config = yaml.safe_load(path.read_text())
    assert config["class_path"] == "toll_plugin.pyod.TollDetector"
    x = np.random.default_rng(0).normal(size=(120, 274))
    scores = TollDetector(**config["init_args"] | {"max_steps": 3}).fit(x).decision_function(x)
    assert scores.shape == (120,)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "arrhythmia"])
def test_configs_are_the_settings_of_the_paper_benchmark(name):
    from benchmarks.studies.protocol import SETTINGS

    config, settings = yaml.safe_load((CONFIGS / f"paper/{name}.yaml").read_text()), SETTINGS[name]
    if name == "arrhythmia":
        found = config["init_args"] | {"scaling": config["init_args"]["preprocessing"], "network": "dense"}
        found["iterations"] = found["max_steps"]
    else:
        found = config["model"]["init_args"] | {"batch_size": config["data"]["init_args"]["train_batch_size"]}
        found |= {"iterations": config["trainer"]["max_steps"]}
        found |= {"validate_every": config["trainer"]["val_check_interval"]}
    for key in ("network", "beta", "latent_dim", "lr", "batch_size", "scaling", "iterations", "validate_every"):
        assert found.get(key, settings.validate_every) == getattr(settings, key), key
