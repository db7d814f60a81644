"""Fit and score with plain torch: no host, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_integer
from toll_plugin.core.modes import evaluating, training
from toll_plugin.core.networks import DenseAutoencoder, check_input
from toll_plugin.core.objective import TollLoss, TollTerms
from toll_plugin.core.rows import Rows
from toll_plugin.core.training.ensemble import DenseLearner
from toll_plugin.core.training.learners import AutogradLearner
from toll_plugin.core.training.loop import History, Loop, OnEpoch
from toll_plugin.core.training.optimizers import MakeOptimizer
from toll_plugin.core.training.options import Patience, TrainingOptions

__all__ = ["History", "Trained", "fit", "fit_ensemble", "terms_of", "train", "train_ensemble"]


class Trained(NamedTuple):
    """What a fit leaves beside the trained networks.

    Attributes:
        histories: One for each network.
        optimizer: The optimiser's state, with which a later fit can go on.
    """

    histories: list[History]
    optimizer: dict[str, Any] | None


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
        generator: Source of the order of the samples and of noise; the default is a new one
            seeded with 0. The global generator is never used.
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
    trained = train(
        network, x, loss, options, validation=validation, generator=generator, progress=progress, on_epoch=on_epoch
    )
    return trained.histories[0]


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
    trained = train_ensemble(
        networks, x, loss, options, validation=validation, generator=generator, progress=progress, on_epoch=on_epoch
    )
    return trained.histories


def train(
    network: nn.Module,
    x: Tensor | Rows,
    loss: TollLoss,
    options: TrainingOptions,
    *,
    validation: Tensor | Rows | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
    optimizer: dict[str, Any] | None = None,
) -> Trained:
    """:func:`fit` by options that are one object; ``optimizer`` is the state to go on with."""
    generator = generator or torch.Generator().manual_seed(0)
    learner = AutogradLearner(network, loss, options.make_optimizer())
    learner.resume(optimizer)
    with torch.enable_grad(), training(network):
        histories = Loop(learner, loss, x, validation, options, generator).run(progress, on_epoch)
    return Trained(histories, learner.optimizer_state())


def train_ensemble(
    networks: Sequence[DenseAutoencoder],
    x: Tensor | Rows,
    loss: TollLoss,
    options: TrainingOptions,
    *,
    validation: Tensor | Rows | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
    optimizer: dict[str, Any] | None = None,
) -> Trained:
    """:func:`fit_ensemble` by options that are one object; ``optimizer`` is the state to go on with."""
    generator = generator or torch.Generator().manual_seed(0)
    learner = DenseLearner(networks, loss, options.make_optimizer(), generator)
    learner.resume(optimizer)
    loop = Loop(learner, loss, x, validation, options, generator)
    try:
        with torch.enable_grad(), np.errstate(all="ignore"):  # what diverges is reported by the loop
            histories = loop.run(progress, on_epoch)
    finally:
        learner.ensemble.write_back()
    return Trained(histories, learner.optimizer_state())
