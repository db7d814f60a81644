"""The names inside PyOD 3.6 that this package uses beyond its public interface.

None of them is promised to stay. They are listed once, here, with what breaks without each; a test looks for them in
the installed version, so that an upgrade that lost one fails by its name.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["INNER_NAMES", "InnerName"]


class InnerName(NamedTuple):
    """One name inside PyOD.

    Attributes:
        owner: Import path of the class that has it.
        name: Attribute or method; of a fitted detector where no method of the class has this name.
        used_in: Module of ``toll_plugin.pyod`` that uses it.
        without_it: What would break.
    """

    owner: str
    name: str
    used_in: str
    without_it: str


_BASE = "pyod.models.base.BaseDetector"
_DEEP = "pyod.models.base_dl.BaseDeepLearningDetector"

INNER_NAMES = (
    InnerName(_BASE, "_process_decision_scores", "base", "no threshold, no labels"),
    InnerName(_BASE, "_classes", "base", "predict_confidence takes the detector for an unfitted one"),
    InnerName(_BASE, "_mu", "base", "predict_proba(method='unify') has no mean"),
    InnerName(_BASE, "_sigma", "base", "predict_proba(method='unify') has no deviation"),
    InnerName(_DEEP, "training_forward", "mixin", "the term does not enter the loss"),
    InnerName(_DEEP, "evaluating_forward", "mixin", "the term does not enter the score"),
    InnerName(_DEEP, "criterion", "mixin", "the term does not enter the loss"),
    InnerName(_DEEP, "feature_size", "mixin", "an unfitted detector fails with an AttributeError"),
    InnerName("pyod.models.ae1svm.AE1SVM", "model", "collapsed", "the network is not found while it is trained"),
    InnerName("pyod.models.deep_svdd.DeepSVDD", "model_", "collapsed", "the network is not found while it is trained"),
    InnerName("pyod.utils.ad_engine.ADEngine", "kb", "engine", "register cannot add the detector"),
)
