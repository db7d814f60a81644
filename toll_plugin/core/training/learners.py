"""What the training loop needs of the networks it trains, and the form for a network of any kind."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from toll_plugin.core.modes import batch_norm_fits, evaluating, training
from toll_plugin.core.objective import TollLoss, TollTerms
from toll_plugin.core.training.optimizers import MakeOptimizer, Optimizer

__all__ = ["AutogradLearner", "Learner"]


class Learner(ABC):
    """M networks that are trained on the same batches.

    Attributes:
        module: Holds all weights; its mode decides how batches are normalised.
        members: M.
        losses: Which members are trained by which loss.
        optimizer: Moves all weights.
    """

    module: nn.Module
    members: int
    losses: Sequence[tuple[slice, TollLoss]]
    optimizer: Optimizer

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute gradients; return the batch's mean of both terms, ``(2, M)``, weights not yet moved.

        The means stay on the device, which the loop need not wait for.
        """

    @abstractmethod
    def update(self) -> None:
        """Move the weights by the last gradients."""

    @abstractmethod
    def training(self) -> AbstractContextManager[None]:
        """The block in which the networks are trained; after it they hold what they have learned."""

    @abstractmethod
    def terms(self, inputs: Tensor, targets: Tensor) -> TollTerms[Tensor]:
        """Terms in evaluation mode without gradients, each ``(M, N)``."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every weight and buffer, each ``(M, *)``; writing to them changes the networks."""

    def totals(self, means: TollTerms[Tensor]) -> Tensor:
        """Each member's loss from the means of its terms, ``(..., M)`` as they are."""
        parts = [loss.of_means(TollTerms(*(mean[..., which] for mean in means))) for which, loss in self.losses]
        return torch.cat(parts, dim=-1)

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

    def optimizer_state(self) -> dict[str, Any] | None:
        """What the optimiser has gathered, to go on with in a later fit; ``None`` if it does not tell."""
        tell = getattr(self.optimizer, "state_dict", None)
        return None if tell is None else tell()

    def resume(self, state: dict[str, Any] | None) -> None:
        """Give the optimiser what :meth:`optimizer_state` returned."""
        if state is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state))  # type: ignore[attr-defined]


class AutogradLearner(Learner):
    """One network of any kind."""

    members = 1

    def __init__(self, network: nn.Module, loss: TollLoss, make: MakeOptimizer) -> None:
        self.module, self._loss = network, loss
        self.losses = [(slice(None), loss)]
        self.optimizer = make(network.parameters())

    @override
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with batch_norm_fits(self.module, len(inputs)):
            terms = self._loss.terms(targets, *self.module(inputs))
        self.optimizer.zero_grad()
        self._loss.losses(terms).mean().backward()
        return torch.stack([term.detach().mean() for term in terms])[:, None]

    @override
    def update(self) -> None:
        self.optimizer.step()

    @override
    def training(self) -> AbstractContextManager[None]:
        return training(self.module)

    @override
    @torch.no_grad()
    def terms(self, inputs: Tensor, targets: Tensor) -> TollTerms[Tensor]:
        with evaluating(self.module):
            terms = self._loss.terms(targets, *self.module(inputs))
        return TollTerms(*(term[None] for term in terms))

    @override
    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor[None] for tensor in self.module.state_dict().values())
