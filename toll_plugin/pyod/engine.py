"""Make the detector known to PyOD's ADEngine."""

from __future__ import annotations

import inspect
from typing import Any

from toll_plugin import __version__
from toll_plugin.pyod.detector import TollDetector

__all__ = ["register"]


def register(engine: Any) -> None:
    """Add :class:`TollDetector` to what an engine can list, plan, build and run.

    PyOD has no registry of detectors; each engine holds its own knowledge, which this adds to.

    Args:
        engine: A ``pyod.utils.ad_engine.ADEngine``.

    Example:
        >>> from pyod.utils.ad_engine import ADEngine
        >>> engine = ADEngine()
        >>> register(engine)
        >>> type(engine.build_detector(engine.make_plan(["TollDetector"]))).__name__
        'TollDetector'
    """
    first = inspect.getdoc(TollDetector) or ""
    engine.kb.algorithms[TollDetector.__name__] = {
        "class_path": f"{__package__}.{TollDetector.__name__}",
        "full_name": "Targeted collapse regularised autoencoder",
        "status": "shipped",
        "data_types": ["tabular"],
        "category": "deep_learning",
        "complexity": {
            "time": "O(max_steps * batch_size * weights) to fit, O(n * weights) to score",
            "space": "O(weights); only partial_fit keeps rows, at most 10 000",
        },
        "strengths": [
            "Ranks well when it is trained on normal rows",
            "Scores do not depend on the rows scored with them",
            "Explains a score by features",
        ],
        "weaknesses": ["Slower to fit than distance and histogram methods on small tables"],
        "best_for": first.splitlines()[0],
        "avoid_when": "The training rows hold many anomalies, or a fit must take milliseconds",
        "benchmark_refs": [],
        "benchmark_rank": {},
        "paper": {"id": "toll", "short": "arXiv 2306.12627"},
        "default_params": {"contamination": 0.1},
        "preprocessing_mode": "internal",
        "requires": ["torch"],
        "version_added": f"toll-plugin {__version__}",
    }
