"""Every block of the README runs, in the README's order and as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import write_arrhythmia, write_mnist

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def _output(name: str, folder: str = "") -> str:
    return f"python -m benchmarks run {name} --jobs 2 --output benchmarks/results/{folder}{name}.json"


def _small(dataset: str, methods: str) -> str:
    return f" --datasets '[{dataset}]' --methods '[{methods}]' --seeds 1 --max_epochs 1 --jobs 1"


#: Benchmarks take minutes; the same commands run small. The rest of a block stays as it is.
SMALL = {
    "python -m benchmarks run quick --jobs 2": _small("{digits: {parts: [8]}}", "Toll, MemAE, DeepSVDD, KNN"),
    _output("digits"): _small("{digits: {parts: [8]}}", "Toll, MemAE, KNN"),
    _output("inspection"): _small("{mvtec: {root: MVTecAD, parts: [part], image_size: 32}}", "GANomaly, Toll, KNN"),
    _output("patches"): (
        _small("{mvtec: {root: MVTecAD, parts: [part], image_size: 64}}", "{PatchToll: {max_steps: 20}}, PaDiM")
        + " --pretrained false"
    ),
    "python -m benchmarks deployment": " --images 4 --coresets [0.5] --image_size 64 --repeats 1",
    "anomalib train --model PatchToll --config configs/patch_toll.yaml --data.root my_images": (
        " --model.pre_trained false --model.max_steps 20"
    ),
    _output("images"): _small("{mnist: {parts: [3]}}", "Toll, KNN"),
    _output("tables"): _small("{odds: {root: ODDS, parts: [small]}}", "TollDetector, KNN"),
    _output("beta", "studies/"): _small("{digits: {parts: [8]}}", "{Toll: {beta: 0.0}}, {Toll: {beta: 1.0}}"),
    (
        "python -m benchmarks run quick --name parts --datasets '[{mvtec: {root: my_images, image_size: 64}}]'"
        " --methods '[Toll, MemAE, KNN]'"
    ): " --seeds 1 --max_epochs 1",
    (
        "python -m benchmarks run tables --name machines --datasets '[{file: {path: machines.csv, label: fault}}]'"
        " --methods '[TollDetector, KNN, IForest, LUNAR]'"
    ): " --seeds 1 --methods [KNN,IForest]",
    "python -m benchmarks linear": " --steps 20 --seeds 1 --betas [0.3] --figure linear.png",
    "python -m benchmarks overhead": " --max_epochs 2 --repeats 1 --sizes [8]",
    "python -m benchmarks imports": " --repeats 1",
    **{
        line: " --seeds 1 --iterations 40 --jobs 1"
        for _, code in BLOCKS
        if (line := code.strip()).startswith("python -m benchmarks paper --dataset arrhythmia")
    },
    "python -m benchmarks mixin --mvtec MVTecAD --roots '[\"ODDS\"]'": (
        " --categories [part] --names [small] --classes [8] --hosts [Ganomaly,AutoEncoder] --strengths [1]"
        " --seeds 1 --epochs 1 --jobs 1"
    ),
    (
        "python -m benchmarks mixin --mvtec MVTecAD --hosts '[\"Ganomaly\"]'"
        " --output benchmarks/results/mixin_ganomaly.json"
    ): (" --categories [part] --classes [8] --strengths [1] --seeds 1 --epochs 1 --jobs 1"),
    **{
        # torchvision compares the checksums of the CIFARs, so a small one cannot stand in.
        line: f" --dataset mnist --classes {i % 10} --iterations 2 --batch-size 3 --validation-size 40 --jobs 1"
        for i, (_, code) in enumerate(BLOCKS)
        if (line := code.strip()).startswith("python -m benchmarks paper") and "arrhythmia" not in line
    },
    'python -m benchmarks stopping --root datasets --roots \'["ODDS", "ADBench"]\' --splits splits': (
        " --sets [] --classes [1] --names [arrhythmia] --seeds 1 --iterations 30 --jobs 1"
    ),
    "anomalib train --model Toll --config configs/paper/mnist.yaml --data.normal_class 8": (
        " --trainer.max_steps 2 --trainer.val_check_interval 1 --data.train_batch_size 4"
    ),
    "python -m benchmarks speed --roots '[\"ODDS\"]'": (
        " --names [small] --rows 1100 --epochs 1 --repeats 1 --memory_rows 30000"
    ),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, mvtec_root):
    """A clone as far as the blocks look at it, with `my_images` beside."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(mvtec_root / "part", folder / "my_images")
    shutil.copytree(mvtec_root, folder / "MVTecAD")
    _tables(folder)
    write_mnist(folder / "datasets")
    np.save(folder / "splits/10000_val_indices_mnist.npy", np.arange(40))
    return folder


def _tables(folder):
    """Tables where the blocks expect them: ODDS' layout, the authors' split, a CSV file."""
    import pandas as pd
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    write_arrhythmia(folder / "ODDS", folder / "splits")
    labels = np.arange(120) < 20
    savemat(folder / "ODDS/small.mat", {"X": rng.normal(size=(120, 5)) + 4 * labels[:, None], "y": labels})
    frame = pd.DataFrame(rng.normal(size=(200, 4)), columns=list("abcd"))
    frame.to_csv(folder / "sensors.csv", index=False)
    frame.assign(fault=rng.integers(0, 2, 200)).to_csv(folder / "machines.csv", index=False)


def _command(kind: str, code: str) -> list[str]:
    if kind == "python":
        return [sys.executable, "-c", code]
    line = code.strip()
    # CI executes the two marked blocks whole; here, what is installed is tested.
    line = line.removeprefix("pip install . && ")
    if line in SMALL:
        line += SMALL[line] + (" --output out.json" if "benchmarks" in line else "")
    return ["bash", "-euo", "pipefail", "-c", line]


@pytest.mark.parametrize(
    ("kind", "code"),
    [pytest.param(kind, code, id=f"{i}-{code.split(chr(10))[0][:40]}") for i, (kind, code) in enumerate(BLOCKS)],
)
def test_block(kind, code, workplace):
    if code.startswith('pip install ".[dev]"'):
        pytest.skip("this is the command that runs this test")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        _command(kind, code),
        capture_output=True,
        text=True,
        check=False,
        cwd=workplace,
        timeout=400,
        env=environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    if "anomalib train" in code or "anomalib test" in code:
        assert "image_AUROC" in done.stdout


def test_what_runs_small_is_in_the_readme():
    assert SMALL.keys() <= {code.strip() for _, code in BLOCKS}


def test_there_are_blocks_for_every_user():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}
    assert sum("anomalib " in code for _, code in BLOCKS) >= 5


def test_tables_are_those_of_the_records():
    from benchmarks.report.readme import fill
    from benchmarks.run.store import RESULTS

    assert {path.stem for path in RESULTS.glob("*.json")} == set(re.findall(r"<!-- table: (\w+) -->", TEXT))
    assert fill(TEXT) == TEXT


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_readmes_own_commands():
    for name in ("first", "second"):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\npip install ", TEXT)
    assert "block first" in (ROOT / ".ci/run").read_text()
