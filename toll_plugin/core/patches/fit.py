"""Fit a model of feature maps: standardise, project, draw positions, train; then examine it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor

from toll_plugin.core.checks import check_finite_float, check_integer, check_option
from toll_plugin.core.devices import to_device
from toll_plugin.core.diagnostics import CollapseMonitor, Finding
from toll_plugin.core.modes import evaluating
from toll_plugin.core.objective import ScoreScale, TollTerms
from toll_plugin.core.patches.model import PatchAutoencoder
from toll_plugin.core.rows import Rows, RowSubset
from toll_plugin.core.threads import fork_safe
from toll_plugin.core.training.fit import History, train
from toll_plugin.core.training.loop import OnEpoch
from toll_plugin.core.training.optimizers import cosine_adam
from toll_plugin.core.training.options import TrainingOptions

__all__ = ["examine", "fit_patches"]


def fit_patches(
    model: PatchAutoencoder,
    rows: Rows,
    validation: Rows,
    *,
    focus: float = 4.0,
    lr: float = 4e-3,
    batch_size: int = 512,
    max_steps: int = 1500,
    patience: int | None = 20,
    score_scale: ScoreScale = "none",
    generator: torch.Generator,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
) -> History:
    r"""Fit ``model`` in place to rows of features: its standardisation, its projection, then its network.

    Most positions of most images show a background that is learnt in a few steps. So before training as
    many rows as there are get drawn, with replacement and with a probability in proportion to
    :math:`\|x_p\|^f`, a power of the standardised row's distance from the mean. The rows that give the
    principal components and the held-out loss are drawn in the same way. The learning rate rises over a
    tenth of the steps and falls to zero along half a cosine.

    Args:
        model: What is fitted. A :class:`DenseAutoencoder` on the CPU is trained as
            :func:`toll_plugin.core.fit_ensemble` does, other networks as :func:`toll_plugin.core.fit`.
        rows: Raw features of positions of normal images, shape ``(N, C)``, N at least 1.
        validation: The same of held-out images; the network keeps the weights of the epoch with the
            lowest loss on them.
        focus: ``f``, at least 0. Default 4; 0 draws all positions alike.
        lr: Largest learning rate of Adam. Default 4e-3.
        batch_size: Positions per step. Default 512.
        max_steps: Steps. Default 1500.
        patience: Epochs without a lower held-out loss before training stops; ``None`` never stops.
        score_scale: ``"none"`` (default) leaves the score's terms as they are, as in the paper; with ``"median"``
            each is divided by its median over all held-out positions, under the weights that are kept.
        generator: Decides which rows are drawn, and their order.
        progress: Show a bar.
        on_epoch: See :func:`toll_plugin.core.fit`.

    Returns:
        The :class:`History`.

    Raises:
        DivergenceError: If the loss stops being finite.
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range, or rows are none, not finite or of another width; the model
            then stays as it was.
    """
    check_finite_float("focus", focus, minimum=0)
    check_integer("max_steps", max_steps, minimum=1)
    check_integer("batch_size", batch_size, minimum=2)
    check_option("score_scale", score_scale, get_args(ScoreScale))
    optimizer = cosine_adam(lr, max_steps)
    options = TrainingOptions(optimizer, batch_size=batch_size, max_epochs=None, max_steps=max_steps, patience=patience)
    device = model.mean.device

    @torch.no_grad()
    def prepare(fetched: Tensor) -> Tensor:
        return model.prepare(to_device(fetched, device))

    _check_shape("rows", rows, len(model.mean))
    _check_shape("validation", validation, len(model.mean))
    with _kept_on_failure(model):
        model.standardise_by(*_statistics(rows))
        distances = _distances("rows", rows, model)
        held_out = _draw(_distances("validation", validation, model), min(len(validation), _ENOUGH), focus, generator)
        order = _draw(distances, len(rows), focus, generator)
        if model.components is not None:
            model.project_on(model.standardise(rows[order[:_ENOUGH]].to(device)))
        data, validation_data = RowSubset(rows, order, prepare), RowSubset(validation, held_out, prepare)
        with fork_safe():
            trained = train(
                [model.network],
                data,
                [model.loss],
                options,
                validation=validation_data,
                generator=generator,
                progress=progress,
                on_epoch=on_epoch,
            )
        model.score.measure(_terms(validation, model) if score_scale == "median" else None)
    return trained.histories[0]


@torch.no_grad()
def examine(model: PatchAutoencoder, rows: Rows, grid: tuple[int, int]) -> tuple[Tensor, list[Finding]]:
    """What a fitted model makes of held-out normal images.

    Args:
        model: After :func:`fit_patches`.
        rows: Raw features of N images, one image after the other, shape ``(N * height * width, C)``.
        grid: ``(height, width)`` of an image in positions.

    Returns:
        The score of each position, ``(N, 1, height, width)``, and the signatures of failure that are met,
        see :class:`toll_plugin.core.CollapseMonitor`.
    """
    positions = grid[0] * grid[1]
    monitor, scores = CollapseMonitor(), []
    with evaluating(model):
        for start in range(0, len(rows), positions):
            x = model.prepare(rows[slice(start, start + positions)].to(model.mean.device))
            terms = model.loss.terms(x, *model.network(x))
            monitor.update(x, terms, exponent=model.loss.exponent)
            scores.append(model.score_of(TollTerms(*(term.view(1, *grid) for term in terms))))
    return torch.cat(scores), monitor.findings()


#: Rows that suffice to measure the held-out loss, and to find the principal components.
_ENOUGH = 20_000
#: Rows per pass over all.
_PIECE = 16_384
_TINY = 1e-12


def _check_shape(name: str, rows: Rows, channels: int) -> None:
    if len(rows) == 0:
        msg = f"{name} must hold at least one row, got none"
        raise ValueError(msg)
    shape = tuple(rows[slice(0, 1)].shape[1:])
    if shape != (channels,):
        msg = f"{name} must have shape (N, {channels}), got {(len(rows), *shape)}"
        raise ValueError(msg)


@contextmanager
def _kept_on_failure(model: PatchAutoencoder) -> Iterator[None]:
    """Should the block fail, ``model`` standardises and projects as before, as suits the weights it still has."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        for buffer, before in kept:
            buffer.copy_(before)
        raise


