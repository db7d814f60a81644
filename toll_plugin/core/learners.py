"""What the training loop needs of the networks it trains, for autograd and for the dense ensemble."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from toll_plugin.core.checks import check_finite_float, check_option
from toll_plugin.core.dense import DenseEnsemble
from toll_plugin.core.modes import batch_norm_fits, evaluating
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import TollLoss, TollTerms

__all__ = ["AutogradLearner", "DenseLearner", "Learner", "MakeOptimizer", "Rows", "optimizer_of"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

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

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        held = list(parameters)
        # One fused call instead of one per parameter and operation.
        fused = all(parameter.device.type in {"cpu", "cuda"} for parameter in held)
        made: torch.optim.Optimizer = kind(held, lr=lr, fused=fused)
        return made

    return make


class Rows(Protocol):
    """Samples that are fetched when they are needed; a tensor is one."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The samples at ``index``, shape ``(N, *)``."""


class Learner(ABC):
    """M networks that are trained on the same batches.

    Attributes:
        module: Holds all weights; its mode decides how batches are normalised.
        members: M.
    """

    module: nn.Module
    members: int

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute gradients; return the mean terms of the batch, shape ``(2, M)``, weights not yet moved."""

    @abstractmethod
    def update(self) -> None:
        """Move the weights by the last gradients."""

    @abstractmethod
    def terms(self, x: Tensor) -> TollTerms:
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
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with batch_norm_fits(self.module, len(inputs)):
            terms = self._loss.terms(targets, *self.module(inputs))
        self._optimizer.zero_grad()
        self._loss.score(terms).mean().backward()  # type: ignore[no-untyped-call]
        return torch.stack([term.detach().mean() for term in terms])[:, None]

    @override
    def update(self) -> None:
        self._optimizer.step()

    @override
    @torch.no_grad()
    def terms(self, x: Tensor) -> TollTerms:
        with evaluating(self.module):
            terms = self._loss.terms(x, *self.module(x))
        return TollTerms(*(term[None] for term in terms))

    @override
    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor[None] for tensor in self.module.state_dict().values())


class DenseLearner(Learner):
    """Several dense autoencoders at once; only the loss itself goes through autograd."""

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

    def _terms(self, x: Tensor, reconstruction: Tensor, latent: Tensor) -> TollTerms:
        """All members' rows as one batch."""
        x = x.expand_as(reconstruction)
        return self._loss.terms(x.flatten(0, 1), reconstruction.flatten(0, 1), latent.flatten(0, 1))

    @override
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = self.ensemble(inputs)
        for output in outputs:
            output.requires_grad_()
        terms = self._terms(targets, *outputs)
        # The sum over members: each has its own weights, so their gradients do not mix.
        value = self._loss.score(terms).sum() / len(inputs)
        self.ensemble.backward(*torch.autograd.grad(value, outputs))
        return torch.stack(terms).detach().view(2, self.members, -1).mean(dim=2)

    @override
    def update(self) -> None:
        self._optimizer.step()

    @override
    @torch.no_grad()
    def terms(self, x: Tensor) -> TollTerms:
        with evaluating(self.ensemble):
            terms = self._terms(x, *self.ensemble(x))
        return TollTerms(*(term.view(self.members, -1) for term in terms))

    @override
    def tensors(self) -> Iterator[Tensor]:
        yield from self.ensemble.member_tensors()
