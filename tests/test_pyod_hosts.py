"""TollDetector inside what PyOD and scikit-learn build around detectors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from toll_plugin.pyod import TollDetector, register

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 6))
Y = np.zeros(120, dtype=int)
Y[::20] = 1
X[Y == 1] += RNG.choice([-6, 6], size=(6, 6))


def make(**parameters) -> TollDetector:
    return TollDetector(**{"max_steps": 100, "n_members": 2, "beta": 1.0} | parameters)


def several() -> list[TollDetector]:
    return [make(), make(random_state=1), make(beta=0.5), make(metric="euclidean")]


def finds(scores) -> bool:
    return roc_auc_score(Y, scores) > 0.9


LABELS = "PyOD labels are 0 and 1, scikit-learn's 1 and -1"


@parametrize_with_checks(
    [make(max_steps=10)],
    expected_failed_checks=lambda _: {"check_outliers_fit_predict": LABELS, "check_outliers_train": LABELS},
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_suod():
    from pyod.models.suod import SUOD

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = SUOD(several(), n_jobs=1, bps_flag=False, approx_flag_global=False, verbose=False).fit(X)
        assert finds(host.decision_function(X))


def test_feature_bagging():
    from pyod.models.feature_bagging import FeatureBagging

    host = FeatureBagging(make(), n_estimators=3, random_state=0).fit(X)
    assert finds(host.decision_function(X))
    assert len({detector.random_state for detector in host.estimators_}) == 3


def test_lscp():
    from pyod.models.lscp import LSCP

    assert finds(LSCP(several(), random_state=0).fit(X).decision_function(X))


def test_combinations():
    from pyod.models.combination import aom, average, maximization, moa
    from pyod.utils.utility import standardizer

    scores = standardizer(np.column_stack([detector.fit(X).decision_scores_ for detector in several()]))
    for combined in (average(scores), maximization(scores), aom(scores, 2), moa(scores, 2)):
        assert finds(combined)


def test_time_series():
    from pyod.models.ts_od import TimeSeriesOD

    series = np.sin(np.arange(300) / 5) + 0.05 * RNG.normal(size=300)
    series[150] = 5
    host = TimeSeriesOD(detector=make(), window_size=10).fit(series)
    assert abs(int(np.argmax(host.decision_scores_)) - 150) < 10


def test_embedding():
    from pyod.models.embedding import EmbeddingOD

    def encode(texts):
        return np.array([[len(text), text.count("a"), text.count("b")] for text in texts], dtype=float)

    texts = ["ab" * int(n) for n in RNG.integers(3, 8, size=40)] + ["b" * 60]
    host = EmbeddingOD(encoder=encode, detector=make()).fit(texts)
    assert int(np.argmax(host.decision_scores_)) == 40


def test_engine():
    from pyod.utils.ad_engine import ADEngine

    engine = ADEngine(random_state=3)
    register(engine)
    assert "TollDetector" in str(engine.list_detectors())
    plan = engine.make_plan(["TollDetector", "KNN"], params=[{"max_steps": 60, "n_members": 1}])
    assert engine.build_detector(plan).random_state == 3
    result = engine.run_detection(X, plan, X_test=X)
    assert finds(result["scores_test"])
    np.testing.assert_array_equal(result["scores_train"], result["scores_test"])


@pytest.mark.parametrize("name", ["FILTER", "IQR", "KARCH", "MTT"])
def test_thresholders(name):
    from pyod.models import thresholds

    thresholder = getattr(thresholds, name)()
    before = dict(vars(thresholder))
    detector = make(contamination=thresholder).fit(X)
    assert detector.contamination is thresholder
    assert vars(thresholder) == before  # a copy was fitted
    assert set(np.unique(detector.labels_)) <= {0, 1}
    assert 0 < detector.labels_.mean() < 0.5
    np.testing.assert_array_equal(detector.predict(X), detector.labels_)
    rejected, stats = detector.predict_with_rejection(X, return_stats=True)
    assert set(np.unique(rejected)) <= {-2, 0, 1}
    assert np.isfinite(stats).all()
    assert detector.predict_proba(X, return_confidence=True)[1].shape == (120,)
    np.testing.assert_array_equal(clone(detector).fit(X).labels_, detector.labels_)


def test_persistence_of_pyod(tmp_path):
    from pyod.utils import persistence

    detector = make().fit(X)
    persistence.save(detector, tmp_path / "detector.joblib")
    loaded = persistence.load(tmp_path / "detector.joblib", trusted=True)
    np.testing.assert_array_equal(loaded.decision_function(X), detector.decision_scores_)


def test_pipeline_and_searches():
    pipeline = make_pipeline(StandardScaler(), make()).fit(X)
    assert finds(pipeline.decision_function(X))
    search = GridSearchCV(make(), {"beta": [0.5, 1.0]}, scoring="roc_auc", cv=2).fit(X, Y)
    assert search.best_params_["beta"] in {0.5, 1.0}
    assert finds(search.best_estimator_.decision_function(X))
    assert (cross_val_score(make(), X, Y, scoring="roc_auc", cv=2) > 0.8).all()
    with pytest.raises(ValueError, match="Invalid parameter betta"):
        make().set_params(betta=1)


def test_scores_of_pyods_own_methods(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyOD has deprecated it
        assert make().fit_predict_score(X, Y) > 0.9
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = make().fit_predict(X, Y)
    np.testing.assert_array_equal(labels, make().fit(X).labels_)
