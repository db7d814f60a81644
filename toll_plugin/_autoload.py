"""Make ``--model Toll`` work in anomalib, which has no plugin discovery of its own.

torch calls :func:`arm` at the end of ``import torch`` (entry point group ``torch.backends``,
torch's own autoload; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches it off, after which the dotted
path ``toll_plugin.anomalib.Toll`` still works). All it does is wait for anomalib's models to be
imported and import :mod:`toll_plugin.anomalib` behind them. Whoever never imports anomalib pays
for this file alone, which is why it may use the standard library only, and must never raise: an
exception here would break ``import torch``.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["arm"]

# Not anomalib.models itself: whoever imports that first has it half executed when torch arrives.
# Its image models come last, when the base class and all that the adapter needs are there.
_TRIGGER = "anomalib.models.image"
_ADAPTER = "toll_plugin.anomalib"


def arm() -> None:
    """Register the adapter as soon as anomalib's models are there. Never raises."""
    try:
        module = sys.modules.get(_TRIGGER)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:  # noqa: BLE001  an exception here would break `import torch`
        _complain(error)


def _register() -> None:
    try:
        importlib.import_module(_ADAPTER)
    except Exception as error:  # noqa: BLE001  or the import of anomalib
        _complain(error)


def _complain(error: Exception) -> None:
    message = f"toll_plugin could not register its models with anomalib: {type(error).__name__}: {error}"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here, and an error would break the import
        sys.stderr.write(message + "\n")


class _Finder(MetaPathFinder):
    """Finds the trigger as everyone else would, and lends it a loader that also registers."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Only a real import gets here; a mere find_spec must leave the finder armed.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()
