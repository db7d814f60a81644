"""Names inside PyOD that the adapter leans on: each is there, and each use is listed."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import toll_plugin
from toll_plugin.pyod import host, register


@cache
def fitted(owner: str) -> object:
    """An object of a class, fitted where that can be."""
    module, _, name = owner.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if name == "ADEngine":
        return kind()
    small = {"AE1SVM": {"epochs": 1}, "DeepSVDD": {"n_features": 3, "epochs": 1, "verbose": 0}}
    if name == "BaseDetector":
        kind = importlib.import_module("pyod.models.hbos").HBOS
    if name == "BaseDeepLearningDetector":
        kind = importlib.import_module("pyod.models.auto_encoder").AutoEncoder
        small = {name: {"epoch_num": 1, "batch_size": 8, "verbose": 0}}
    detector = kind(**small.get(name, {}))
    detector.fit(np.random.default_rng(0).normal(size=(40, 3)))
    return detector


@pytest.mark.parametrize("one", host.INNER_NAMES, ids=lambda one: f"{one.owner.rpartition('.')[2]}.{one.name}")
def test_the_installed_pyod_has_it(one):
    assert hasattr(fitted(one.owner), one.name), f"without it: {one.without_it} (toll_plugin.pyod.{one.used_in})"
    source = importlib.import_module(f"toll_plugin.pyod.{one.used_in}").__file__
    assert one.name in Path(source).read_text(encoding="utf-8")


def test_the_engine_is_told_this_version():
    engine = fitted("pyod.utils.ad_engine.ADEngine")
    register(engine)
    assert engine.kb.algorithms["TollDetector"]["version_added"] == f"toll-plugin {toll_plugin.__version__}"
