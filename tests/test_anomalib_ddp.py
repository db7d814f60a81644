"""Two processes on the CPU against one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: Everything in one script, since each process that starts imports anomalib anew.
SCRIPT = """
import json, logging, os, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
from datetime import timedelta
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from toll_plugin.anomalib import CollapsedGanomaly, DigitsOneVsRest, OneVsRest, Toll, TollPostProcessor
from toll_plugin.image_sets import LabelledImages

processes, root, theirs = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
torch.set_num_threads(1)

def engine():
    parallel = {"strategy": "ddp", "devices": 2} if processes == 2 else {"devices": 1}
    return Engine(default_root_dir=root, max_epochs=15, accelerator="cpu", enable_progress_bar=False,
                  enable_model_summary=False, **parallel)

def trainer(**arguments):
    return Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                   enable_checkpointing=False, logger=False, devices=processes, **arguments)

def toll():
    def data():
        return DigitsOneVsRest(8, train_batch_size=32 // processes, eval_batch_size=64, seed=0)

    def model():
        # Each process sees its share of the images, from which the range of this scaling is measured.
        return Toll(image_size=8, in_channels=1, beta=0.1, scaling="paper_cifar", seed=0, visualizer=False)

    runner = engine()
    runner.fit(model(), datamodule=data())
    found = {k: float(v) for k, v in runner.trainer.callback_metrics.items()}
    found["low"], found["high"] = runner.model.pre_processor.scaling_range
    found["checkpoint"] = runner.trainer.checkpoint_callback.best_model_path
    found |= runner.test(model=runner.model, datamodule=data(), verbose=False)[0]
    for path in theirs:  # what others trained
        found["theirs"] = engine().test(model(), datamodule=data(), ckpt_path=path, verbose=False)[0]["image_AUROC"]
    return found

def collapsed():
    torch.manual_seed(0)
    model = CollapsedGanomaly(n_features=8, latent_vec_size=10, batch_size=16, visualizer=False, evaluator=False,
                              collapse_weight=1.0, pre_processor=CollapsedGanomaly.configure_pre_processor((32, 32)))
    # As anomalib's GANomaly wants it: each of its two losses leaves the other network out.
    parallel = {"strategy": "ddp_find_unused_parameters_true"} if processes == 2 else {}
    runner = trainer(max_epochs=3, **parallel)
    runner.fit(model, datamodule=DigitsOneVsRest(8, train_batch_size=32 // processes, seed=0))
    return {k: float(v) for k, v in runner.callback_metrics.items()}

class Alternating(OneVsRest):
    def load(self):
        labels = torch.arange(48) % 2
        images = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return LabelledImages(images, labels), LabelledImages(images, labels)

def unequal():
    # Of the 16 images that validate, normal ones go to the first process and anomalous ones to the second.
    data = Alternating(0, train_batch_size=4, val_indices=list(range(16)), val_anomalies=True)
    model = Toll(image_size=8, in_channels=1, beta="auto", score_scale="median", seed=0, visualizer=False)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120))
    runner = trainer(max_epochs=2, strategy=strategy)
    runner.fit(model, datamodule=data)
    rank = runner.global_rank
    found = {"val_loss": float(runner.callback_metrics["val_loss"]), "fit": float(model.post_processor.pixel_threshold)}
    found["units"] = [float(unit) for unit in model.model.score.units]

    def validated(with_masks):
        masks = torch.zeros(2, 4, 4, dtype=torch.bool)
        masks[1, 0, 0] = True
        maps = torch.arange(32.0).reshape(2, 1, 4, 4) + 100 * rank
        batch = ImageBatch(image=torch.zeros(2, 3, 4, 4), pred_score=maps.amax(dim=(1, 2, 3)), anomaly_map=maps,
                           gt_label=torch.tensor([0, 1]), gt_mask=masks if with_masks else None)
        post_processor = TollPostProcessor()
        post_processor.on_validation_batch_end(None, None, batch)
        post_processor.on_validation_epoch_end(None, None)
        return [float(post_processor.image_threshold), float(post_processor.pixel_threshold)]

    found["masks of the first"], found["no masks"] = validated(rank == 0), validated(False)
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, found)
    return everyone

found = {"toll": toll(), "collapsed": collapsed(), "unequal": unequal() if processes == 2 else None}
if int(os.environ.get("LOCAL_RANK", 0)) == 0:
    print("RESULT", json.dumps(found))
"""


def run(folder: Path, processes: int, *arguments: str) -> dict[str, Any]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script), str(processes), str(folder / str(processes)), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        cwd=folder,
        env=os.environ | {"MASTER_ADDR": "127.0.0.1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ddp"), 1)


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    return run(tmp_path_factory.mktemp("ddp"), 2, one["toll"]["checkpoint"])


def test_two_processes_train_and_test_as_one_does(one, two):
    one, two = one["toll"], two["toll"]
    assert (two["low"], two["high"]) == (one["low"], one["high"])
    # BatchNorm normalises by each process's half of the batch, so the weights differ a little.
    assert two["image_AUROC"] == pytest.approx(one["image_AUROC"], abs=0.02)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=0.15)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.15)
    assert Path(one["checkpoint"]).is_file()
    # The same weights: only the repeated image that evens out the two halves of the test differs.
    assert two["theirs"] == pytest.approx(one["image_AUROC"], abs=1e-3)


def test_targeted_collapse_in_two_processes_is_that_of_one(one, two):
    one, two = one["collapsed"], two["collapsed"]
    assert two["train_collapse"] == pytest.approx(one["train_collapse"], rel=0.1)
    assert two["generator_loss"] == pytest.approx(one["generator_loss"], rel=0.05)


def test_processes_that_see_different_kinds_of_images_find_the_same_thresholds(two):
    """Where only one of them computes a metric, it waits for the other until the time is up."""
    first, second = two["unequal"]
    assert first == second
    assert math.isfinite(first["val_loss"])
    assert math.isfinite(first["fit"])
    assert first["units"] != [1.0, 1.0]  # the second process has no normal image to measure any on
    # By hand: scores 15 and 31 of the first process, 115 and 131 of the second; one of each is anomalous.
    assert first["no masks"][1] == 115  # the largest map value of a normal image
    assert first["masks of the first"][1] == 15.5  # the one anomalous pixel has 16, the next lower one 15
    assert first["masks of the first"][0] == first["no masks"][0] == 23  # best F1 from 31 on, below it is 15
