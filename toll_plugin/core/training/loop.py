"""Epochs over shuffled batches: the one training loop, for anything that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.core.networks import check_input
from toll_plugin.core.objective import TollLoss, TollTerms
from toll_plugin.core.rows import Rows
from toll_plugin.core.training.divergence import DivergenceGuard
from toll_plugin.core.training.learners import Learner

__all__ = ["History", "Loop"]


@dataclass
class History:
    """What a fit measured, one entry per epoch.

    Attributes:
        total: Mean training loss.
        reconstruction: Its reconstruction term.
        latent: Its latent term, unweighted.
        validation: Mean loss of the held-out samples; empty without any.
        best_epoch: Epoch, counted from 0, whose weights the network holds.
    """

    total: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    latent: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = -1


class Loop:
    """Epochs over shuffled batches, for any :class:`Learner`."""

    def __init__(
        self,
        learner: Learner,
        loss: TollLoss,
        x: Tensor | Rows,
        validation: Tensor | Rows | None,
        batch_size: int,
        max_epochs: int | None,
        max_steps: int | None,
        patience: int | None,
        noise: float,
        input_limit: float | None,
        generator: torch.Generator,
    ) -> None:
        check_integer("batch_size", batch_size, minimum=1)
        limits = {"max_epochs": max_epochs, "max_steps": max_steps}
        for name, value in (limits | {"patience": patience}).items():
            if value is not None:
                check_integer(name, value, minimum=1)
        if max_epochs is None and max_steps is None:
            msg = "max_epochs and max_steps must not both be None: nothing would end the fit"
            raise ValueError(msg)
        for name, samples in (("x", x), ("validation", validation)):
            _check_samples(name, samples, learner.module)
        self._learner, self._loss, self._x, self._validation = learner, loss, x, validation
        self._batch_size, self._patience, self._generator = batch_size, patience, generator
        self._noise = check_finite_float("noise", noise, minimum=0)
        self._limit = None if input_limit is None else check_finite_float("input_limit", input_limit, minimum=0)
        n, size = len(x), batch_size
        per_epoch = -(-n // size) - (n % size == 1 and 1 < size < n)
        self._steps = min(
            math.inf if max_epochs is None else max_epochs * per_epoch, math.inf if max_steps is None else max_steps
        )
        self._guard = DivergenceGuard(learner.module)
        self._histories = [History() for _ in range(learner.members)]

    def run(self, progress: bool, on_epoch: Callable[[int, list[History]], None] | None) -> list[History]:
        """Train to the end; return each member's history, its best weights in place."""
        members, histories = self._learner.members, self._histories
        best, best_weights = torch.full((members,), math.inf, dtype=torch.float64), self._learner.copy()
        step, epoch = 0, 0
        with _bar(int(self._steps), progress) as advance:
            while step < self._steps:
                step = self._one_epoch(step, advance)
                if self._validation is None:
                    self._guard.keep(step - 1)
                    for history in histories:
                        history.best_epoch = epoch
                else:
                    held_out = self._held_out(self._validation)
                    # Before the weights are kept: they can be finite and yet far gone.
                    self._guard.check(step - 1, validation=float(held_out.sum()))
                    self._guard.keep(step - 1)
                    better = held_out < best
                    best = torch.where(better, held_out, best)
                    self._learner.overwrite(best_weights, better)
                    for history, value, improved in zip(histories, held_out.tolist(), better.tolist(), strict=True):
                        history.validation.append(value)
                        history.best_epoch = epoch if improved else history.best_epoch
                if on_epoch is not None:
                    on_epoch(epoch, histories)
                waited = epoch - max(history.best_epoch for history in histories)
                if self._patience is not None and waited >= self._patience:
                    break
                epoch += 1
        if self._validation is not None:
            self._learner.put_back(best_weights)
        return histories

    def _one_epoch(self, step: int, advance: Callable[[], object]) -> int:
        members = self._learner.members
        sums, seen = ([0.0] * members, [0.0] * members), 0
        order = torch.randperm(len(self._x), generator=self._generator)
        for index in self._batches(order):
            if step == self._steps:
                break
            targets = self._x[index]
            means = self._learner.step(self._noisy(self._clipped(targets)), targets)
            self._guard.check(step, **self._named(*(sum(values) / members for values in means)))
            self._learner.update()
            advance()
            for term, values in zip(sums, means, strict=True):
                for member, value in enumerate(values):
                    term[member] += value * len(targets)
            seen, step = seen + len(targets), step + 1
        for member, history in enumerate(self._histories):
            for name, mean in self._named(*(term[member] / seen for term in sums)).items():
                getattr(history, name).append(mean)
        return step

    def _named(self, reconstruction: float, latent: float) -> dict[str, float]:
        # The mean of a sum is the sum of the means, and plain numbers add up as tensors do.
        total: Any = self._loss.score(TollTerms(reconstruction, latent))  # type: ignore[arg-type]
        return {"total": total, "reconstruction": reconstruction, "latent": latent}

    def _batches(self, order: Tensor) -> list[Tensor]:
        batches = list(torch.split(order, self._batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1 < self._batch_size:
            # One sample has no batch statistics, so it joins the batch before it.
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self._limit is None else x.clamp(-self._limit, self._limit)

    def _noisy(self, x: Tensor) -> Tensor:
        if self._noise == 0:
            return x
        drawn = torch.randn(x.shape, generator=self._generator, dtype=x.dtype)
        return x + self._noise * drawn.to(x.device)

    def _held_out(self, validation: Tensor | Rows) -> Tensor:
        """Mean held-out loss of each member."""
        sums = torch.zeros(2, self._learner.members, dtype=torch.float64)
        for start in range(0, len(validation), _EVALUATION_BATCH):
            targets = validation[slice(start, start + _EVALUATION_BATCH)]
            terms = self._learner.terms(self._clipped(targets), targets)
            sums += torch.stack(terms).cpu().double().sum(dim=2)
        return self._loss.score(TollTerms(*(sums / len(validation))))


_EVALUATION_BATCH = 1024


def _check_samples(name: str, samples: Tensor | Rows | None, network: nn.Module) -> None:
    if samples is None:
        return
    if isinstance(samples, Tensor):
        check_input(network, samples)
    if len(samples) == 0 or (isinstance(samples, Tensor) and not bool(samples.isfinite().all())):
        shape = tuple(samples.shape) if isinstance(samples, Tensor) else (len(samples),)
        msg = f"{name} must hold at least one sample and only finite values, got shape {shape}"
        raise ValueError(msg)


@contextmanager
def _bar(steps: int, show: bool) -> Iterator[Callable[[], object]]:
    if not show:
        yield lambda: None
        return
    from tqdm.auto import tqdm  # noqa: PLC0415  whoever wants no bar need not load it

    with tqdm(total=steps, desc="fit", unit="step") as bar:
        yield bar.update
