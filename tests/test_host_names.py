"""The private names of anomalib that the adapter uses: each is there, and each is listed."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path
from pydoc import locate

import pytest
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.models.components.base import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import EarlyStopping
from torchvision.transforms.v2 import Transform

import toll_plugin.anomalib
from toll_plugin.anomalib.host import PRIVATE_NAMES

HOSTS = (
    AnomalibDataModule,
    AnomalibDataset,
    AnomalibModule,
    EarlyStopping,
    F1AdaptiveThreshold,
    PostProcessor,
    PreProcessor,
    Transform,
)


def _has(kind, name):
    """Whether a class or one of its bases defines ``name``, or sets it on its objects."""
    return hasattr(kind, name) or f".{name}" in _set_on_objects(kind)


@cache
def _set_on_objects(kind):
    sources = (inspect.getsource(base) for base in kind.__mro__ if base.__module__ != "builtins")
    return {name for source in sources for name in re.findall(r"\bself(\.\w+)", source)}


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: private.name)
def test_the_installed_host_has_it(private):
    assert _has(locate(private.owner), private.name), (
        f"{private.owner} of the installed version has no {private.name} any more, "
        f"which toll_plugin/anomalib/{private.used_in} needs: {private.without_it}"
    )


def test_every_private_name_of_the_hosts_is_listed():
    folder = Path(toll_plugin.anomalib.__file__).parent
    used = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # An attribute, a method or a class variable.
            name = getattr(node, "attr", None) or getattr(node, "name", None) or getattr(node, "id", None)
            if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                used.add(name)
    of_hosts = {name for name in used if any(_has(host, name) for host in HOSTS)}
    assert of_hosts == {private.name for private in PRIVATE_NAMES}
