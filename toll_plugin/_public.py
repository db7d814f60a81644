"""Names by which users know what they import."""

from __future__ import annotations

import sys
from types import FunctionType

__all__ = ["publish"]


def publish(package: str) -> None:
    """Let the classes and functions in ``__all__`` of ``package`` say that they live there.

    Where a module lies below the package is not for pickles, saved configurations and error messages to
    know: they carry the public path, and the module may move.
    """
    module = sys.modules[package]
    for name in module.__all__:
        found = getattr(module, name)
        if isinstance(found, type | FunctionType):
            found.__module__ = package
