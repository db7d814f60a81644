"""Fixtures: a tiny inspection data set in MVTec's layout, and quiet engines."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers that fight over cores are slower than one

import numpy as np
import pytest
import torch
from PIL import Image


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests/test_device.py trains: cpu, cuda, ...")


def pytest_collection_finish() -> None:
    """Collections leave out what the tests imported, which stays anyway: half a million objects, many times over."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What ``--device`` names; without the rounding to ten bits that convolutions on a GPU may do otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the hosts draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """Benchmarks that run in this process switch warnings off, which other tests look for."""
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    """Hosts write results into the working directory."""
    monkeypatch.chdir(tmp_path)


def draw(path: Path, rng: np.random.Generator, *, bad: bool, size: tuple[int, int] = (40, 48)) -> None:
    """A smooth texture, with a bright spot where it is bad; its mask lies beside it."""
    height, width = size
    _, columns = np.mgrid[:height, :width]
    image = 90 + 40 * np.sin(columns / 6 + rng.uniform(0, 0.5)) + rng.normal(0, 4, size)
    mask = np.zeros(size, dtype=np.uint8)
    if bad:
        top, left = rng.integers(5, height - 15), rng.integers(5, width - 15)
        mask[top : top + 8, left : left + 8] = 255
        image[mask > 0] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    Image.fromarray(rgb).save(path)
    if bad:
        mask_path = path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        mask_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(mask_path)


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory) -> Path:
    """``root/part`` in MVTec AD's layout: 12 good training images, 4 good and 4 bad tests."""
    root = tmp_path_factory.mktemp("mvtec")
    rng = np.random.default_rng(0)
    for i in range(12):
        draw(root / f"part/train/good/{i:03d}.png", rng, bad=False)
    for i in range(4):
        draw(root / f"part/test/good/{i:03d}.png", rng, bad=False)
        draw(root / f"part/test/spot/{i:03d}.png", rng, bad=True)
    return root


@pytest.fixture(scope="module")
def clone(tmp_path_factory, mvtec_root) -> Iterator[Path]:
    """A folder in which the commands of the README and of the pages find what they read."""
    from page_blocks import make_clone

    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as monkeypatch:  # torchvision is told the checksums of the small CIFARs
        make_clone(folder, mvtec_root, monkeypatch)
        yield folder
