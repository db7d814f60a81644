"""Fit a model of a table: train the networks on scaled rows, then measure the residuals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_option
from toll_plugin.core.objective import ScoreTerm, TollLoss
from toll_plugin.core.rows import Rows
from toll_plugin.core.tables.metric import ResidualMetric
from toll_plugin.core.tables.model import TableModel
from toll_plugin.core.tables.rows import Preprocessing, TableRows
from toll_plugin.core.threads import fork_safe, one_thread
from toll_plugin.core.training.fit import train, written_out
from toll_plugin.core.training.loop import History, OnEpoch
from toll_plugin.core.training.options import TrainingOptions

__all__ = ["FittedTable", "Metric", "TableSplit", "fit_table", "hold_out", "rehearse"]

Metric = Literal["mahalanobis", "euclidean"]

#: Up to this many bytes the scaled training rows are kept; larger tables are scaled batch by batch.
_KEPT = 1 << 23
#: Rows that are scaled at a time.
_PIECE = 256
#: Rows that suffice to measure columns and residuals.
_MEASURED = 10_000


class TableSplit(NamedTuple):
    """Which rows of a table do what, as sorted indices.

    Attributes:
        training: Rows that the networks learn.
        validation: Rows that are held out to choose the epoch; may be none.
        measured: At most 10 000 rows that are not held out, on which columns and residuals are measured.
    """

    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    measured: NDArray[np.int64]


def hold_out(count: int, fraction: float, generator: torch.Generator) -> TableSplit:
    """Split ``count`` rows at random, at least two of them staying to train on.

    Args:
        count: Rows, at least 2.
        fraction: Share held out, in [0, 1); if it is not 0, at least one row is, where three are there.
        generator: Source of the draw.

    Raises:
        TypeError: If ``fraction`` is no number.
        ValueError: If it is not in [0, 1).

    Example:
        >>> import torch
        >>> split = hold_out(10, 0.2, torch.Generator().manual_seed(0))
        >>> len(split.training), len(split.validation)
        (8, 2)
    """
    if check_finite_float("validation_fraction", fraction, minimum=0) >= 1:
        msg = f"validation_fraction must be in [0, 1), got {fraction!r}"
        raise ValueError(msg)
    order = torch.randperm(count, generator=generator).numpy()
    held = max(0, min(math.ceil(fraction * count), count - 2))
    return TableSplit(np.sort(order[held:]), np.sort(order[:held]), np.sort(order[held : held + _MEASURED]))


def rehearse(new: int, old: int, seen: int, generator: torch.Generator) -> TableSplit:
    """Which rows train and are measured when a table grows by a piece, so that the earlier rows are not forgotten.

    The rows are those of the piece, then a sample of all rows before it. All rows of the piece are trained on, with
    as many of the sample, drawn anew each time. What is measured is a sample of all rows, piece and earlier,
    in which each has the same chance to be: the sample to keep for the next piece.

    Args:
        new: Rows of the piece.
        old: Rows of the sample.
        seen: Rows that the sample stands for.
        generator: Source of the draws.

    Source:
        Reservoir sampling (Vitter 1985), and experience replay from it (arXiv 1902.10486).

    Example:
        >>> import torch
        >>> split = rehearse(3, 9, 9, torch.Generator().manual_seed(0))
        >>> len(split.training), len(split.measured)
        (6, 12)
    """
    drawn = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    again = new + drawn.permutation(old)[:new]
    fresh, kept = new, old
    if new + old > _MEASURED:
        fresh = int(drawn.hypergeometric(new, seen, _MEASURED))
        kept = _MEASURED - fresh
    measured = np.concatenate([drawn.permutation(new)[:fresh], new + drawn.permutation(old)[:kept]])
    return TableSplit(np.sort(np.concatenate([np.arange(new), again])), np.arange(0), np.sort(measured))


class FittedTable(NamedTuple):
    """What :func:`fit_table` returns.

    Attributes:
        model: The fitted model.
        histories: One for each network.
        optimizers: States of the optimisers, with which a later fit can go on.
    """

    model: TableModel
    histories: list[History]
    optimizers: list[dict[str, Any] | None]


def fit_table(
    x: NDArray[Any],
    split: TableSplit,
    scaling: Preprocessing,
    networks: Sequence[nn.Module],
    loss: TollLoss,
    options: TrainingOptions,
    *,
    metric: Metric = "mahalanobis",
    score_term: ScoreTerm = "total",
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: OnEpoch | None = None,
    optimizers: Sequence[dict[str, Any] | None] = (),
) -> FittedTable:
    """Train networks in place on the rows of a table, all taken for normal.

    Neither ``x`` nor what is made of it stays in memory beyond single batches once it is large.

    Args:
        x: Finite rows, shape ``(N, n_features)``; a memory map is read in pieces.
        split: Which of them train, see :func:`hold_out`.
        scaling: Fitted; brings raw rows ``(N, n_features)`` to the networks' inputs ``(N, n_inputs)``.
        networks: Modules that return ``(reconstruction, latent)`` of such inputs, one or more. Several
            dense autoencoders are trained together, other modules one by one.
        loss: The objective.
        options: Of the training, see :func:`toll_plugin.core.fit`. ``input_limit`` is the scaling's own.
        metric: ``"mahalanobis"`` measures residuals by their covariance on training rows,
            ``"euclidean"`` takes their plain norm, as the paper does.
        score_term: What the model's scores are: ``"total"``, ``"reconstruction"`` or ``"latent"``.
        device: Where to train; scores are always computed on the CPU.
        generator: Source of order and noise; by default a new one seeded with 0.
        progress: Show a bar.
        on_epoch: Called after each epoch, see :func:`toll_plugin.core.fit`.
        optimizers: What an earlier fit of these networks returned as such, to go on with.

    Returns:
        The model, one history per network, and the optimisers' states.

    Raises:
        DivergenceError: If the loss stops being finite.
        ValueError: If an argument is out of range.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from toll_plugin.core import DenseAutoencoder, TableScaling, TollLoss, TrainingOptions
        >>> x = np.random.default_rng(0).normal(size=(50, 6))
        >>> split = hold_out(len(x), 0.0, torch.Generator().manual_seed(0))
        >>> scaling, network = TableScaling().fit(x), DenseAutoencoder(6, (8,), 2)
        >>> fitted = fit_table(x, split, scaling, [network], TollLoss(0.1), TrainingOptions(max_epochs=2))
        >>> fitted.model.score(x).shape
        (50,)
    """
    check_option("metric", metric, get_args(Metric))
    device = device or torch.device("cpu")
    options = dataclasses.replace(options, input_limit=getattr(scaling, "limit", None))
    data = _kept(TableRows(x, split.training, scaling, device))
    held_out = _kept(TableRows(x, split.validation, scaling, device)) if len(split.validation) else None
    members = [network.to(device) for network in networks]
    with one_thread() if written_out(members) else fork_safe():
        trained = train(
            members,
            data,
            loss,
            options,
            validation=held_out,
            generator=generator,
            progress=progress,
            on_epoch=on_epoch,
            optimizers=optimizers,
        )
    model = TableModel(scaling, [network.cpu() for network in members], loss, score_term=score_term)
    if metric == "mahalanobis":
        with one_thread():
            model.metric = ResidualMetric.of(model.residuals(x, split.measured))
    return FittedTable(model, trained.histories, trained.optimizers)


def _kept(rows: TableRows) -> Rows | Tensor:
    """The rows in memory if they are few, else to be scaled when they are fetched."""
    if 4 * rows[:1].shape[1] * len(rows) > _KEPT:
        return rows
    # In pieces that the processor's cache holds.
    return torch.cat([rows[slice(start, start + _PIECE)] for start in range(0, len(rows), _PIECE)])
