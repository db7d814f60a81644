"""Two processes on the CPU against one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from anomalib.engine import Engine
from toll_plugin.anomalib import DigitsOneVsRest, Toll

processes, root = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)

def engine():
    parallel = {"strategy": "ddp", "devices": 2} if processes == 2 else {"devices": 1}
    return Engine(default_root_dir=root, max_epochs=15, accelerator="cpu", enable_progress_bar=False,
                  enable_model_summary=False, **parallel)

def data():
    return DigitsOneVsRest(8, train_batch_size=32 // processes, eval_batch_size=64, seed=0)

def model():
    # Each process sees its share of the images, from which the range of this scaling is measured.
    return Toll(image_size=8, in_channels=1, beta=0.1, scaling="paper_cifar", seed=0, visualizer=False)

runner = engine()
runner.fit(model(), datamodule=data())
result = {k: float(v) for k, v in runner.trainer.callback_metrics.items()}
result["low"], result["high"] = runner.model.pre_processor.scaling_range
result["checkpoint"] = runner.trainer.checkpoint_callback.best_model_path
result |= runner.test(model=runner.model, datamodule=data(), verbose=False)[0]
if len(sys.argv) > 3:  # what others trained
    result["theirs"] = engine().test(model(), datamodule=data(), ckpt_path=sys.argv[3], verbose=False)[0]["image_AUROC"]
if int(__import__("os").environ.get("LOCAL_RANK", 0)) == 0:
    print("RESULT", json.dumps(result))
"""

MIXIN = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from lightning.pytorch import Trainer
from toll_plugin.anomalib import CollapsedGanomaly, DigitsOneVsRest

processes = int(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
model = CollapsedGanomaly(n_features=8, latent_vec_size=10, batch_size=16, visualizer=False, evaluator=False,
                          collapse_weight=1.0, pre_processor=CollapsedGanomaly.configure_pre_processor((32, 32)))
# As anomalib's GANomaly wants it: each of its two losses leaves the other network out.
parallel = {"strategy": "ddp_find_unused_parameters_true", "devices": 2} if processes == 2 else {"devices": 1}
trainer = Trainer(max_epochs=3, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                  enable_checkpointing=False, logger=False, **parallel)
trainer.fit(model, datamodule=DigitsOneVsRest(8, train_batch_size=32 // processes, seed=0))
if int(__import__("os").environ.get("LOCAL_RANK", 0)) == 0:
    print("RESULT", json.dumps({k: float(v) for k, v in trainer.callback_metrics.items()}))
"""


UNEQUAL = """
import json, logging, sys, warnings
from datetime import timedelta
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from toll_plugin.anomalib import OneVsRest, Toll, TollPostProcessor
from toll_plugin.image_sets import LabelledImages

torch.set_num_threads(1)

class Alternating(OneVsRest):
    def load(self):
        labels = torch.arange(48) % 2
        images = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return LabelledImages(images, labels), LabelledImages(images, labels)

# Of the 16 images that validate, normal ones go to the first process and anomalous ones to the second.
data = Alternating(0, train_batch_size=4, val_indices=list(range(16)), val_anomalies=True)
model = Toll(image_size=8, in_channels=1, beta="auto", score_scale="median", seed=0, visualizer=False)
trainer = Trainer(max_epochs=2, accelerator="cpu", devices=2, logger=False, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False,
                  strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)))
trainer.fit(model, datamodule=data)
rank = trainer.global_rank
found = {"val_loss": float(trainer.callback_metrics["val_loss"]), "fit": float(model.post_processor.pixel_threshold)}
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
if rank == 0:
    print("RESULT", json.dumps(everyone))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")

    def call(processes: int, *arguments: str, code: str = SCRIPT) -> dict[str, float | str]:
        script = folder / "script.py"
        script.write_text(code)
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"}
        result = subprocess.run(
            [sys.executable, str(script), str(processes), str(folder / str(processes)), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
            cwd=folder,
            env=environment,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
        return json.loads(line.removeprefix("RESULT"))

    return call


def test_two_processes_train_and_test_as_one_does(run):
    one = run(1)
    two = run(2, str(one["checkpoint"]))
    assert (two["low"], two["high"]) == (one["low"], one["high"])
    # BatchNorm normalises by each process's half of the batch, so the weights differ a little.
    assert two["image_AUROC"] == pytest.approx(one["image_AUROC"], abs=0.02)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=0.15)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.15)
    assert Path(str(one["checkpoint"])).is_file()
    # The same weights: only the repeated image that evens out the two halves of the test differs.
    assert two["theirs"] == pytest.approx(one["image_AUROC"], abs=1e-3)


def test_targeted_collapse_in_two_processes_is_that_of_one(run):
    one, two = run(1, code=MIXIN), run(2, code=MIXIN)
    assert two["train_collapse"] == pytest.approx(one["train_collapse"], rel=0.1)
    assert two["generator_loss"] == pytest.approx(one["generator_loss"], rel=0.05)


def test_processes_that_see_different_kinds_of_images_find_the_same_thresholds(run):
    """Where only one of them computes a metric, it waits for the other until the time is up."""
    first, second = run(2, code=UNEQUAL)
    assert first == second
    assert math.isfinite(first["val_loss"])
    assert math.isfinite(first["fit"])
    assert first["units"] != [1.0, 1.0]  # the second process has no normal image to measure any on
    # By hand: scores 15 and 31 of the first process, 115 and 131 of the second; one of each is anomalous.
    assert first["no masks"][1] == 115  # the largest map value of a normal image
    assert first["masks of the first"][1] == 15.5  # the one anomalous pixel has 16, the next lower one 15
    assert first["masks of the first"][0] == first["no masks"][0] == 23  # best F1 from 31 on, below it is 15
