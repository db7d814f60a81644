"""PyOD's ``BaseDetector`` with the methods mended that fail or mislead on valid input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyod.models.base import BaseDetector
from sklearn.exceptions import NotFittedError
from typing_extensions import Self

from toll_plugin.core.checks import check_option
from toll_plugin.core.tables.model import TableModel
from toll_plugin.core.tables.scaling import Floats
from toll_plugin.pyod.scale.pieces import by_pieces

__all__ = ["CURVES", "CarefulDetector"]

#: What ``history_`` holds, in this order.
CURVES = ("total", "reconstruction", "latent", "validation")


class CarefulDetector(BaseDetector):
    """A detector of tables whose methods take any float as contamination, lists of rows, and thresholders.

    A subclass sets ``_model``, ``decision_scores_`` and ``_thresholder`` (the contamination as a Python
    float, or a thresholder of its own) when it is fitted, then calls :meth:`_label`.
    """

    _model: TableModel
    _thresholder: Any
    decision_scores_: Floats
    labels_: NDArray[np.int64]
    threshold_: float
    history_: dict[str, Floats]
    best_epoch_: list[int]
    n_features_in_: int
    feature_names_in_: NDArray[np.object_]

    def _check_fitted(self) -> None:
        if not hasattr(self, "_model"):
            msg = f"This {type(self).__name__} instance is not fitted yet. Call 'fit' before using it"
            raise NotFittedError(msg)

    def _table(self, x: Any, first: int = 0) -> NDArray[Any]:
        """Rows to score, checked; ``first`` is the number of the first row in messages."""
        raise NotImplementedError

    def _as_base(self, share: float | None = None) -> Self:
        """A view of this detector whose contamination is what the base class can work with.

        The base class takes a NumPy float for a thresholder, and fits the thresholder it is given.
        """
        self._check_fitted()
        view = copy.copy(self)
        view.contamination = self._thresholder if share is None else share
        return view

    def fit_predict(self, X: Any, y: Any = None) -> NDArray[np.int64]:  # noqa: N803
        """``fit``, then the labels of the training rows."""
        labels: NDArray[np.int64] = self.fit(X, y).labels_
        return labels

    @by_pieces
    def predict(self, X: Any, return_confidence: bool = False) -> Any:  # noqa: N803
        """Labels ``(N,)``, 1 for an anomaly; with ``return_confidence`` also :meth:`predict_confidence`."""
        return BaseDetector.predict(self._as_base(), X, return_confidence)

    @by_pieces
    def predict_proba(self, X: Any, method: str = "linear", return_confidence: bool = False) -> Any:  # noqa: N803
        """Probabilities ``(N, 2)`` of normal and anomalous.

        Args:
            X: Rows.
            method: ``"linear"`` scales by the smallest and largest training score, ``"unify"`` by their
                mean and deviation (Kriegel et al. 2011).
            return_confidence: Whether to return :meth:`predict_confidence` as well.

        Raises:
            ValueError: If ``method`` is unknown.
        """
        base = self._as_base()
        check_option("method", method, ("linear", "unify"))
        x = X if hasattr(X, "shape") else np.asarray(X)  # the base class asks for the shape of a list
        return BaseDetector.predict_proba(base, x, method, return_confidence)

    def predict_confidence(self, X: Any) -> Floats:  # noqa: N803
        """How surely each label would be the same after a slightly different training, in [0, 1]."""
        confidence: Floats = BaseDetector.predict_confidence(self._as_base(), X)
        return confidence

    def predict_with_rejection(
        self,
        X: Any,  # noqa: N803
        T: float = 32,  # noqa: N803
        return_stats: bool = False,
        delta: float = 0.1,
        c_fp: float = 1,
        c_fn: float = 1,
        c_r: float = -1,
    ) -> Any:
        """Labels, with -2 where the label is too unsure; see PyOD's ``BaseDetector``."""
        base: Any = self._as_base()
        cost = c_r if c_r >= 0 else self._share()
        found = BaseDetector.predict_with_rejection(base, X, T, return_stats, delta, c_fp, c_fn, cost)
        self.rejection_threshold_: float = base.rejection_threshold_
        return found

    def compute_rejection_stats(
        self,
        T: float = 32,  # noqa: N803
        delta: float = 0.1,
        c_fp: float = 1,
        c_fn: float = 1,
        c_r: float = -1,
        verbose: bool = False,
    ) -> Any:
        """Expected rejection rate and its bounds; see PyOD's ``BaseDetector``."""
        base = self._as_base(self._share())
        return BaseDetector.compute_rejection_stats(base, T, delta, c_fp, c_fn, c_r, verbose)

    def _share(self) -> float:
        """The share of anomalies: what was given, or what the thresholder found."""
        self._check_fitted()
        # At least one row, because the base class's equations have no solution for none.
        found = max(float(np.mean(self.labels_)), 1 / len(self.labels_))
        return self._thresholder if isinstance(self._thresholder, float) else found

    def _label(self) -> None:
        """Set threshold, labels and what probabilities need from the scores of the training rows."""
        view: Any = self._as_base()
        BaseDetector._process_decision_scores(view)
        self._classes = 2
        self.threshold_, self.labels_ = float(view.threshold_), np.asarray(view.labels_).astype(int)
        # Equal scores have no deviation; a tiny one keeps predict_proba from dividing by zero.
        tiny = max(abs(float(view._mu)), 1.0) * float(np.finfo(np.float64).eps)
        self._mu, self._sigma = float(view._mu), float(view._sigma) or tiny
