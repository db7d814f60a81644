"""Epochs over shuffled batches: the one training loop, for anything that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from toll_plugin.core.devices import to_device
from toll_plugin.core.networks import check_input
from toll_plugin.core.objective import TollTerms
from toll_plugin.core.rows import Rows, batches_of, random_order
from toll_plugin.core.training.divergence import DivergenceGuard
from toll_plugin.core.training.learners import Learner
from toll_plugin.core.training.options import TrainingOptions

__all__ = ["History", "Loop", "OnEpoch"]


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


#: Called after each epoch with its number, from 0, and the histories so far.
OnEpoch = Callable[[int, list[History]], None]

#: What is measured in each step, by the names of the history.
_NAMES = ("total", "reconstruction", "latent")
#: Held-out samples per pass.
_EVALUATION_BATCH = 1024
#: Steps whose losses are looked at together: looking means waiting for the device.
_LOOKED_AT = 64


class Loop:
    """Epochs over shuffled batches, for any :class:`Learner`.

    Args:
        learner: What is trained.
        x: The samples.
        validation: Held-out samples, whose lowest loss chooses the epoch; ``None`` for none.
        options: Of the training.
        generator: Source of the order of the samples and of noise.

    Raises:
        ValueError: If there are no samples, they do not fit the network or are not finite, or
            ``patience`` is asked for without held-out samples.
    """

    def __init__(
        self,
        learner: Learner,
        x: Tensor | Rows,
        validation: Tensor | Rows | None,
        options: TrainingOptions,
        generator: torch.Generator,
    ) -> None:
        for name, samples in (("x", x), ("validation", validation)):
            _check_samples(name, samples, learner.module)
        self._learner, self._x, self._validation = learner, x, validation
        self._options, self._generator = options, generator
        self._patience = options.epochs_to_wait(held_out=validation is not None)
        self._steps = options.steps(len(x))
        self._guard = DivergenceGuard(learner.module)
        self._histories = [History() for _ in range(learner.members)]

    def run(self, progress: bool, on_epoch: OnEpoch | None) -> list[History]:
        """Train to the end; return each member's history, its best weights in place."""
        members, histories = self._learner.members, self._histories
        best, best_weights = torch.full((members,), math.inf, dtype=torch.float64), self._learner.copy()
        step, epoch = 0, 0
        with _bar(self._steps, progress) as advance:
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
        """Steps over all samples once, or to the end of the fit; return the number of the next step."""
        sums = [[0.0] * self._learner.members for _ in range(2)]
        seen = 0
        waiting: list[tuple[int, Tensor]] = []
        # One batch more than steps are left tells a last batch of one sample from the end of a longer order.
        needed = (self._steps - step + 1) * self._options.batch_size
        order = random_order(len(self._x), needed, self._generator)
        if isinstance(self._x, Tensor):
            order = order.to(self._x.device)  # once, for an index on another device is copied in each step
        batches = self._batches(order)[: self._steps - step]
        for i, targets in enumerate(batches_of(self._x, batches), start=1):
            waiting.append((len(targets), self._learner.step(self._noisy(self._clipped(targets)), targets)))
            self._learner.update()
            advance()
            step += 1
            if len(waiting) == _LOOKED_AT or i == len(batches):
                self._look(step - len(waiting), waiting, sums)
                seen += sum(count for count, _ in waiting)
                waiting.clear()
        terms = TollTerms(*(torch.tensor(term, dtype=torch.float64) / seen for term in sums))
        for name, means in zip(_NAMES, (self._learner.totals(terms), *terms), strict=True):
            for history, mean in zip(self._histories, means.tolist(), strict=True):
                getattr(history, name).append(mean)
        return step

    def _look(self, first: int, steps: list[tuple[int, Tensor]], sums: list[list[float]]) -> None:
        """Add what the steps from ``first`` on measured to ``sums``; stop at one that is not finite."""
        fetched = torch.stack([means for _, means in steps]).double().cpu()
        terms = TollTerms(*fetched.unbind(dim=1))
        totals = self._learner.totals(terms)
        watched = torch.stack([totals, *terms]).mean(dim=2).T.tolist()  # one row per step, one value per name
        for i, ((count, _), means, values) in enumerate(zip(steps, fetched.tolist(), watched, strict=True)):
            self._guard.check(first + i, **dict(zip(_NAMES, values, strict=True)))
            for term, members in zip(sums, means, strict=True):
                for member, value in enumerate(members):
                    term[member] += value * count

    def _batches(self, order: Tensor) -> list[Tensor]:
        batches = list(torch.split(order, self._options.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1 < self._options.batch_size:
            # One sample has no batch statistics, so it joins the batch before it.
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _clipped(self, x: Tensor) -> Tensor:
        limit = self._options.input_limit
        return x if limit is None else x.clamp(-limit, limit)

    def _noisy(self, x: Tensor) -> Tensor:
        if self._options.noise == 0:
            return x
        drawn = torch.randn(x.shape, generator=self._generator, dtype=x.dtype)
        return x + self._options.noise * to_device(drawn, x.device)

    def _held_out(self, validation: Tensor | Rows) -> Tensor:
        """Mean held-out loss of each member."""
        batches = (slice(i, i + _EVALUATION_BATCH) for i in range(0, len(validation), _EVALUATION_BATCH))
        found = [
            torch.stack([*self._learner.terms(self._clipped(targets), targets)])
            for targets in batches_of(validation, batches)
        ]
        sums = torch.zeros(2, self._learner.members, dtype=torch.float64)
        for part in found:  # fetched when the device has all to do, and wide here, since some devices have no double
            sums += part.cpu().double().sum(dim=2)
        return self._learner.totals(TollTerms(*(sums / len(validation))))


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
