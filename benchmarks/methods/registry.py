"""Methods by name: what an experiment may compare on images and on tables."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from benchmarks.interfaces import Budget, Detector
from benchmarks.methods.engine import EngineDetector
from benchmarks.methods.models import MODELS
from benchmarks.methods.peers import PEERS
from benchmarks.methods.tables import COLLAPSED, DETERMINISTIC, ON_PIXELS, PYOD, TableDetector

__all__ = ["DETERMINISTIC", "METHODS", "RESERVED", "Build", "build"]

#: What methods must not be given: seeds, weights and what the benchmarks have no use for.
RESERVED = ("budget", "evaluator", "pre_trained", "random_state", "seed", "visualizer")


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
    "table": {name: partial(TableDetector, name) for name in ("TollDetector", *PYOD, *COLLAPSED)},
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
