"""Fit and score with plain torch: no host, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_integer
from toll_plugin.core.modes import evaluating
from toll_plugin.core.networks import DenseAutoencoder, check_input
from toll_plugin.core.objective import TollLoss, TollTerms
from toll_plugin.core.rows import Rows
from toll_plugin.core.training.ensemble import DenseLearner
from toll_plugin.core.training.learners import AutogradLearner, Learner
from toll_plugin.core.training.loop import History, Loop, OnEpoch
from toll_plugin.core.training.optimizers import MakeOptimizer
from toll_plugin.core.training.options import Patience, TrainingOptions

__all__ = ["History", "Trained", "fit", "fit_ensemble", "terms_of", "train", "written_out"]


class Trained(NamedTuple):
    """What a fit leaves beside the trained networks.

    Attributes:
        histories: One for each network.
        optimizers: States of the optimisers, with which a later fit can go on.
    """

    histories: list[History]
    optimizers: list[dict[str, Any] | None]


def terms_of(network: nn.Module, x: Tensor, loss: TollLoss, *, batch_size: int = 1024) -> TollTerms[Tensor]:
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
    patience: Patience = "auto",
    noise: float = 0.0,
    input_limit: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
) -> History:
    r"""Train ``network`` in place on normal samples.

    With ``validation``, the weights of the epoch with the lowest held-out loss are put back at
    the end (no labels are used), and training stops ``patience`` epochs after it. A loss that is not
    finite stops the fit within 64 steps, at most at the end of the epoch.

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
        patience: Epochs without a lower held-out loss before training stops; ``None`` never stops.
            Default ``"auto"``: 20 with ``validation``, never without.
        noise: Standard deviation, in units of ``x``, of Gaussian noise on the inputs of a
            training step, whose targets stay clean (denoising). Default 0.
        input_limit: What the network sees is clipped to plus and minus this, before the noise; the
            targets are not. Default: nothing is.
        generator: Source of the order of the samples and of noise, on the CPU whatever the network's device;
            the default is a new one seeded with 0. The global generator is never used.
        progress: Show a bar.
        on_epoch: Called after each epoch with its number, from 0, and the histories so far.

    Returns:
        The :class:`History`; the network is left in the mode it was in.

    Raises:
        DivergenceError: If the loss stops being finite; the network then holds the weights
            of the last epoch before it.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, samples do not fit the network, or ``patience`` is
            given without ``validation``.

    Example:
        >>> import torch
        >>> from toll_plugin.core import ConvAutoencoder
        >>> net = ConvAutoencoder(8, latent_dim=4, width=4)
        >>> history = fit(net, torch.rand(16, 1, 8, 8), TollLoss(0.1), max_epochs=2)
        >>> len(history.total)
        2
    """
    options = TrainingOptions(
        optimizer=optimizer,
        lr=lr,
        batch_size=batch_size,
        max_epochs=max_epochs,
        max_steps=max_steps,
        patience=patience,
        noise=noise,
        input_limit=input_limit,
    )
    learner = AutogradLearner(network, loss, options.make_optimizer())
    (history,) = _run(learner, x, options, validation, generator, progress, on_epoch).histories
    return history


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
    patience: Patience = "auto",
    noise: float = 0.0,
    input_limit: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
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
    options = TrainingOptions(
        optimizer=optimizer,
        lr=lr,
        batch_size=batch_size,
        max_epochs=max_epochs,
        max_steps=max_steps,
        patience=patience,
        noise=noise,
        input_limit=input_limit,
    )
    generator = generator or torch.Generator().manual_seed(0)
    learner = DenseLearner(networks, [loss] * len(networks), options.make_optimizer(), generator)
    return _run(learner, x, options, validation, generator, progress, on_epoch).histories


def written_out(networks: Sequence[nn.Module]) -> bool:
    """Whether the networks are dense autoencoders on the CPU, which train together by a step that is written out."""
    return all(isinstance(network, DenseAutoencoder) and _on_cpu(network) for network in networks)


def _on_cpu(network: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in network.parameters())


def train(
    networks: Sequence[nn.Module],
    x: Tensor | Rows,
    losses: Sequence[TollLoss],
    options: TrainingOptions,
    *,
    validation: Tensor | Rows | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
    optimizers: Sequence[dict[str, Any] | None] = (),
) -> Trained:
    """Train networks by options that are one object: together if they are :func:`written_out`, else one by one.

    ``losses`` has one for each network, all of one exponent, and ``optimizers`` is what an earlier call returned
    by that name, to go on with; the samples and the other arguments are those of :func:`fit`.

    Raises:
        ValueError: If there are more or fewer losses than networks, or their exponents differ.
    """
    if len(losses) != len(networks) or len({loss.exponent for loss in losses}) != 1:
        msg = f"losses must be one for each of {len(networks)} networks, all of one exponent, got {list(losses)}"
        raise ValueError(msg)
    generator = generator or torch.Generator().manual_seed(0)
    make = options.make_optimizer()
    learners: list[Learner] = (
        [DenseLearner(cast("Sequence[DenseAutoencoder]", networks), losses, make, generator)]
        if written_out(networks)
        else [AutogradLearner(network, loss, make) for network, loss in zip(networks, losses, strict=True)]
    )
    for learner, state in zip(learners, optimizers, strict=bool(optimizers)):
        learner.resume(state)
    parts = [_run(learner, x, options, validation, generator, progress, on_epoch) for learner in learners]
    return Trained([h for part in parts for h in part.histories], [s for part in parts for s in part.optimizers])


def _run(
    learner: Learner,
    x: Tensor | Rows,
    options: TrainingOptions,
    validation: Tensor | Rows | None,
    generator: torch.Generator | None,
    progress: bool,
    on_epoch: OnEpoch | None,
) -> Trained:
    loop = Loop(learner, x, validation, options, generator or torch.Generator().manual_seed(0))
    with torch.enable_grad(), learner.training():
        histories = loop.run(progress, on_epoch)
    return Trained(histories, [learner.optimizer_state()])
