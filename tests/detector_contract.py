"""What every fitted detector for tables keeps, however it came to be fitted."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(61, 6))
X[:6] += 4
OTHER = RNG.normal(size=(23, 6)) * 3


def same(one, other) -> bool:
    return bool(np.array_equal(one.decision_function(OTHER), other.decision_function(OTHER)))


class DetectorContract:
    """Subclass, say how a detector is made, and how it is fitted."""

    def make(self, **parameters: Any) -> Any:
        """An unfitted detector; small and quick."""
        raise NotImplementedError

    def ready(self, detector: Any, x: Any) -> Any:
        """``detector`` fitted on ``x``, by way of what this subclass is about."""
        return detector.fit(x)

    @pytest.fixture
    def fitted(self):
        return self.ready(self.make(), X)

    # -- scores --------------------------------------------------------------------------------

    def test_training_scores_are_those_of_the_training_rows(self, fitted):
        np.testing.assert_array_equal(fitted.decision_scores_, fitted.decision_function(X))
        assert fitted.decision_scores_.dtype == np.float64
        assert fitted.decision_scores_.shape == (61,)

    def test_a_score_does_not_depend_on_the_rows_beside_it(self, fitted):
        scores = fitted.decision_function(OTHER)
        order = np.random.default_rng(1).permutation(len(OTHER))
        np.testing.assert_array_equal(fitted.decision_function(OTHER[order]), scores[order])
        for size in (1, 2, 7, 8, 9):
            parts = [fitted.decision_function(OTHER[i : i + size]) for i in range(0, len(OTHER), size)]
            np.testing.assert_array_equal(np.concatenate(parts), scores)
        many = fitted.decision_function(np.tile(OTHER, (300, 1)))
        np.testing.assert_array_equal(many, np.tile(scores, 300))

    def test_a_score_does_not_depend_on_how_the_values_are_stored(self, fitted):
        single = OTHER.astype(np.float32)
        scores = fitted.decision_function(single.astype(np.float64))
        for form in (
            single,
            np.asfortranarray(single),
            single.tolist(),
            single[:, ::-1][:, ::-1],
            pd.DataFrame(single),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a fit without names, a table with them
                np.testing.assert_array_equal(fitted.decision_function(form), scores)
        whole = (OTHER * 10).astype(np.int64)
        np.testing.assert_array_equal(fitted.decision_function(whole), fitted.decision_function(whole.astype(float)))

    def test_scoring_changes_nothing(self, fitted):
        before = OTHER.copy()
        first = fitted.decision_function(OTHER)
        np.testing.assert_array_equal(fitted.decision_function(OTHER), first)
        np.testing.assert_array_equal(OTHER, before)

    def test_anomalies_score_higher(self, fitted):
        assert fitted.decision_function(np.full((1, 6), 30.0))[0] > fitted.decision_scores_.max()

    def test_far_rows_score_finite_and_ever_higher(self, fitted):
        distances = 10.0 ** np.arange(2, 308, 9)
        scores = fitted.decision_function(np.outer(distances, np.ones(6)))
        assert np.isfinite(scores).all()
        assert (np.diff(scores) > 0).all()

    # -- labels, probabilities -----------------------------------------------------------------

    def test_labels_follow_the_threshold(self, fitted):
        np.testing.assert_array_equal(fitted.labels_, (fitted.decision_scores_ > fitted.threshold_).astype(int))
        np.testing.assert_array_equal(fitted.predict(OTHER), fitted.decision_function(OTHER) > fitted.threshold_)
        assert fitted.labels_.sum() == 6  # the quantile lies at place 54 of 0 to 60

    @pytest.mark.parametrize("method", ["linear", "unify"])
    def test_probabilities(self, fitted, method):
        probabilities = fitted.predict_proba(OTHER, method=method)
        assert probabilities.shape == (23, 2)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        assert ((probabilities >= 0) & (probabilities <= 1)).all()
        np.testing.assert_array_equal(fitted.predict_proba(OTHER.tolist(), method=method), probabilities)
        pair = fitted.predict_proba(OTHER, method=method, return_confidence=True)
        np.testing.assert_array_equal(pair[1], fitted.predict_confidence(OTHER))

    def test_unknown_method(self, fitted):
        with pytest.raises(ValueError, match="method must be one of 'linear', 'unify', got 'cubic'"):
            fitted.predict_proba(OTHER, method="cubic")

    def test_confidence_and_rejection(self, fitted):
        labels, confidence = fitted.predict(OTHER, return_confidence=True)
        np.testing.assert_array_equal(labels, fitted.predict(OTHER))
        assert ((confidence >= 0) & (confidence <= 1)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rejected, stats = fitted.predict_with_rejection(OTHER, return_stats=True)
        np.testing.assert_array_equal(rejected[rejected != -2], labels[rejected != -2])
        assert stats == list(fitted.compute_rejection_stats())
        assert len(stats) == 3

    # -- tables that do not fit ----------------------------------------------------------------

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_named_by_row_and_column(self, fitted, value):
        bad = OTHER.copy()
        bad[5, 2] = bad[5, 4] = value
        what = "NaN" if np.isnan(value) else "infinity"
        for table in (bad, bad.astype(np.float32), bad.tolist()):
            with pytest.raises(ValueError, match=f"X contains {what}: row 5, column 2, 4"):
                fitted.decision_function(table)
        with pytest.raises(ValueError, match=f"X contains {what}: row 5, column 2, 4"):
            fitted.predict(bad)

    @pytest.mark.parametrize("width", [1, 5, 7])
    def test_wrong_width(self, fitted, width):
        with pytest.raises(ValueError, match=f"X has {width} features, but .* is expecting 6 features"):
            fitted.decision_function(np.zeros((3, width)))

    def test_wrong_shapes_and_kinds(self, fitted):
        with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
            fitted.decision_function(OTHER[0])
        with pytest.raises(ValueError, match="0 sample"):
            fitted.decision_function(OTHER[:0])
        with pytest.raises(TypeError, match=r"[Ss]parse"):
            fitted.decision_function(scipy.sparse.csr_matrix(OTHER))

    def test_a_failed_fit_leaves_what_was_there(self, fitted):
        state, scores = set(fitted.__dict__), fitted.decision_function(OTHER)
        bad = X[:, :4].copy()
        bad[3, 1] = np.nan
        for broken in (bad, X[:1], X[:, 0]):
            with pytest.raises(ValueError):
                fitted.fit(broken)
        fitted.set_params(lr=-1)
        with pytest.raises(ValueError, match="lr must be finite and > 0, got -1"):
            fitted.fit(OTHER)
        assert set(fitted.__dict__) == state
        np.testing.assert_array_equal(fitted.decision_function(OTHER), scores)
        assert fitted.n_features_in_ == 6

    def test_an_interrupted_fit_leaves_what_was_there(self, fitted):
        class Interrupted(torch.optim.SGD):
            def step(self, closure=None):
                super().step(closure)
                raise KeyboardInterrupt

        scores = fitted.decision_function(OTHER)
        fitted.set_params(optimizer=lambda parameters: Interrupted(parameters, lr=0.1))
        for method in (fitted.fit, fitted.partial_fit):
            with pytest.raises(KeyboardInterrupt):
                method(X)
            np.testing.assert_array_equal(fitted.decision_function(OTHER), scores)

    # -- randomness ----------------------------------------------------------------------------

    def test_a_fit_does_not_depend_on_what_was_before(self, fitted):
        fresh = self.make().fit(X)
        assert same(fitted, fresh)
        assert same(fitted.fit(OTHER).fit(X), fresh)
        assert same(clone(fitted).fit(X), fresh)
        assert same(copy.deepcopy(fitted), fresh)

    def test_the_seed_is_honoured(self, fitted):
        other = self.make(random_state=7).fit(X)
        assert not same(fitted, other)
        assert same(fitted.set_params(random_state=7).fit(X), other)

    # -- explanation ---------------------------------------------------------------------------

    def test_an_explanation_adds_up(self, fitted):
        found = fitted.explain(OTHER)
        np.testing.assert_array_equal(found.score, fitted.decision_function(OTHER))
        np.testing.assert_allclose(found.reconstruction + found.latent, found.score)
        np.testing.assert_allclose(found.contributions.sum(axis=1), found.reconstruction)
        assert found.contributions.shape == (23, 6)
        assert (found.contributions >= 0).all()

    def test_going_on_with_another_piece(self, fitted):
        scores = fitted.decision_function(OTHER)
        fitted.partial_fit(OTHER)
        assert not np.array_equal(fitted.decision_function(OTHER), scores)
        assert len(fitted.decision_scores_) == len(OTHER)
        with pytest.raises(ValueError, match="5 features"):
            fitted.partial_fit(OTHER[:, :5])


def test_the_contract_asks_before_it_computes():
    """NotFittedError comes first, whatever else is wrong."""
    from toll_plugin.pyod import TollDetector

    for method in ("decision_function", "predict", "predict_proba", "predict_confidence", "explain", "plot_latent"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(TollDetector(), method)([["nonsense"]])
