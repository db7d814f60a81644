"""Methods by name: what an experiment may compare on images and on tables."""

from __future__ import annotations

import contextlib
import importlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from benchmarks.anomalib_methods import MODELS, EngineDetector
from benchmarks.interfaces import Budget, Detector, Scored, Split
from benchmarks.peers import PEERS

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

    def fit(self, split: Split) -> None:
        """Columns of tables are standardised first, but for TollDetector, which scales by itself."""
        from sklearn.preprocessing import StandardScaler

        rows = _pixels(split.train)
        if split.train.ndim == 2 and self._name != "TollDetector":
            self._scaler = StandardScaler().fit(rows)
            rows = self._scaler.transform(rows)
        self._detector = self._make(rows.shape[1])
        with _quiet():
            self._detector.fit(rows)

    def _make(self, features: int) -> Any:
        if self._name == "TollDetector":
            from toll_plugin.pyod import TollDetector

            return TollDetector(random_state=self._seed, **self._arguments)
        made = getattr(importlib.import_module(f"pyod.models.{PYOD[self._name]}"), self._name)
        given = {"n_features": features} if self._name == "DeepSVDD" else {}
        with _quiet():
            detector = made(**given, **self._arguments)
        # DIF builds its networks from the seed it was constructed with and refuses another.
        if "random_state" in detector.get_params() and self._name != "DIF":
            detector.set_params(random_state=self._seed)
        return detector

    def score(self, samples: Tensor) -> Scored:
        """As PyOD scores; the terms are TollDetector's."""
        rows = _pixels(samples)
        if self._scaler is not None:
            rows = self._scaler.transform(rows)
        with _quiet():
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


def _pixels(samples: Tensor) -> np.ndarray:
    rows = samples.flatten(1).double().numpy()
    return rows / 255 if not samples.is_floating_point() else rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
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
        ValueError: If there is no such method for data of this kind.
    """
    if name not in METHODS[kind]:
        msg = f"methods for {kind} are {', '.join(METHODS[kind])}, got {name!r}"
        raise ValueError(msg)
    return METHODS[kind][name](budget, seed, **arguments)
