"""Fit a model of a table: train the networks on scaled rows, then measure the residuals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_option, check_share
from toll_plugin.core.objective import SCORE_WEIGHT, ScoreScale, ScoreTerm, TollLoss, typical
from toll_plugin.core.rows import FEW_ROWS, Rows, WithoutRows, batches_of, random_order
from toll_plugin.core.tables.distant import Table
from toll_plugin.core.tables.metric import MahalanobisNorm
from toll_plugin.core.tables.model import Measure, TableMember, TableModel
from toll_plugin.core.tables.rows import Preprocessing, TableRows
from toll_plugin.core.tables.scaling import Floats
from toll_plugin.core.threads import fork_safe, one_thread
from toll_plugin.core.training.fit import train, written_out
from toll_plugin.core.training.loop import History, OnEpoch
from toll_plugin.core.training.options import TrainingOptions

__all__ = ["FittedTable", "Metric", "ScoreScale", "TableSplit", "TrainedMember", "fit_table", "hold_out", "rehearse"]

Metric = Literal["mahalanobis", "euclidean"]

#: Up to this many bytes the scaled training rows are kept; larger tables are scaled batch by batch.
_KEPT = 1 << 24
#: Up to so many bytes of residuals are in memory at once.
_AT_ONCE = 1 << 22
#: Rows that are scaled at a time.
_PIECE = 256
#: Rows that suffice to measure columns and residuals.
_MEASURED = 10_000
#: In tables of more columns, residuals are measured on no more rows than this, since the time grows with the
#: smaller number's third power.
_WIDE = 2_000


class TableSplit(NamedTuple):
    """Which rows of a table do what, as sorted indices.

    Attributes:
        training: Rows that the networks learn; of more than 2**24 rows, what can be indexed as they can.
        validation: Rows that are held out to choose the epoch; may be none.
        measured: At most 10 000 rows that are not held out, on which columns and residuals are measured.
    """

    training: NDArray[np.int64] | WithoutRows
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
    fraction = check_share("validation_fraction", fraction, below_one=True)
    held = max(0, min(math.ceil(fraction * count), count - 2))
    order = random_order(count, held + _MEASURED, generator).numpy()
    validation = np.sort(order[:held])
    training = WithoutRows(count, validation)
    return TableSplit(training[:] if count <= FEW_ROWS else training, validation, np.sort(order[held:]))


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


class TrainedMember(NamedTuple):
    """A network to train, by which loss, and what it gives to the score.

    Attributes:
        network: Returns ``(reconstruction, latent)``.
        loss: Its objective.
        gives: ``"reconstruction"``, ``"latent"`` or ``"both"``.
    """

    network: nn.Module
    loss: TollLoss
    gives: Literal["both", "reconstruction", "latent"] = "both"


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
    x: Table,
    split: TableSplit,
    scaling: Preprocessing,
    members: Sequence[TrainedMember],
    options: TrainingOptions,
    *,
    metric: Metric = "mahalanobis",
    score_scale: ScoreScale = "median",
    score_weight: float = SCORE_WEIGHT,
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
        x: Finite rows, shape ``(N, n_features)``; a memory map is read in pieces, and so is a :class:`DistantTable`.
        split: Which of them train, see :func:`hold_out`.
        scaling: Fitted; brings raw rows ``(N, n_features)`` to the networks' inputs ``(N, n_inputs)``.
        members: Networks that return ``(reconstruction, latent)`` of such inputs, each with its loss and what it
            gives to the score. Dense autoencoders are trained together, other modules one by one.
        options: Of the training, see :func:`toll_plugin.core.fit`. ``input_limit`` is the scaling's own.
        metric: ``"mahalanobis"`` measures residuals by their covariance on training rows, and latents too where
            ``score_scale`` is ``"median"``; ``"euclidean"`` takes plain norms, as the paper does.
        score_scale: ``"median"`` divides each term of each member by its median on training rows, ``"none"``
            leaves the terms as they are, as the paper does.
        score_weight: Of the latent term in the score.
        score_term: What the model's scores are: ``"total"``, ``"reconstruction"`` or ``"latent"``.
        device: Where to train; scores are always computed on the CPU.
        generator: Source of order and noise; by default a new one seeded with 0.
        progress: Show a bar.
        on_epoch: Called after each epoch, see :func:`toll_plugin.core.fit`.
        optimizers: What an earlier fit of these networks returned as such, to go on with; on any device.

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
        >>> member = TrainedMember(DenseAutoencoder(6, (8,), 2), TollLoss("auto"))
        >>> fitted = fit_table(x, split, TableScaling().fit(x), [member], TrainingOptions(max_epochs=2))
        >>> fitted.model.score(x).shape
        (50,)
    """
    check_option("metric", metric, get_args(Metric))
    check_option("score_scale", score_scale, get_args(ScoreScale))
    score_weight = check_finite_float("score_weight", score_weight, minimum=0)
    device = device or torch.device("cpu")
    options = dataclasses.replace(options, input_limit=getattr(scaling, "limit", None))
    inputs = int(members[0].network.input_shape[0])  # type: ignore[index]
    data = _kept(TableRows(x, split.training, scaling, device), inputs)
    held_out = _kept(TableRows(x, split.validation, scaling, device), inputs) if len(split.validation) else None
    networks = [_moved(member.network, device) for member in members]
    with one_thread() if written_out(networks) else fork_safe():
        trained = train(
            networks,
            data,
            [member.loss for member in members],
            options,
            validation=held_out,
            generator=generator,
            progress=progress,
            on_epoch=on_epoch,
            optimizers=optimizers,
        )
    found = [
        TableMember(
            _moved(network, torch.device("cpu")),
            Measure() if member.gives != "latent" else None,
            Measure() if member.gives != "reconstruction" else None,
        )
        for network, member in zip(networks, members, strict=True)
    ]
    exponent = members[0].loss.exponent
    model = TableModel(scaling, found, weight=score_weight, exponent=exponent, score_term=score_term)
    measured = [_measured(model, i, x, split.measured, metric, score_scale) for i in range(len(found))]
    model = TableModel(scaling, measured, weight=score_weight, exponent=exponent, score_term=score_term)
    return FittedTable(model, trained.histories, [_on_cpu(state) for state in trained.optimizers])


