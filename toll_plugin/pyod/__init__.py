"""Toll for PyOD: detectors for tables. Importing this loads PyOD and torch, not anomalib."""

from toll_plugin._public import publish
from toll_plugin.pyod.collapsed import CollapsedAE1SVM, CollapsedAutoEncoder, CollapsedDeepSVDD, CollapsedVAE
from toll_plugin.pyod.detector import TollDetector
from toll_plugin.pyod.engine import register
from toll_plugin.pyod.explanation import Explanation
from toll_plugin.pyod.mixin import TargetedCollapseMixin
from toll_plugin.pyod.scale.batches import BatchScorer
from toll_plugin.pyod.scale.parquet import Parquet
from toll_plugin.pyod.scale.scoring import ScoredParquet, score_parquet

__all__ = [
    "BatchScorer",
    "CollapsedAE1SVM",
    "CollapsedAutoEncoder",
    "CollapsedDeepSVDD",
    "CollapsedVAE",
    "Explanation",
    "Parquet",
    "ScoredParquet",
    "TargetedCollapseMixin",
    "TollDetector",
    "register",
    "score_parquet",
]

publish(__name__)
