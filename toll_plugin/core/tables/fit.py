"""Fit a model of a table: hold out, scale, train, measure the residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_integer, check_option
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import TollLoss
from toll_plugin.core.rows import Rows
from toll_plugin.core.tables.model import Preprocessing, ResidualMetric, TableModel, TableRows
from toll_plugin.core.threads import fork_safe, one_thread
from toll_plugin.core.training.fit import History, fit, fit_ensemble
from toll_plugin.core.training.learners import MakeOptimizer

__all__ = ["Metric", "fit_table"]

Metric = Literal["mahalanobis", "euclidean"]

#: Up to this many bytes the scaled training rows are kept; larger tables are scaled batch by batch.
_KEPT = 1 << 23
#: Rows that are scaled at a time.
_PIECE = 256
#: Rows that suffice to measure columns and residuals.
_MEASURED = 10_000


def fit_table(  # noqa: D417  the rest stands at `fit`
    x: NDArray[Any],
    loss: TollLoss,
    scaling: Callable[[NDArray[Any], NDArray[np.int64]], Preprocessing],
    networks: Callable[[int, torch.Generator], Sequence[nn.Module]],
    *,
    metric: Metric = "mahalanobis",
    validation_fraction: float = 0.0,
    optimizer: MakeOptimizer | str = "adam",
    lr: float = 1e-3,
    batch_size: int = 128,
    max_epochs: int | None = None,
    max_steps: int | None = 4000,
    patience: int | None = None,
    noise: float = 0.1,
    device: torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
    on_epoch: Callable[[int, list[History]], None] | None = None,
) -> tuple[TableModel, list[History]]:
    """Train on the rows of a table, all taken for normal.

    Neither ``x`` nor what is made of it stays in memory beyond single batches once it is large.

    Args:
        x: Finite rows, shape ``(N, n_features)``, N at least 2; a memory map is read in pieces.
        loss: The objective.
        scaling: Called with ``x`` and the indices of (at most 10 000) training rows; what it
            returns has ``transform``.
        networks: Called with the number of scaled columns and a generator for the initial
            weights; several dense autoencoders are trained together, other modules one by one.
        metric: ``"mahalanobis"`` measures residuals by their covariance on training rows,
            ``"euclidean"`` takes their plain norm, as the paper does.
        validation_fraction: Share of rows held out to choose the epoch, in [0, 1); 0 for none.
        device: Where to train; scores are always computed on the CPU.
        seed: Of everything that is drawn.

    The other arguments are those of :func:`toll_plugin.core.fit`, with defaults for tables.

    Returns:
        The model and one history per network.

    Raises:
        DivergenceError: If the loss stops being finite.
        ValueError: If an argument is out of range.
    """
    check_option("metric", metric, get_args(Metric))
    if check_finite_float("validation_fraction", validation_fraction, minimum=0) >= 1:
        msg = f"validation_fraction must be in [0, 1), got {validation_fraction!r}"
        raise ValueError(msg)
    if patience is not None and check_integer("patience", patience, minimum=1) and validation_fraction == 0:
        msg = f"patience needs rows held out: validation_fraction must be more than 0, got {validation_fraction!r}"
        raise ValueError(msg)
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).numpy()
    # At least two rows train, and one is held out if any share was asked for.
    held = max(0, min(math.ceil(validation_fraction * len(x)), len(x) - 2))
    validation, training = order[:held], np.sort(order[held:])
    measured = np.sort(order[held : held + _MEASURED])

    with torch.inference_mode(mode=False):
        fitted = scaling(x, measured)
        rows = TableRows(x, training, fitted, device)
        inputs = rows[:1].shape[1]
        members = [network.to(device) for network in networks(inputs, generator)]
        dense = [network for network in members if isinstance(network, DenseAutoencoder)]
        data = _kept(rows, inputs)
        arguments: dict[str, Any] = {
            "validation": _kept(TableRows(x, np.sort(validation), fitted, device), inputs) if held else None,
            "optimizer": optimizer,
            "lr": lr,
            "batch_size": batch_size,
            "max_epochs": max_epochs,
            "max_steps": max_steps,
            "patience": patience,
            "noise": noise,
            "input_limit": getattr(fitted, "limit", None),
            "generator": generator,
            "progress": progress,
            "on_epoch": on_epoch,
        }
        if len(dense) == len(members) and device.type == "cpu":
            with one_thread():
                histories = fit_ensemble(dense, data, loss, **arguments)
        else:
            with fork_safe():
                histories = [fit(network, data, loss, **arguments) for network in members]
    model = TableModel(fitted, [network.cpu() for network in members], loss)
    if metric == "mahalanobis":
        with one_thread():
            model.metric = ResidualMetric.of(model.residuals(x, measured))
    return model, histories


def _kept(rows: TableRows, inputs: int) -> Rows | Tensor:
    if 4 * inputs * len(rows) > _KEPT:
        return rows
    # In pieces that the processor's cache holds.
    return torch.cat([rows[slice(start, start + _PIECE)] for start in range(0, len(rows), _PIECE)])
