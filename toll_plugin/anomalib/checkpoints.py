"""Store and restore the classes of pre- and post-processor, which anomalib's checkpoints do not name."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from anomalib.models.components.base import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch import nn

from toll_plugin.anomalib.post_processor import QuantilePostProcessor, TollPostProcessor
from toll_plugin.anomalib.pre_processor import TollPreProcessor

__all__ = ["check_archive", "restore_components", "store_components"]

_COMPONENTS = "toll_components"
_KNOWN: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (PreProcessor, PostProcessor, TollPreProcessor, TollPostProcessor, QuantilePostProcessor)
}


def check_archive(path: str | Path) -> None:
    """Refuse a file that no checkpoint can be read from.

    Raises:
        ValueError: If it is truncated or no checkpoint.
    """
    if Path(path).is_file() and not is_zipfile(path):
        msg = f"{path} is no checkpoint or a truncated one: use another, training keeps the last complete file"
        raise ValueError(msg)


def store_components(model: AnomalibModule, checkpoint: dict[str, Any]) -> None:
    """Note the classes of pre- and post-processor; anomalib stores their configuration only."""
    checkpoint[_COMPONENTS] = {
        name: type(getattr(model, name)).__name__
        for name in ("pre_processor", "post_processor")
        if getattr(model, name) is not None
    }


def restore_components(model: AnomalibModule, checkpoint: dict[str, Any]) -> None:
    """Give the model the pre- and post-processor classes that the checkpoint was trained with.

    To be called before anomalib restores their configuration: another class would ignore it, and
    score otherwise without a word.

    Raises:
        ValueError: If a class is not known here, so that the caller has to pass an object of it.
    """
    for name, kind in checkpoint.get(_COMPONENTS, {}).items():
        component = getattr(model, name)
        if component is None or type(component).__name__ == kind:
            continue
        if kind not in _KNOWN:
            msg = f"the checkpoint was trained with {name} of class {kind}: pass one, got {type(component).__name__}"
            raise ValueError(msg)
        setattr(model, name, _KNOWN[kind]())
    if isinstance(model.pre_processor, TollPreProcessor):
        # The hyperparameters made it, and an override of theirs must not be undone.
        config = checkpoint.pop("anomalib_pre_processor_config", None) or {}
        if model.pre_processor.is_open and config.get("scaling_range") is not None:
            model.pre_processor.close(config["scaling_range"])  # which training measured
