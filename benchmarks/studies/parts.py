"""What one training of an authors' experiment sees: samples to train, validate and test on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.tables import load
from benchmarks.run.metrics import splice
from benchmarks.studies.protocol import Settings
from toll_plugin.core import ImageScaling, contrast_range

Arrays = dict[str, np.ndarray]


@dataclass
class Parts:
    """What one class's runs see: samples as they lie in memory, and how the network sees them."""

    train: Tensor
    validation: Tensor
    validation_anomalous: np.ndarray
    test: Tensor
    test_anomalous: np.ndarray
    scale: Callable[[Tensor], Tensor]
    #: Stand-ins for anomalies, made of the held-out normal samples.
    synthetic: Tensor
    #: Training samples of this class and of those that the authors' loop trains before it.
    sizes: list[int]
    #: Whether the test part is scored at every validation, for a study.
    trace_test: bool = False


def image_parts(data: Arrays, settings: Settings, normal_class: int) -> Parts:
    """Parts of an image set: ``{train, test}_{images, labels}`` as bytes, ``held_out`` and ``val_indices``.

    The class's training images that are not held out train, images of all classes validate
    and test.
    """
    held_out = np.zeros(len(data["train_labels"]), dtype=bool)
    held_out[data["held_out"]] = True
    labels = data["train_labels"]
    mine = labels == normal_class

    def images(part: str, rows: Any) -> Tensor:
        return torch.from_numpy(data[f"{part}_images"][rows])  # a copy: a process may share the array read-only

    validation, anomalous = images("train", data["val_indices"]), ~mine[data["val_indices"]]
    return Parts(
        train=images("train", mine & ~held_out),
        validation=validation,
        validation_anomalous=anomalous,
        synthetic=splice(validation[torch.from_numpy(~anomalous)], np.random.default_rng(0)),
        test=images("test", np.arange(len(data["test_labels"]))),
        test_anomalous=data["test_labels"] != normal_class,
        scale=Bytes(settings.scaling, images("train", mine)),
        sizes=[int((labels[~held_out] == c).sum()) for c in range(normal_class + 1)],
    )


class Bytes:
    """Bytes to what the network sees, on whatever device they are.

    Args:
        scaling: Of :class:`toll_plugin.core.ImageScaling`.
        normal: All training images of the normal class, whose range of contrast the scaling of CIFAR needs.
    """

    def __init__(self, scaling: str, normal: Tensor) -> None:
        value_range = contrast_range(normal.double()) if scaling == "paper_cifar" else None
        self._scaling = ImageScaling(scaling, value_range)

    def __call__(self, images: Tensor) -> Tensor:
        """Scale a batch, like the authors in double precision where the device has it."""
        wide = torch.float32 if images.device.type == "mps" else torch.float64
        return self._scaling.to(images.device)(images.to(wide) / 255).float()


def table_parts(data: Arrays) -> Parts:
    """Parts of Arrhythmia, raw: rows ``{train, validation, test}_{normal, anomalous}``."""

    def rows(*names: str) -> Tensor:
        return torch.from_numpy(np.concatenate([data[name] for name in names])).float()

    def anomalous(part: str) -> np.ndarray:
        return np.repeat([False, True], [len(data[f"{part}_normal"]), len(data[f"{part}_anomalous"])])

    return Parts(
        train=rows("train_normal"),
        validation=rows("validation_normal", "validation_anomalous"),
        validation_anomalous=anomalous("validation"),
        synthetic=splice(rows("validation_normal"), np.random.default_rng(0)),
        test=rows("test_normal", "test_anomalous"),
        test_anomalous=anomalous("test"),
        scale=as_they_are,
        sizes=[len(data["train_normal"])],
        trace_test=True,
    )


def as_they_are(rows: Tensor) -> Tensor:
    return rows


def draw(count: int) -> np.ndarray:
    """A shuffle where the authors' is not at hand, always the same."""
    return np.random.default_rng(0).permutation(count)


def arrhythmia_rows(root: Path, splits: Path | None) -> Arrays:
    """The authors' parts: 232 training rows, 77 normal and 13 anomalous rows each to validate and to test."""
    address = "https://odds.cs.stonybrook.edu/arrhythmia-dataset/"
    x, y = load("arrhythmia", [root, root / "ODDS"], address=address)
    parts: Arrays = {}
    for kind, rows in (("normal", x[y == 0]), ("anomalous", x[y == 1])):
        authors = splits and splits / f"randomized_{kind}_indices_arrhythmia.npy"
        order = np.load(authors) if authors else draw(len(rows))
        first, second = round(0.2 * len(rows)), round(0.4 * len(rows))
        shuffled = rows[order]
        parts |= {f"test_{kind}": shuffled[:first], f"validation_{kind}": shuffled[first:second]}
        # The authors leave the other anomalies aside.
        parts |= {"train_normal" if kind == "normal" else "unused_anomalous": shuffled[second:]}
    return parts
