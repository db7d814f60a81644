"""Training and evaluation modes, switched for a block and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_norm_fits", "evaluating", "training"]


@contextmanager
def _mode(module: nn.Module, train: bool) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    module.train(train)
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """Evaluation mode for the block; each submodule returns to its own mode after it."""
    return _mode(module, train=False)


def training(module: nn.Module) -> AbstractContextManager[None]:
    """Training mode for the block; each submodule returns to its own mode after it."""
    return _mode(module, train=True)


@contextmanager
def batch_norm_fits(module: nn.Module, n_samples: int) -> Iterator[None]:
    """Let a training step run on a batch of one sample.

    One sample has no batch statistics (torch refuses it where a channel holds one value), so
    for the block its BatchNorm layers use the running ones. Other batches are left alone.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training] if n_samples == 1 else []
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
