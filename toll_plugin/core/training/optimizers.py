"""Optimisers by name, and Adam in the form that suits one long parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from toll_plugin.core.checks import check_finite_float, check_integer, check_option

__all__ = ["MakeOptimizer", "Optimizer", "cosine_adam", "optimizer_of"]


class Optimizer(Protocol):
    """What the loop needs of one; ``torch.optim``'s have it."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> Any:
        """Move the parameters by their gradients."""


MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class _Adam:
    """torch's Adam for one parameter, by the call at its bottom: what lies above it costs more than the arithmetic."""

    def __init__(self, parameter: nn.Parameter, lr: float) -> None:
        self._parameter, self.lr = parameter, lr
        self._value = parameter.detach()  # the same memory, which no gradient flows through
        self._first, self._second = torch.zeros_like(self._value), torch.zeros_like(self._value)
        self._steps = torch.zeros(())

    def zero_grad(self) -> None:
        self._parameter.grad = None

    def step(self) -> None:
        if self._parameter.grad is None:
            return
        self._steps += 1
        torch._fused_adam_(
            [self._value],
            [self._parameter.grad],
            [self._first],
            [self._second],
            [],
            [self._steps],
            lr=self.lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "second": self._second, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._second, self._steps = (state[name].clone() for name in ("first", "second", "steps"))


_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer_of(optimizer: MakeOptimizer | str, lr: float) -> MakeOptimizer:
    """What makes the optimiser that is named, at learning rate ``lr``.

    Raises:
        TypeError: If ``optimizer`` is neither a name nor callable, or ``lr`` no number.
        ValueError: If the name is unknown, or ``lr`` is not finite and more than 0.
    """
    lr = check_finite_float("lr", lr, minimum=0, exclusive=True)
    if callable(optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        msg = f"optimizer must be a name or take the parameters and return an optimiser, got {optimizer!r}"
        raise TypeError(msg)
    check_option("optimizer", optimizer, _OPTIMIZERS)
    kind = _OPTIMIZERS[optimizer]

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        held = list(parameters)
        if optimizer == "adam" and len(held) == 1 and held[0].device.type == "cpu":
            return _Adam(held[0], lr)
        # One fused call instead of one per parameter and operation.
        fused = all(parameter.device.type in {"cpu", "cuda"} for parameter in held)
        made: Optimizer = kind(held, lr=lr, fused=fused)
        return made

    return make


def cosine_rate(lr: float, step: int, steps: int) -> float:
    """The learning rate of a step, from 0, of a fit of ``steps``: a rise over the first tenth, half a cosine over all.

    After the last step it is 0.

    Example:
        >>> [round(cosine_rate(1.0, step, 20), 3) for step in (0, 1, 10, 19, 20)]
        [0.5, 0.994, 0.5, 0.006, 0.0]
    """
    done = min(step / steps, 1.0)
    return lr * min(1.0, 10 * (done + 1 / steps)) * (1 + math.cos(math.pi * done)) / 2


class _CosineAdam:
    """Adam at the :func:`cosine_rate` of each step."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, steps: int) -> None:
        self._adam = optimizer_of("adam", lr)(parameters)
        self._lr, self._steps, self._step = lr, steps, 0

    def zero_grad(self) -> None:
        self._adam.zero_grad()

    def step(self) -> None:
        lr = cosine_rate(self._lr, self._step, self._steps)
        if isinstance(self._adam, _Adam):
            self._adam.lr = lr
        else:
            for group in self._adam.param_groups:  # type: ignore[attr-defined]
                group["lr"] = lr
        self._adam.step()
        self._step += 1


def cosine_adam(lr: float, steps: int) -> MakeOptimizer:
    """Adam at ``lr`` for a fit of so many steps: a short rise, then half a cosine down to zero.

    Raises:
        TypeError: If ``lr`` is no number, or ``steps`` no integer.
        ValueError: If ``lr`` is not finite and more than 0, or ``steps`` less than 1.

    Example:
        >>> import torch
        >>> from toll_plugin.core import ConvAutoencoder, TollLoss, fit
        >>> net, steps = ConvAutoencoder(8, latent_dim=4, width=4), 3
        >>> images, optimizer = torch.rand(16, 1, 8, 8), cosine_adam(5e-4, steps)
        >>> history = fit(net, images, TollLoss("auto"), optimizer=optimizer, max_steps=steps)
        >>> len(history.total)
        3
    """
    lr = check_finite_float("lr", lr, minimum=0, exclusive=True)
    steps = check_integer("steps", steps, minimum=1)
    return lambda parameters: _CosineAdam(parameters, lr, steps)