def _pieces(rows: Rows) -> Iterator[Tensor]:
    return (rows[slice(start, start + _PIECE)] for start in range(0, len(rows), _PIECE))


def _statistics(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from the deviations from the first piece's mean, on the CPU."""
    origin = rows[slice(0, _PIECE)].cpu().double().mean(dim=0)
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for part in _pieces(rows):
        moved = part.cpu().double() - origin
        total += moved.sum(dim=0)
        squares += moved.square().sum(dim=0)
    mean = total / len(rows)
    return origin + mean, (squares / len(rows) - mean.square()).clamp_min(0).sqrt()


@torch.no_grad()
def _distances(name: str, rows: Rows, model: PatchAutoencoder) -> Tensor:
    """Distance of each standardised row from the mean position, on the CPU, since some devices have no double."""
    parts = (model.standardise(part.to(model.mean.device)).cpu() for part in _pieces(rows))
    distances = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
    if not bool(distances.isfinite().all()):  # a row with NaN or infinity has no finite distance
        msg = f"{name} must be finite, got NaN or infinity"
        raise ValueError(msg)
    return distances


@torch.no_grad()
def _terms(rows: Rows, model: PatchAutoencoder) -> TollTerms[Tensor]:
    """Terms of raw rows, one after the other, on the CPU."""
    found = []
    with evaluating(model):
        for part in _pieces(rows):
            x = model.prepare(part.to(model.mean.device))
            found.append(torch.stack([*model.loss.terms(x, *model.network(x))]).cpu())
    return TollTerms(*torch.cat(found, dim=1))


def _draw(distances: Tensor, count: int, focus: float, generator: torch.Generator) -> Tensor:
    """``count`` positions of rows, drawn with replacement in proportion to a power of their distances."""
    upto = (distances / distances.max().clamp_min(_TINY)).pow(focus).add(_TINY).cumsum(0)
    index = torch.searchsorted(upto, torch.rand(count, generator=generator, dtype=torch.float64) * upto[-1])
    return index.clamp_max(len(distances) - 1)
