"""Two processes on the CPU against one."""

from __future__ import annotations

import json
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

if len(sys.argv) > 3:
    result = engine().test(model(), datamodule=data(), ckpt_path=sys.argv[3], verbose=False)[0]
else:
    runner = engine()
    runner.fit(model(), datamodule=data())
    result = {k: float(v) for k, v in runner.trainer.callback_metrics.items()}
    result["low"], result["high"] = runner.model.pre_processor.scaling_range
    result["checkpoint"] = runner.trainer.checkpoint_callback.best_model_path
    result |= runner.test(model=runner.model, datamodule=data(), verbose=False)[0]
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
                          pre_processor=CollapsedGanomaly.configure_pre_processor((32, 32)))
# As anomalib's GANomaly wants it: each of its two losses leaves the other network out.
parallel = {"strategy": "ddp_find_unused_parameters_true", "devices": 2} if processes == 2 else {"devices": 1}
trainer = Trainer(max_epochs=3, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                  enable_checkpointing=False, logger=False, **parallel)
trainer.fit(model, datamodule=DigitsOneVsRest(8, train_batch_size=32 // processes, seed=0))
if int(__import__("os").environ.get("LOCAL_RANK", 0)) == 0:
    print("RESULT", json.dumps({k: float(v) for k, v in trainer.callback_metrics.items()}))
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
    one, two = run(1), run(2)
    assert (two["low"], two["high"]) == (one["low"], one["high"])
    # BatchNorm normalises by each process's half of the batch, so the weights differ a little.
    assert two["image_AUROC"] == pytest.approx(one["image_AUROC"], abs=0.02)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=0.15)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.15)
    # The same weights: only the repeated image that evens out the two halves of the test differs.
    checkpoint = str(one["checkpoint"])
    assert Path(checkpoint).is_file()
    assert run(2, checkpoint)["image_AUROC"] == pytest.approx(one["image_AUROC"], abs=1e-3)


def test_targeted_collapse_in_two_processes_is_that_of_one(run):
    one, two = run(1, code=MIXIN), run(2, code=MIXIN)
    assert two["train_collapse"] == pytest.approx(one["train_collapse"], rel=0.1)
    assert two["generator_loss"] == pytest.approx(one["generator_loss"], rel=0.05)
