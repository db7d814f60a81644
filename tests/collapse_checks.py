"""What the tests of targeted collapse measure by: norms one number at a time, hooks that are left."""

from __future__ import annotations

import math

import torch
from torch import nn


def norms_by_loops(latent: torch.Tensor, pool: str = "mean") -> list[float]:
    """Norm of each sample; positions are the last axis but one of tokens, and all axes but the first two of maps."""
    found = []
    for sample in latent.detach().double().numpy():
        if pool == "flatten" or sample.ndim == 1:
            found.append(math.sqrt(sum(float(v) ** 2 for v in sample.ravel())))
            continue
        rows = sample if sample.ndim == 2 else sample.reshape(len(sample), -1).T
        each = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in rows]
        found.append(sum(each) / len(each) if pool == "mean" else max(each))
    return found


def hooks_of(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())
