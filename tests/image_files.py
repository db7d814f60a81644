"""Small image sets in the files and folders that torchvision reads."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np

N_TRAIN, N_TEST = 80, 40


def labels_of(count: int, n_classes: int) -> np.ndarray:
    return (np.arange(count) % n_classes).astype(np.uint8)


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, np.ndarray]:
    """MNIST's four files: image i of class c is noise around 20 c."""
    rng = np.random.default_rng(0)
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    written = {}
    for part, prefix, count in (("train", "train", N_TRAIN), ("test", "t10k", N_TEST)):
        labels = labels_of(count, 10)
        noise = rng.integers(0, 20, (count, 28, 28))
        images = (20 * labels[:, None, None] + noise).astype(np.uint8)
        head = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = np.array([0x801, count], dtype=">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        written |= {f"{part}_images": images, f"{part}_labels": labels}
    return written


def write_cifar(root: Path, name: str, monkeypatch) -> dict[str, np.ndarray]:
    """CIFAR10's or CIFAR100's files, and torchvision told of their checksums."""
    from torchvision import datasets

    rng = np.random.default_rng(1)
    kind = getattr(datasets, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    written = {}
    for part, listed, count in (("train", "train_list", N_TRAIN), ("test", "test_list", N_TEST)):
        files = [file for file, _ in getattr(kind, listed)]
        images = rng.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
        coarse = labels_of(count, 20)
        fine = labels_of(count, 10) if name == "CIFAR10" else coarse * 5 + np.arange(count) // 20
        sums = []
        for file, rows in zip(files, np.array_split(np.arange(count), len(files)), strict=True):
            content = {"data": images[rows].reshape(len(rows), -1)}
            if name == "CIFAR10":
                content["labels"] = fine[rows].tolist()
            else:
                content |= {"fine_labels": fine[rows].tolist(), "coarse_labels": coarse[rows].tolist()}
            sums.append(write(file, content))
        monkeypatch.setattr(kind, listed, sums)
        written |= {f"{part}_images": images, f"{part}_labels": fine, f"{part}_coarse": coarse}
    _, md5 = write(kind.meta["filename"], {kind.meta["key"]: ["a", "b"]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5})
    return written


def write_arrhythmia(root: Path, splits: Path, seed: int = 0) -> None:
    """ODDS' table and the authors' shuffles, with anomalies that can be told."""
    from scipy.io import savemat

    rng = np.random.default_rng(seed)
    labels = np.arange(452) < 66
    for folder in (root, splits):
        folder.mkdir(parents=True, exist_ok=True)
    savemat(root / "arrhythmia.mat", {"X": rng.normal(size=(452, 274)) + 0.3 * labels[:, None], "y": labels})
    for kind, count in (("normal", 386), ("anomalous", 66)):
        np.save(splits / f"randomized_{kind}_indices_arrhythmia.npy", rng.permutation(count))