def _moved(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on ``device``; to look whether it is there is faster than to move what is."""
    here = all(tensor.device == device for tensor in itertools.chain(network.parameters(), network.buffers()))
    return network if here else network.to(device)


def _on_cpu(state: Any) -> Any:
    """What an optimiser has gathered, where a file of it can be read without the device it was trained on."""
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def _measured(
    model: TableModel, i: int, x: Table, rows: NDArray[np.int64], metric: Metric, scale: ScoreScale
) -> TableMember:
    """A member of the model with norms and units as measured on ``rows``."""
    member = model.members[i]
    if model.inputs > _WIDE:
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _WIDE)).astype(np.int64)]
    kinds: tuple[Literal["residual", "latent"], ...] = ("residual", "latent")
    measures: list[Measure | None] = []
    few = 8 * model.inputs * len(rows) <= _AT_ONCE
    with one_thread():
        for kind, measure in zip(kinds, member[1:], strict=True):
            found = measure
            # In a unit of its own a latent may be measured in any way; as it is, beta weighs its plain norm.
            in_metric = metric == "mahalanobis" and (kind == "residual" or scale == "median")
            pieces: Iterable[Floats] = ()
            if found is not None and in_metric:
                pieces = model.vectors(i, kind, x, rows)
                pieces = list(pieces) if few else pieces
                found = Measure(MahalanobisNorm.of(pieces, len(rows)))
            if found is not None and scale == "median":
                # Vectors that memory should not hold all at once are computed again.
                known = pieces if in_metric and few else model.vectors(i, kind, x, rows)
                found = found._replace(unit=typical(np.concatenate([found.term(p, model.exponent) for p in known])))
            measures.append(found)
    return TableMember(member.network, *measures)


def _kept(rows: TableRows, inputs: int) -> Rows | Tensor:
    """The rows in memory if they are few, else to be scaled when they are fetched."""
    if 4 * inputs * len(rows) > _KEPT:
        return rows
    # In pieces that the processor's cache holds.
    return torch.cat([*batches_of(rows, (slice(start, start + _PIECE) for start in range(0, len(rows), _PIECE)))])
