"""The blocks of the repository's pages, and what it takes to run them: a folder that looks like a clone.

Commands of ``anomalib`` and ``python -m benchmarks`` run in this process, since importing anomalib takes most of the
time of a short command; all others run in a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from contracts import run_cli
from image_files import write_arrhythmia, write_cifar, write_mnist

ROOT = Path(__file__).parents[1]

_BENCHMARKS = "python -m benchmarks "


def _small(dataset: str, methods: str) -> str:
    return f" --datasets '[{dataset}]' --methods '[{methods}]' --seeds 1 --max_epochs 1 --jobs 1"


_IMAGES = _small("{digits: {parts: [8]}}", "Toll, KNN")
_PATCHES = _small("{mvtec: {root: MVTecAD, parts: [part], image_size: 64}}", "{PatchToll: {max_steps: 20}}, PaDiM")
_PAPER = " --classes 3 --seeds 1 --iterations 2 --batch-size 3 --validation-size 40 --width 0.05 --jobs 1"
_MIXIN = " --categories [part] --classes [8] --max_test 100 --strengths [1] --seeds 1 --epochs 1 --jobs 1"
_MIXIN_IMAGES = " --hosts [Ganomaly] --max_test 100 --pressures [] --epochs 1 --jobs 1"

#: Trainings and benchmarks take minutes to days. What makes each command small, by how it begins; one that is not here
#: fails. .ci/run trains the README's first command in full.
SMALL = {
    "anomalib train --model Toll --config configs/digits.yaml": " --trainer.max_epochs 2",
    "anomalib train --model Toll --config configs/folder.yaml": " --trainer.max_epochs 1",
    "anomalib train --model CollapsedGanomaly": " --trainer.max_epochs 1",
    "anomalib train --model PatchToll": " --model.pre_trained false --model.max_steps 20",
    f"{_BENCHMARKS}run quick --jobs": _small("{digits: {parts: [8]}}", "Toll, MemAE, DeepSVDD, KNN"),
    f"{_BENCHMARKS}run quick --name parts": " --seeds 1 --max_epochs 1 --jobs 1",
    f"{_BENCHMARKS}run tables --name machines": " --seeds 1 --methods [KNN,IForest] --jobs 1",
    f"{_BENCHMARKS}run digits": _IMAGES,
    f"{_BENCHMARKS}run beta": _small("{digits: {parts: [8]}}", "{Toll: {beta: 0.0}}, {Toll: {beta: 1.0}}"),
    f"{_BENCHMARKS}run regularisers": _small("{digits: {parts: [8]}}", "Toll, MemAE"),
    f"{_BENCHMARKS}run score": _IMAGES,
    f"{_BENCHMARKS}run rare": _IMAGES,
    f"{_BENCHMARKS}run bottleneck": _IMAGES,
    f"{_BENCHMARKS}run dimensions": _small(
        "{gaussian: {parts: [16], rows: 50}}", "{TollDetector: {max_steps: 20}}, KNN"
    ),
    f"{_BENCHMARKS}run selfsupervised": _small("{digits: {parts: [8]}}", "Rotations"),
    f"{_BENCHMARKS}run images": _small("{mnist: {parts: [3]}}", "Toll, KNN"),
    f"{_BENCHMARKS}run search": _small(
        "{odds: {root: ODDS, parts: [small]}}",
        "{TollDetector: {max_steps: 20}}, {TollDetector: {beta: 0.0, max_steps: 20}}",
    ),
    f"{_BENCHMARKS}run adbench": _small(
        "{adbench: {root: ODDS, parts: [small]}}", "{TollDetector: {max_steps: 20}}, KNN"
    ),
    f"{_BENCHMARKS}run collapsed": _small(
        "{odds: {root: ODDS, parts: [small]}}", "{CollapsedAutoEncoder: {collapse_weight: auto, epoch_num: 1}}"
    ),
    f"{_BENCHMARKS}run tables --jobs": _small(
        "{odds: {root: ODDS, parts: [small]}}", "{TollDetector: {max_steps: 50}}, KNN"
    ),
    f"{_BENCHMARKS}run contaminated": _small("{odds: {root: ODDS, parts: [small]}}", "{TollDetector: {max_steps: 50}}"),
    f"{_BENCHMARKS}run inspection": _small(
        "{mvtec: {root: MVTecAD, parts: [part], image_size: 32}}", "GANomaly, Toll, KNN"
    ),
    f"{_BENCHMARKS}run patch": f"{_PATCHES} --pretrained false",
    f"{_BENCHMARKS}run few": _small(  # PaDiM needs two images
        "{mvtec: {root: MVTecAD, parts: [part], image_size: 64}}", "{PatchToll: {max_steps: 20}}, PatchCore"
    )
    + " --pretrained false",
    f"{_BENCHMARKS}run joined": _small(
        "{mvtec: {root: MVTecAD, parts: [part], image_size: 64, joined: true}}", "{PatchToll: {max_steps: 20}}"
    )
    + " --pretrained false",
    f"{_BENCHMARKS}deployment": " --images 4 --coresets [] --image_size 64 --repeats 1 --memory false",
    f"{_BENCHMARKS}linear": " --steps 20 --seeds 1 --betas [0.3] --figure linear.png",
    f"{_BENCHMARKS}rays": " --size 40 --seeds 1 --max_steps 5 --figure rays.svg",
    f"{_BENCHMARKS}collapse": " --normal_class 3 --size 8 --steps 2 --figure collapse.svg",
    f"{_BENCHMARKS}run classes": _small("{mnist: {parts: [3]}}", "{Toll: {max_steps: 2}}, KNN"),
    f"{_BENCHMARKS}overhead": " --max_epochs 2 --repeats 1 --sizes [8]",
    f"{_BENCHMARKS}imports": " --repeats 1 --uncounted 0",
    f"{_BENCHMARKS}speed": (
        " --names [small] --rows 1100 --epochs 1 --repeats 1 --memory_rows 0 --defaults '[[60, 5]]' --warm_steps 5"
    ),
    f"{_BENCHMARKS}growth": " --rows [300] --columns [6] --of_rows 50 --warm_steps 5 --figure growth.svg",
    f"{_BENCHMARKS}scale": " --rows [2000] --in_memory 1000 --file_rows 500 --workers 1 --figure scale.svg",
    f"{_BENCHMARKS}paper --dataset arrhythmia": " --seeds 1 --iterations 40 --jobs 1",
    f"{_BENCHMARKS}paper": _PAPER,
    f"{_BENCHMARKS}stopping": " --sets [] --classes [1] --names [arrhythmia] --seeds 1 --iterations 30 --jobs 1",
    f"{_BENCHMARKS}mixin --classes '[1": _MIXIN_IMAGES + " --classes [8]",
    f"{_BENCHMARKS}mixin --classes '[]' --mnist": _MIXIN_IMAGES + " --mnist [8]",
    f"{_BENCHMARKS}mixin --classes '[]' --folders": _MIXIN_IMAGES + " --folders [MVTecAD/part]",
    f"{_BENCHMARKS}mixin --mvtec": f"{_MIXIN} --hosts [Ganomaly]",
    f"{_BENCHMARKS}mixin --roots": " --names [small] --hosts [AutoEncoder] --seeds 1 --max_epochs 1 --jobs 1",
    f"{_BENCHMARKS}mixin --mvtec MVTecAD --hosts": _MIXIN,
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of each block of a page."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines(code: str) -> list[str]:
    """Commands of a bash block, of which some go on in the next line."""
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def beginning(line: str) -> str | None:
    """The key of ``SMALL`` that says most about a command."""
    return max((key for key in SMALL if line.startswith(key)), key=len, default=None)


def parameters(page: str) -> list[object]:
    """The blocks of a page as parameters of a test."""
    return [
        pytest.param(kind, code, id=f"{Path(page).stem}-{i}-{code.splitlines()[0][:60]}")
        for i, (kind, code) in enumerate(blocks(page))
    ]


def make_clone(folder: Path, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone as far as the blocks look at it, with small data beside."""
    for name in ("configs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(mvtec_root / "part", folder / "my_images")
    shutil.copytree(mvtec_root, folder / "MVTecAD")
    write_arrhythmia(folder / "ODDS", folder / "splits")
    for name, split in (("MNIST", "mnist"), ("FashionMNIST", "fmnist")):
        write_mnist(folder / "datasets", name)
        np.save(folder / f"splits/10000_val_indices_{split}.npy", np.arange(40))
    for name in ("CIFAR10", "CIFAR100"):
        write_cifar(folder / "datasets", name, monkeypatch)
        np.save(folder / f"splits/10000_val_indices_{name.lower()}.npy", np.arange(40))
    _tables(folder)


def _tables(folder: Path) -> None:
    """Tables where the blocks expect them: in ODDS' layout, and two CSV files."""
    import pandas as pd
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    labels = np.arange(120) < 20
    savemat(folder / "ODDS/small.mat", {"X": rng.normal(size=(120, 5)) + 4 * labels[:, None], "y": labels})
    frame = pd.DataFrame(rng.normal(size=(200, 4)), columns=list("abcd"))
    frame.to_csv(folder / "sensors.csv", index=False)
    (folder / "sensors").mkdir()
    frame.to_parquet(folder / "sensors/0.parquet", index=False)
    frame.assign(fault=rng.integers(0, 2, 200)).to_csv(folder / "machines.csv", index=False)


def run_block(kind: str, code: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block inside ``clone``."""
    monkeypatch.chdir(clone)
    if kind == "python":
        with mpl.rc_context({"backend": "agg"}):
            exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})
        return
    for line in lines(code):
        _run(line, clone, monkeypatch)


def _run(line: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # .ci/run executes the README's two marked blocks whole; here, what is installed is tested.
    line = line.removeprefix("pip install . && ")
    key = beginning(line)
    assert key is not None or not line.startswith((_BENCHMARKS, "anomalib train ")), f"SMALL has nothing for {line}"
    if key is not None:
        line += SMALL[key]
    if line.startswith(_BENCHMARKS):
        line += " --output out.json"  # by default it would take the place of the committed record
    words = shlex.split(line)
    if line.startswith("anomalib "):
        monkeypatch.setattr(sys, "argv", words)
        run_cli(*words[1:])
    elif line.startswith(_BENCHMARKS):
        from benchmarks.__main__ import main

        monkeypatch.setattr(sys, "argv", words[2:])
        main()
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True, cwd=clone, env=os.environ | {"PATH": path})
