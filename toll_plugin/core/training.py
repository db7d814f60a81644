"""Fit and score with plain torch: no host, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.core.divergence import DivergenceGuard
from toll_plugin.core.learners import AutogradLearner, DenseLearner, Learner, MakeOptimizer, Rows, optimizer_of
from toll_plugin.core.modes import evaluating, training
from toll_plugin.core.networks import DenseAutoencoder, check_input
from toll_plugin.core.objective import TollLoss, TollTerms

__all__ = ["History", "fit", "fit_ensemble", "terms_of"]


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


def terms_of(network: nn.Module, x: Tensor, loss: TollLoss, *, batch_size: int = 1024) -> TollTerms:
    """Per-sample terms of ``x`` in evaluation mode, without gradients.

    Args:
        network: Module that returns ``(reconstruction, latent)``.
        x: Samples, shape ``(N, *)``, on the network's device.
        loss: Whose terms.
        batch_size: Samples per pass.

    Returns:
        Terms of shape ``(N,)``; feed them to :meth:`TollLoss.score`.

    Raises:
        ValueError: If ``x`` is empty or its samples have another shape than the network's.
    """
    check_integer("batch_size", batch_size, minimum=1)
    check_input(network, x)
    if len(x) == 0:
        msg = "x must hold at least one sample, got none"
        raise ValueError(msg)
    with evaluating(network), torch.no_grad():
        batches = [loss.terms(part, *network(part)) for part in torch.split(x, batch_size)]
    return TollTerms(torch.cat([b.reconstruction for b in batches]), torch.cat([b.latent for b in batches]))


def fit(
    network: nn.Module,
    x: Tensor | Rows,
    loss: TollLoss,
    *,
    validation: Tensor | Rows | None = None,
    optimizer: MakeOptimizer | str = "adam",
    lr: float = 1e-3,
    batch_size: int = 32,
    max_epochs: int | None = 200,
    max_steps: int | None = None,
    patience: int | None = 20,
    noise: float = 0.0,
    input_limit: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: Callable[[int, list[History]], None] | None = None,
) -> History:
    r"""Train ``network`` in place on normal samples.

    With ``validation``, the weights of the epoch with the lowest held-out loss are put back at
    the end (no labels are used), and training stops ``patience`` epochs after it.

    Args:
        network: Module that returns ``(reconstruction, latent)``.
        x: Normal samples, shape ``(N, *)``, N at least 1, on the network's device; or anything
            that has a length and gives such a tensor for a tensor of indices and for a slice.
        loss: The objective.
        validation: Held-out normal samples, the same.
        optimizer: ``"adam"`` (default), ``"adamw"`` or ``"sgd"`` at ``lr``, or called with the parameters.
        lr: Learning rate of an optimiser that is named, more than 0. Default 1e-3.
        batch_size: Samples per step, at least 1; the last batch of an epoch may be smaller,
            or larger by one, because a single sample is no batch.
        max_epochs: Passes over ``x``, at least 1; ``None`` if ``max_steps`` alone ends the fit.
        max_steps: Steps, at least 1; the last epoch may end early. Default: no limit.
        patience: Epochs without improvement before training stops; ``None`` never stops.
        noise: Standard deviation, in units of ``x``, of Gaussian noise on the inputs of a
            training step, whose targets stay clean (denoising). Default 0.
        input_limit: What the network sees is clipped to plus and minus this, before the noise; the
            targets are not. Default: nothing is.
        generator: Source of the order of the samples and of noise; the default is a new one
            seeded with 0. The global generator is never used.
        progress: Show a bar.
        on_epoch: Called after each epoch with its number, from 0, and the histories so far.

    Returns:
        The :class:`History`; the network is left in the mode it was in.

    Raises:
        DivergenceError: If the loss stops being finite; the network then holds the weights
            of the last epoch before it.
        ValueError: If an argument is out of range or samples do not fit the network.

    Example:
        >>> import torch
        >>> from toll_plugin.core import ConvAutoencoder
        >>> net = ConvAutoencoder(8, latent_dim=4, width=4)
        >>> history = fit(net, torch.rand(16, 1, 8, 8), TollLoss(0.1), max_epochs=2)
        >>> len(history.total)
        2
    """
    generator = generator or torch.Generator().manual_seed(0)
    learner = AutogradLearner(network, loss, optimizer_of(optimizer, lr))
    with torch.enable_grad(), training(network):
        loop = _Loop(
            learner, loss, x, validation, batch_size, max_epochs, max_steps, patience, noise, input_limit, generator
        )
        return loop.run(progress, on_epoch)[0]


def fit_ensemble(
    networks: Sequence[DenseAutoencoder],
    x: Tensor | Rows,
    loss: TollLoss,
    *,
    validation: Tensor | Rows | None = None,
    optimizer: MakeOptimizer | str = "adam",
    lr: float = 1e-3,
    batch_size: int = 32,
    max_epochs: int | None = 200,
    max_steps: int | None = None,
    patience: int | None = 20,
    noise: float = 0.0,
    input_limit: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: Callable[[int, list[History]], None] | None = None,
) -> list[History]:
    """Train several dense autoencoders of one shape in place, much faster than one after another.

    Each member ends where :func:`fit` would have taken it alone on the same batches, up to
    rounding errors and to linear biases in front of a BatchNorm, which have no effect there and
    stay as they are. The arguments are those of :func:`fit`, except that an optimiser of your
    own gets one parameter that holds the weights of all members, and so has to work on each
    element by itself, as Adam and SGD do. Networks and samples are on the CPU.

    Returns:
        One :class:`History` per network, with a best epoch of its own.

    Raises:
        DivergenceError: If the loss of a member stops being finite; all hold the weights of
            the last epoch before it.
        ValueError: If an argument is out of range, or samples or networks do not fit together.

    Example:
        >>> import torch
        >>> networks = [DenseAutoencoder(6, (8,), 2) for _ in range(3)]
        >>> histories = fit_ensemble(networks, torch.randn(40, 6), TollLoss(0.1), max_epochs=2)
        >>> [len(history.total) for history in histories]
        [2, 2, 2]
    """
    generator = generator or torch.Generator().manual_seed(0)
    learner = DenseLearner(networks, loss, optimizer_of(optimizer, lr), generator)
    loop = _Loop(
        learner, loss, x, validation, batch_size, max_epochs, max_steps, patience, noise, input_limit, generator
    )
    try:
        with torch.enable_grad(), np.errstate(all="ignore"):  # what diverges is reported by the loop
            return loop.run(progress, on_epoch)
    finally:
        learner.ensemble.write_back()


class _Loop:
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
