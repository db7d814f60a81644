"""Fit and score with plain torch: no host, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.core.divergence import DivergenceGuard, snapshot
from toll_plugin.core.modes import batch_norm_fits, evaluating, training
from toll_plugin.core.networks import check_input
from toll_plugin.core.objective import TollLoss, TollTerms

__all__ = ["History", "fit", "terms_of"]


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
    x: Tensor,
    loss: TollLoss,
    *,
    validation: Tensor | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    lr: float = 1e-3,
    batch_size: int = 32,
    max_epochs: int = 200,
    patience: int | None = 20,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> History:
    """Train ``network`` in place on normal samples.

    With ``validation``, the weights of the epoch with the lowest held-out loss are put back at
    the end (no labels are used), and training stops ``patience`` epochs after it.

    Args:
        network: Module that returns ``(reconstruction, latent)``.
        x: Normal samples, shape ``(N, *)``, on the network's device, N at least 1.
        loss: The objective.
        validation: Held-out normal samples, the same shape.
        optimizer: Called with the parameters; default Adam at ``lr``.
        lr: Learning rate of the default optimiser, more than 0. Default 1e-3.
        batch_size: Samples per step, at least 1; the last batch of an epoch may be smaller.
        max_epochs: Passes over ``x``, at least 1.
        patience: Epochs without improvement before training stops; ``None`` never stops.
        generator: Source of the order of the samples; the default is a new one seeded with 0.
            The global generator is never used.
        progress: Show a bar.

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
    check_integer("batch_size", batch_size, minimum=1)
    check_integer("max_epochs", max_epochs, minimum=1)
    check_finite_float("lr", lr, minimum=0, exclusive=True)
    if patience is not None:
        check_integer("patience", patience, minimum=1)
    for name, samples in (("x", x), ("validation", validation)):
        if samples is None:
            continue
        check_input(network, samples)
        if len(samples) == 0 or not bool(samples.isfinite().all()):
            msg = f"{name} must hold at least one sample and only finite values, got shape {tuple(samples.shape)}"
            raise ValueError(msg)

    generator = generator or torch.Generator().manual_seed(0)
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr))
    stepper = make(network.parameters())
    guard, history = DivergenceGuard(network), History()
    best, best_state = math.inf, None
    with training(network):
        for epoch in _epochs(max_epochs, progress):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            batches = torch.split(order, batch_size)
            _one_epoch(network, x, batches, loss, stepper, guard, history, epoch * len(batches))
            last_step = (epoch + 1) * len(batches) - 1
            if validation is None:
                guard.keep(last_step)
                history.best_epoch = epoch
                continue
            held_out = float(loss.score(terms_of(network, validation, loss)).cpu().double().mean())
            # Before the weights are kept: they can be finite and yet far gone.
            guard.check(last_step, validation=held_out)
            guard.keep(last_step)
            history.validation.append(held_out)
            if held_out < best:
                best, best_state, history.best_epoch = held_out, snapshot(network), epoch
            elif patience is not None and epoch - history.best_epoch >= patience:
                break
    if best_state is not None:
        network.load_state_dict(best_state)
    return history


def _one_epoch(
    network: nn.Module,
    x: Tensor,
    order: Sequence[Tensor],
    loss: TollLoss,
    stepper: torch.optim.Optimizer,
    guard: DivergenceGuard,
    history: History,
    first_step: int,
) -> None:
    sums = torch.zeros(3, dtype=torch.float64)
    for step, index in enumerate(order, first_step):
        batch = x[index]
        with batch_norm_fits(network, len(batch)):
            terms = loss.terms(batch, *network(batch))
        value = loss.score(terms).mean()
        # To the CPU first: some devices have no double precision.
        means = torch.stack([value, terms.reconstruction.mean(), terms.latent.mean()]).detach().cpu().double()
        guard.check(step, **dict(zip(("total", "reconstruction", "latent"), means.tolist(), strict=True)))
        stepper.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        sums += means * len(batch)
    for values, mean in zip(
        (history.total, history.reconstruction, history.latent),
        (sums / len(x)).tolist(),
        strict=True,
    ):
        values.append(mean)


def _epochs(max_epochs: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(max_epochs)
    from tqdm.auto import tqdm  # noqa: PLC0415  whoever wants no bar need not load it

    bar: Iterable[int] = tqdm(range(max_epochs), desc="fit", unit="epoch")
    return bar
