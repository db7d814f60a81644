"""The authors' experiments: their settings, networks, initial weights and batches, and when a step is chosen.

Like :mod:`benchmarks.studies.parts` and :mod:`benchmarks.studies.training`, needs torch, NumPy and scikit-learn
only, so that it also runs on a machine without anomalib and PyOD.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks.run.metrics import f1_at_known_rate
from toll_plugin.core import DenseAutoencoder, Paper28Autoencoder, Paper32Autoencoder
from toll_plugin.core.paper_networks import scaled_sizes

#: The authors' networks, of a latent size and a width: what the hidden sizes are multiplied by.
NETWORKS: dict[str, Callable[[int, float], nn.Module]] = {
    "paper28": Paper28Autoencoder,
    "paper32": Paper32Autoencoder,
    "dense": lambda latent_dim, width: DenseAutoencoder(
        hidden_sizes=scaled_sizes(width, 256, 128), latent_dim=latent_dim
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is trained on one data set; the defaults of a data set are in :data:`SETTINGS`."""

    network: str
    beta: float
    latent_dim: int
    lr: float
    batch_size: int
    scaling: str
    n_classes: int
    metric: str = "AUROC"
    iterations: int = 2000
    validate_every: int = 20
    bf16: bool = False
    width: float = 1.0

    def configuration(self) -> dict[str, Any]:
        """What names a kept run; the authors' width is left out, as it was before there was another."""
        return {name: value for name, value in asdict(self).items() if name != "width" or value != 1}

    def build(self) -> nn.Module:
        """The network, with initial weights from torch's global generator."""
        return NETWORKS[self.network](self.latent_dim, self.width)


#: From the authors' README and code.
SETTINGS = {
    "mnist": Settings("paper28", 1000.0, 128, 1e-4, 1000, "paper_mnist", 10),
    "fashion_mnist": Settings("paper28", 100.0, 256, 1e-4, 500, "paper_fashion_mnist", 10),
    "cifar10": Settings("paper32", 10.0, 64, 1e-2, 50, "paper_cifar", 10),
    "cifar100": Settings("paper32", 100.0, 64, 1e-3, 100, "paper_cifar", 20),
    "arrhythmia": Settings("dense", 10.0, 16, 1e-3, 100, "none", 1, "F1"),
}

#: Of the training, in the names of kept runs: a change that moves numbers makes it another.
VERSION = 1

#: The protocols: the step whose weights are scored has the lowest value. The command ``stopping`` compares
#: rules without labels; on the authors' networks spliced samples lose least.
PROTOCOLS: dict[str, Callable[[dict[str, float]], float]] = {
    "paper": lambda step: -step["validation"],
    "label-free": lambda step: step["synthetic"],
    "held-out loss": lambda step: step["total"],
    "last": lambda step: -step["step"],
}

METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "AUROC": lambda anomalous, scores: float(roc_auc_score(anomalous, scores)),
    "F1": f1_at_known_rate,
}

_GLOBAL_GENERATOR = threading.Lock()


def initial_network(settings: Settings, seed: int, normal_class: int) -> nn.Module:
    """The authors' initial weights: they seed torch once per seed and build one network per class after it."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(normal_class):
            settings.build()
        return settings.build()


def batches(sizes: list[int], settings: Settings) -> Iterator[np.ndarray]:
    """The authors' batches of the last of ``sizes``: NumPy's old generator at 42, through the classes in turn."""
    draw = np.random.RandomState(42)  # the generator behind the authors' numpy.random.choice
    for size in sizes[:-1]:
        for _ in range(settings.iterations):
            draw.permutation(size)
    for _ in range(settings.iterations):
        yield draw.permutation(sizes[-1])[: settings.batch_size]
