"""PyOD's detectors, and this package's, on rows or on the pixels of images; see :class:`TableDetector`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pickle
import random
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.interfaces import Budget, Detector, Scored, Split
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

#: Those that give the same scores whatever the seed; they run once per split.
DETERMINISTIC = ("KNN", "LOF", "OCSVM", "PCA", "ECOD", "COPOD", "HBOS", "GMM", "KDE")

#: Those that also take images, as rows of pixels.
ON_PIXELS = ("KNN", "LOF", "IForest", "OCSVM", "PCA", "GMM", "ECOD", "COPOD", "HBOS")

#: PyOD's with targeted collapse; a collapse_weight of 0 makes each its bare host.
COLLAPSED = ("CollapsedAutoEncoder", "CollapsedVAE", "CollapsedAE1SVM", "CollapsedDeepSVDD")


class TableDetector(Detector):
    """A detector of PyOD, or this package's, on rows, or on the pixels of images.

    Args:
        name: ``TollDetector``, or one of :data:`PYOD` or :data:`COLLAPSED`.
        budget: Not used: table methods have their own.
        seed: Of detectors that draw.
        arguments: Of the class, beyond its defaults.
    """

    def __init__(self, name: str, budget: Budget, seed: int, **arguments: Any) -> None:
        del budget
        self._name, self._seed, self._arguments = name, seed, arguments
        self._scaler: Any = None
        self.model: Any = None
        _warm(name)

    def fit(self, split: Split) -> None:
        """Columns of tables are standardised first, but for TollDetector, which scales by itself."""
        from sklearn.preprocessing import StandardScaler

        rows = _pixels(split.train)
        if split.train.ndim == 2 and self._name != "TollDetector":
            self._scaler = StandardScaler().fit(rows)
            rows = self._scaler.transform(rows)
        with _seeded(self._seed):
            self.model = _make(self._name, rows.shape[1], self._seed, self._arguments)
            self.model.fit(rows)

    def score(self, samples: Tensor) -> Scored:
        """As the detector scores; its terms are those of TollDetector and of targeted collapse."""
        rows = _pixels(samples)
        if self._scaler is not None:
            rows = self._scaler.transform(rows)
        scores = self._decide(rows)
        if self._name == "TollDetector":
            found = self.model.explain(rows)
            latent = {"latent": found.latent} if found.latent.any() else {}  # none where beta is 0
            return Scored(scores, {"reconstruction": found.reconstruction} | latent)
        if self._name in COLLAPSED:
            given, weight = self.model.collapse_score_weight, self.model.collapse.score_weight
            self.model.set_params(collapse_score_weight=0.0)
            host = self._decide(rows)
            self.model.set_params(collapse_score_weight=given)
            # Under "auto" the host's scores are in another unit within the sum.
            weight = 0.0 if self.model.collapse.weight == "auto" else weight
            return Scored(scores, {"host": host} | _norms(scores - host, weight))
        return Scored(scores)

    def _decide(self, rows: np.ndarray) -> np.ndarray:
        with _seeded(self._seed):
            return np.asarray(self.model.decision_function(rows), dtype=float)

    def size(self) -> int:
        """Of the pickle."""
        return len(pickle.dumps(self.model))


def _norms(term: np.ndarray, weight: float) -> dict[str, np.ndarray]:
    """Latent norms from a score's term, which has none where its weight is 0."""
    return {"latent": term / weight} if weight > 0 else {}


def _make(name: str, features: int, seed: int, arguments: Mapping[str, Any]) -> Any:
    module = "toll_plugin.pyod" if name in ("TollDetector", *COLLAPSED) else f"pyod.models.{PYOD[name]}"
    kind = getattr(importlib.import_module(module), name)
    given = {"n_features": features} if name.endswith("DeepSVDD") else {}
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
