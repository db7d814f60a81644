"""Methods by name: what an experiment may compare on images and on tables."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pickle
import random
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.interfaces import Budget, Detector, Scored, Split
from benchmarks.methods.engine import EngineDetector
from benchmarks.methods.models import MODELS
from benchmarks.methods.peers import PEERS
from benchmarks.quiet import apart

#: PyOD's detectors, each at its defaults: their modules.
PYOD = {
    "KNN": "knn",
    "LOF": "lof",
    "IForest": "iforest",
    "OCSVM": "ocsvm",
    "PCA": "pca",
    "ECOD": "ecod",
    "COPOD": "copod",
    "HBOS": "hbos",
    "GMM": "gmm",
    "KDE": "kde",
    "MCD": "mcd",
    "CBLOF": "cblof",
    "INNE": "inne",
    "LODA": "loda",
    "LUNAR": "lunar",
    "DIF": "dif",
    "AutoEncoder": "auto_encoder",
    "VAE": "vae",
    "DeepSVDD": "deep_svdd",
    "ALAD": "alad",
}

#: Those that also take images, as rows of pixels.
ON_PIXELS = ("KNN", "LOF", "IForest", "OCSVM", "PCA", "GMM", "ECOD", "COPOD", "HBOS")


#: What methods must not be given: seeds, weights and what the benchmarks have no use for.
RESERVED = ("budget", "evaluator", "pre_trained", "random_state", "seed", "visualizer")


class TableDetector(Detector):
    """A detector of PyOD, or this package's, on rows, or on the pixels of images.

    Args:
        name: Of a class of PyOD, or ``TollDetector``.
        budget: Not used: table methods have their own.
        seed: Of detectors that draw.
        arguments: Of the class, beyond its defaults.
    """

    def __init__(self, name: str, budget: Budget, seed: int, **arguments: Any) -> None:
        del budget
        self._name, self._seed, self._arguments = name, seed, arguments
        self._scaler: Any = None
        self._detector: Any = None
        _warm(name)

    def fit(self, split: Split) -> None:
        """Columns of tables are standardised first, but for TollDetector, which scales by itself."""
        from sklearn.preprocessing import StandardScaler

        rows = _pixels(split.train)
        if split.train.ndim == 2 and self._name != "TollDetector":
            self._scaler = StandardScaler().fit(rows)
            rows = self._scaler.transform(rows)
        with _seeded(self._seed):
            self._detector = _make(self._name, rows.shape[1], self._seed, self._arguments)
            self._detector.fit(rows)

    def score(self, samples: Tensor) -> Scored:
        """As PyOD scores; the terms are TollDetector's."""
        rows = _pixels(samples)
        if self._scaler is not None:
            rows = self._scaler.transform(rows)
        with _seeded(self._seed):
            scores = np.asarray(self._detector.decision_function(rows), dtype=float)
            if self._name != "TollDetector":
                return Scored(scores)
            found = self._detector.explain(rows)
        beta = self._detector.beta
        return Scored(
            scores,
            {"reconstruction": found.reconstruction, **({"latent": found.latent / beta} if beta > 0 else {})},
        )

    def size(self) -> int:
        """Of the pickle."""
        return len(pickle.dumps(self._detector))


def _make(name: str, features: int, seed: int, arguments: Mapping[str, Any]) -> Any:
    module = "toll_plugin.pyod" if name == "TollDetector" else f"pyod.models.{PYOD[name]}"
    kind = getattr(importlib.import_module(module), name)
    given = {"n_features": features} if name == "DeepSVDD" else {}
    # Some draw their weights in the constructor, so that setting it later comes too late.
    if "random_state" in inspect.signature(kind).parameters:
        given["random_state"] = seed
    return kind(**given, **arguments)


@cache
def _warm(name: str) -> None:
    """What is imported or compiled once must not count as the first run's time."""
    rows = np.random.default_rng(0).normal(size=(64, 4))
    short = {"TollDetector": {"max_steps": 1}, "AutoEncoder": {"epoch_num": 1}, "VAE": {"epoch_num": 1}}
    with contextlib.suppress(Exception), _seeded(0):  # what fails here fails in the run, where it is recorded
        _make(name, 4, 0, short.get(name, {})).fit(rows).decision_function(rows)


def _pixels(samples: Tensor) -> np.ndarray:
    rows = samples.flatten(1).double().numpy()
    return rows / 255 if not samples.is_floating_point() else rows


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Nothing is shown in the block; global generators, which some detectors draw from, start at the seed."""
    with apart():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield


class Build(Protocol):
    """Makes a method."""

    def __call__(self, budget: Budget, seed: int, **arguments: Any) -> Detector:
        """With the arguments an experiment gives it."""


#: What is compared on images and on tables. To add a method, add its builder here.
METHODS: dict[str, dict[str, Build]] = {
    "images": {
        **{name: partial(EngineDetector, name) for name in MODELS},
        **PEERS,
        **{name: partial(TableDetector, name) for name in ON_PIXELS},
    },
    "table": {name: partial(TableDetector, name) for name in ("TollDetector", *PYOD)},
}


def build(kind: str, name: str, budget: Budget, seed: int, arguments: Mapping[str, Any]) -> Detector:
    """A method by name.

    Raises:
        ValueError: If there is no such method for data of this kind, or an argument is the experiment's to set.
    """
    if name not in METHODS[kind]:
        msg = f"methods for {kind} are {', '.join(METHODS[kind])}, got {name!r}"
        raise ValueError(msg)
    for argument, value in arguments.items():
        if argument in RESERVED:
            msg = f"{argument} of {name} is set by the experiment, not by a method's arguments, got {value!r}"
            raise ValueError(msg)
    return METHODS[kind][name](budget, seed, **arguments)
