"""What the training loop needs of the networks it trains, for autograd and for the dense ensemble."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from typing_extensions import override

from toll_plugin.core.checks import check_finite_float, check_integer, check_option
from toll_plugin.core.modes import batch_norm_fits, evaluating
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import TollLoss, TollTerms
from toll_plugin.core.training.ensemble import Array, DenseEnsemble

__all__ = [
    "AutogradLearner",
    "DenseLearner",
    "Learner",
    "MakeOptimizer",
    "Optimizer",
    "cosine_adam",
    "optimizer_of",
]


class Optimizer(Protocol):
    """What the loop needs of one; ``torch.optim``'s have it."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> Any:
        """Move the parameters by their gradients."""


MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class _Adam:
    """torch's Adam for one parameter, by its functional form: a step of the class costs more than the arithmetic."""

    def __init__(self, parameter: nn.Parameter, lr: float) -> None:
        self._parameter, self.lr = parameter, lr
        self._first, self._second = torch.zeros_like(parameter.detach()), torch.zeros_like(parameter.detach())
        self._steps = torch.zeros(())

    def zero_grad(self) -> None:
        self._parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        if self._parameter.grad is None:
            return
        adam(
            [self._parameter],
            [self._parameter.grad],
            [self._first],
            [self._second],
            [],
            [self._steps],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


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


class _CosineAdam:
    """Adam whose learning rate rises over a tenth of the steps and falls along half a cosine over all."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, steps: int) -> None:
        self._adam = optimizer_of("adam", lr)(parameters)
        self._lr, self._steps, self._step = lr, steps, 0

    def zero_grad(self) -> None:
        self._adam.zero_grad()

    def step(self) -> None:
        done = min(self._step / self._steps, 1.0)
        lr = self._lr * min(1.0, 10 * (done + 1 / self._steps)) * (1 + math.cos(math.pi * done)) / 2
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
    """
    lr = check_finite_float("lr", lr, minimum=0, exclusive=True)
    steps = check_integer("steps", steps, minimum=1)
    return lambda parameters: _CosineAdam(parameters, lr, steps)


class Learner(ABC):
    """M networks that are trained on the same batches.

    Attributes:
        module: Holds all weights; its mode decides how batches are normalised.
        members: M.
    """

    module: nn.Module
    members: int

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor) -> list[list[float]]:
        """Compute gradients; return the batch's mean of both terms for each member, weights not yet moved."""

    @abstractmethod
    def update(self) -> None:
        """Move the weights by the last gradients."""

    @abstractmethod
    def terms(self, inputs: Tensor, targets: Tensor) -> TollTerms:
        """Terms in evaluation mode without gradients, each ``(M, N)``."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every weight and buffer, each ``(M, *)``; writing to them changes the networks."""

    def copy(self) -> list[Tensor]:
        """A copy of every weight and buffer."""
        return [tensor.detach().clone() for tensor in self.tensors()]

    @torch.no_grad()
    def overwrite(self, copies: list[Tensor], which: Tensor) -> None:
        """Replace members of ``copies`` by the present weights where ``which``, shape ``(M,)``, is true."""
        for kept, now in zip(copies, self.tensors(), strict=True):
            kept[which] = now[which]

    @torch.no_grad()
    def put_back(self, copies: list[Tensor]) -> None:
        """Take the weights from ``copies``."""
        for tensor, kept in zip(self.tensors(), copies, strict=True):
            tensor.copy_(kept)


class AutogradLearner(Learner):
    """One network of any kind."""

    members = 1

    def __init__(self, network: nn.Module, loss: TollLoss, make: MakeOptimizer) -> None:
        self.module, self._loss = network, loss
        self._optimizer = make(network.parameters())

    @override
    def step(self, inputs: Tensor, targets: Tensor) -> list[list[float]]:
        with batch_norm_fits(self.module, len(inputs)):
            terms = self._loss.terms(targets, *self.module(inputs))
        self._optimizer.zero_grad()
        self._loss.score(terms).mean().backward()  # type: ignore[no-untyped-call]
        return torch.stack([term.detach().mean() for term in terms])[:, None].tolist()

    @override
    def update(self) -> None:
        self._optimizer.step()

    @override
    @torch.no_grad()
    def terms(self, inputs: Tensor, targets: Tensor) -> TollTerms:
        with evaluating(self.module):
            terms = self._loss.terms(targets, *self.module(inputs))
        return TollTerms(*(term[None] for term in terms))

    @override
    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor[None] for tensor in self.module.state_dict().values())


class DenseLearner(Learner):
    """Several dense autoencoders on the CPU at once, by the step that :class:`DenseEnsemble` writes out."""

    def __init__(
        self,
        networks: Sequence[DenseAutoencoder],
        loss: TollLoss,
        make: MakeOptimizer,
        generator: torch.Generator,
    ) -> None:
        self.module = self.ensemble = DenseEnsemble(networks, generator=generator)
        self.members = self.ensemble.members
        self._loss = loss
        self._optimizer = make([self.ensemble.flat])

    def _terms(self, x: Array, reconstruction: Array, latent: Array) -> TollTerms:
        """The terms of all members' samples as NumPy arrays, one member after the other."""
        # Views if there is one member, else copies with the samples first.
        rows: Any = [array.swapaxes(1, 2).reshape(-1, array.shape[1]) for array in (reconstruction, latent)]
        targets: Any = np.tile(x, (self.members, 1)) if self.members > 1 else x
        return self._loss.terms(targets, *rows)

    @override
    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor) -> list[list[float]]:
        reconstruction, latent = self.ensemble.run(inputs.numpy())
        x = targets.numpy()
        terms: Any = self._terms(x, reconstruction, latent)
        # Divided by the samples of one member: each has its own weights, so their gradients do not mix.
        slopes: Any = self._loss.slopes(terms)
        a, b = (slope.reshape(self.members, 1, -1) / len(x) for slope in slopes)
        reconstruction -= x.T
        reconstruction *= a
        self.ensemble.backward(reconstruction, latent * b)
        return [(np.add.reduce(term.reshape(self.members, -1), axis=1) / len(x)).tolist() for term in terms]

    @override
    def update(self) -> None:
        self.ensemble.flat.grad = self.ensemble.gradient  # an optimiser may have let it go
        self._optimizer.step()

    @override
    @torch.no_grad()
    def terms(self, inputs: Tensor, targets: Tensor) -> TollTerms:
        with evaluating(self.ensemble):
            terms: Any = self._terms(targets.numpy(), *self.ensemble.run(inputs.numpy()))
        return TollTerms(*(torch.from_numpy(term).view(self.members, -1) for term in terms))

    @override
    def tensors(self) -> Iterator[Tensor]:
        yield from self.ensemble.member_tensors()
