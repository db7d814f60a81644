"""Bringing samples to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; a CUDA device goes on computing meanwhile, others are waited for.

    A plain copy to CUDA would begin after all that was asked of the device before, so each batch that is copied
    in a loop would make the loop wait.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
