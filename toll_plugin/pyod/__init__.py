"""Toll for PyOD: detectors for tables. Importing this loads PyOD and torch, not anomalib."""

from toll_plugin.pyod.detector import TollDetector
from toll_plugin.pyod.engine import register
from toll_plugin.pyod.explanation import Explanation

__all__ = ["Explanation", "TollDetector", "register"]
