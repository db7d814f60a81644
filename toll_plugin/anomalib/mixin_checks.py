"""Which of anomalib's models can take targeted collapse; the others are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anomalib.models.components import MemoryBankMixin
from anomalib.models.image import Cflow, Csflow, Dsr, Fastflow, Patchflow, Uflow
from lightning.pytorch import LightningModule

from toll_plugin.anomalib.patch_toll.lightning_model import PatchToll
from toll_plugin.anomalib.toll.lightning_model import Toll
from toll_plugin.core.checks import check_integer

__all__ = ["check_backward", "check_host"]

_FLOWS = (Cflow, Csflow, Fastflow, Patchflow, Uflow)


def check_host(kind: type, training_step: Callable[..., Any] | None) -> None:
    """Refuse a class whose host cannot take the term.

    Args:
        kind: The class with the mixin and its host among the bases.
        training_step: The host's own, if it has one.

    Raises:
        TypeError: If the host has no latent that is trained and could shrink, or has the term already.
    """
    if issubclass(kind, Toll | PatchToll):
        reason = "it has the term already, see its argument beta"
    elif issubclass(kind, MemoryBankMixin):
        reason = "it remembers features of a frozen network, so there is no latent to train"
    elif issubclass(kind, _FLOWS):
        reason = "a flow's likelihood already pulls its latent to the centre"
    elif issubclass(kind, Dsr):
        reason = "its bottleneck is instance-normalised and its codes come from a fixed codebook, so no norm can shrink"
    elif training_step in (None, LightningModule.training_step):
        reason = "it is not trained"
    else:
        return
    msg = f"{kind.__name__} cannot take targeted collapse: {reason}"
    raise TypeError(msg)


def check_backward(kind: str, backward: int | None, *, manual: bool) -> None:
    """Check that the class ``kind`` has a ``collapse_backward`` exactly where its host optimises manually.

    Raises:
        TypeError: If it lacks one, has one in vain, or it is no integer.
        ValueError: If it is negative.
    """
    if not manual and backward is not None:
        msg = f"collapse_backward is for hosts that optimise manually, which {kind} does not: leave it None"
        raise TypeError(msg)
    if manual and backward is None:
        msg = (
            f"{kind} optimises manually, so its loss never reaches the mixin: set the class "
            "attribute collapse_backward to the position, from 0, of the manual_backward that gets it"
        )
        raise TypeError(msg)
    if manual:
        check_integer("collapse_backward", backward, minimum=0)
