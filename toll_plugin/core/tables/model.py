"""From the raw rows of a table to scores: scaling, networks, and how their residuals and latents are measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from toll_plugin.core.checks import check_option
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import ScoreTerm, TollTerms, norm_per_sample, toll_score
from toll_plugin.core.tables.distant import Table
from toll_plugin.core.tables.metric import MahalanobisNorm
from toll_plugin.core.tables.rows import Preprocessing, scale_rows
from toll_plugin.core.tables.scaling import Floats, TableScaling
from toll_plugin.core.tables.scoring import (
    BLOCK,
    MANY,
    FoldedAutoencoder,
    ModuleAutoencoder,
    Rooms,
    in_blocks,
    product,
)
from toll_plugin.core.threads import one_blas_thread, one_thread

__all__ = ["Measure", "TableMember", "TableModel", "TableParts"]

#: Values per pass of scoring: few enough that the processor's cache holds what lies between the layers, and
#: that torch starts no threads, for which a forked process would wait forever.
_CHUNK = 1 << 15


class Measure(NamedTuple):
    """How one member's residual or latent becomes a term of the score: its norm, in a unit.

    Attributes:
        norm: The norm; ``None`` for the plain one.
        unit: What the term is divided by, see :func:`toll_plugin.core.typical_terms`.
    """

    norm: MahalanobisNorm | None = None
    unit: float = 1.0

    def vectors(self, rows: Floats, room: Rooms | None = None) -> Floats:
        """``rows``, whose plain norm is the term; they are lost where there is ``room`` for the vectors."""
        if self.norm is None:
            return rows
        multiply = product if room is None else partial(room.product, "measured")
        measured: Floats = self.norm(in_blocks(rows), multiply, over=room is not None)
        return measured[: len(rows)]

    def term(self, rows: Floats, exponent: int, room: Rooms | None = None) -> Floats:
        """The term of each of ``rows``, shape ``(N,)``."""
        return self.term_of(self.vectors(rows, room), exponent)

    def term_of(self, vectors: Floats, exponent: int) -> Floats:
        """The term of rows that are measured."""
        term: Floats = norm_per_sample(vectors, exponent) / self.unit
        return term

    @property
    def largest(self) -> int:
        """Size of the largest factor of its products."""
        return 0 if self.norm is None else self.norm.largest


class TableMember(NamedTuple):
    """A trained network and what it gives to the score.

    Attributes:
        network: Returns ``(reconstruction, latent)``.
        residual: How its residual is measured; ``None`` if it gives no reconstruction term.
        latent: How its latent is measured; ``None`` if it gives no latent term.
    """

    network: nn.Module
    residual: Measure | None = Measure()
    latent: Measure | None = Measure()


class TableParts(NamedTuple):
    """What the scores of N rows are made of.

    Attributes:
        reconstruction: Reconstruction term, shape ``(N,)``.
        latent: Latent term, unweighted, shape ``(N,)``.
        contributions: Share of each input in the reconstruction term, shape ``(N, n_inputs)``;
            a row adds up to its reconstruction term.
    """

    reconstruction: Floats
    latent: Floats
    contributions: Floats


class TableModel:
    r"""A fitted model of a table: :math:`s = \frac1R \sum_m \|x - \hat x_m\|^p + w \frac1C \sum_m \|z_m\|^p`.

    The first mean is over the members that give a reconstruction term, the second over those that give a
    latent term; each term in its member's norm and unit. Everything is computed in double precision, and a
    row's score does not depend on which rows are scored with it, to the last bit.

    Args:
        scaling: Fitted; from raw rows to the networks' input.
        members: One or more.
        weight: ``w``.
        exponent: ``p``.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"``: what :meth:`score` returns.

    Raises:
        ValueError: If ``score_term`` is unknown, or no member gives a term that it needs.

    Example:
        >>> import numpy as np
        >>> from toll_plugin.core import DenseAutoencoder
        >>> x = np.random.default_rng(0).normal(size=(20, 6))
        >>> model = TableModel(TableScaling().fit(x), [TableMember(DenseAutoencoder(6, (8,), 2))], weight=0.1)
        >>> bool((model.score(x)[:1] == model.score(x[:1])).all())
        True
    """

    def __init__(
        self,
        scaling: Preprocessing,
        members: Sequence[TableMember],
        weight: float,
        exponent: int = 1,
        score_term: ScoreTerm = "total",
    ) -> None:
        check_option("score_term", score_term, get_args(ScoreTerm))
        self.scaling, self.members, self.weight, self.exponent = scaling, list(members), weight, exponent
        self.score_term = score_term
        self.inputs = int(self.members[0].network.input_shape[0])  # type: ignore[index]
        self._runners = [
            FoldedAutoencoder(member.network)
            if isinstance(member.network, DenseAutoencoder)
            else ModuleAutoencoder(member.network)
            for member in self.members
        ]
        self._folded = all(isinstance(runner, FoldedAutoencoder) for runner in self._runners)
        measures = [measure for member in self.members for measure in member[1:] if measure is not None]
        self._largest = max(part.largest for part in [*self._runners, *measures])
        needed = "latent" if score_term == "latent" else "residual"
        if all(getattr(member, needed) is None for member in self.members):
            msg = f"score_term={score_term!r} needs a member that measures its {needed}, got none"
            raise ValueError(msg)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is computed from the networks is left out of pickles, so that they name no module that may move.
        return type(self), (self.scaling, self.members, self.weight, self.exponent, self.score_term)

    def score(self, x: NDArray[Any]) -> Floats:
        """Anomaly scores ``(N,)`` of raw rows ``(N, n_features)``; higher is more anomalous."""
        scores, room = np.empty(len(x)), Rooms() if len(x) > MANY else None
        with self._computing(len(x)):
            for rows, scaled, inputs in self._chunks(x, room=room):
                terms = self._terms(scaled, inputs, room)
                scores[rows] = toll_score(terms, beta=self.weight, term=self.score_term)[: rows.stop - rows.start]
        if not math.isfinite(scores.sum()):
            # Rows of raw features that are so far away that double precision ends.
            np.nan_to_num(scores, copy=False, nan=_LARGEST, posinf=_LARGEST)
        return scores

    def parts(self, x: NDArray[Any]) -> TableParts:
        """What the scores are made of, see :class:`TableParts`."""
        found: list[TableParts] = []
        with self._computing(len(x)):
            for rows, scaled, inputs in self._chunks(x):
                contributions: list[Floats] = []
                terms = self._terms(scaled, inputs, None, contributions)
                parts = (*terms, np.mean(contributions, axis=0) if contributions else np.zeros_like(scaled))
                n = rows.stop - rows.start
                found.append(TableParts(*(np.nan_to_num(part[:n], nan=_LARGEST) for part in parts)))
        return TableParts(*(np.concatenate(part) for part in zip(*found, strict=True)))

    def _terms(
        self, scaled: Floats, inputs: Floats, room: Rooms | None, contributions: list[Floats] | None = None
    ) -> TollTerms[NDArray[Any]]:
        """Both terms of scaled rows, means over the members that give them; each one's contributions are added."""
        errors, norms = [], []
        for member, run in zip(self.members, self._runners, strict=True):
            reconstruction, latent = run(inputs, decode=member.residual is not None, room=room)
            if member.residual is not None and reconstruction is not None:
                residual = member.residual.vectors(np.subtract(scaled, reconstruction, out=reconstruction), room)
                errors.append(member.residual.term_of(residual, self.exponent))
                if contributions is not None:
                    contributions.append(_shares(residual) * errors[-1][:, None])
            if member.latent is not None:
                norms.append(member.latent.term(latent, self.exponent, room))
        return TollTerms(*(_mean(terms, len(scaled)) for terms in (errors, norms)))

    def latent(self, x: NDArray[Any]) -> Floats:
        """Latents of the first member that gives a latent term, shape ``(N, latent_dim)``."""
        first = next((i for i, member in enumerate(self.members) if member.latent is not None), 0)
        with self._computing(len(x)):
            chunks = [(rows, self._runners[first](inputs, decode=False)[1]) for rows, _, inputs in self._chunks(x)]
        return np.concatenate([latent[: rows.stop - rows.start] for rows, latent in chunks])

    def vectors(
        self, member: int, kind: Literal["residual", "latent"], x: Table, index: NDArray[np.int64]
    ) -> Iterator[Floats]:
        """Residuals or latents of the rows at ``index`` before they are measured, in pieces ``(n, ...)``."""
        run = self._runners[member]
        with self._computing(len(index)):
            for rows, scaled, inputs in self._chunks(x, index):
                reconstruction, latent = run(inputs, decode=kind == "residual")
                vectors = latent if reconstruction is None or kind == "latent" else scaled - reconstruction
                yield vectors[: rows.stop - rows.start]

    def _computing(self, count: int) -> AbstractContextManager[object]:
        """Silence about what overflows, and one thread where more would change the last bits."""
        silence = np.errstate(over="ignore", invalid="ignore")
        if count <= MANY - BLOCK and self._largest <= _ONE_THREAD:  # fewer than MANY with the rows that fill a block
            return silence
        both = ExitStack()
        both.enter_context(one_blas_thread() if self._folded else one_thread())
        both.enter_context(silence)
        return both

    def _chunks(
        self, x: Table, index: NDArray[np.int64] | None = None, room: Rooms | None = None
    ) -> Iterator[tuple[slice, Floats, Floats]]:
        """Which rows, scaled rows, and what the networks see of them; zeros at the end fill the last block."""
        count = len(x) if index is None else len(index)
        size = max(BLOCK, min(512, (_CHUNK - 1) // self.inputs))
        if size > MANY or self._folded:
            size = max(size // MANY, 1) * MANY
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            raw = x[rows] if index is None else x[index[rows]]
            if isinstance(self.scaling, TableScaling):
                place = None if room is None else room("scaled", len(raw), self.inputs)
                scaled, inputs = self.scaling.transform_and_clip(raw, place)
            else:
                # Always as many rows: what a transformer computes may depend on their number, as products do.
                raw = np.concatenate([raw, np.repeat(raw[-1:], size - len(raw), axis=0)])
                scaled = inputs = scale_rows(self.scaling, raw)[: rows.stop - start]
            whole = in_blocks(scaled)
            yield rows, whole, whole if inputs is scaled else in_blocks(inputs)


def _mean(terms: list[Floats], count: int) -> Floats:
    mean: Floats = sum(terms[1:], start=terms[0]) / len(terms) if terms else np.zeros(count)
    return mean


def _shares(vectors: Floats) -> Floats:
    """Share of each component in its row's squared norm."""
    # Divided by the largest first, whose square may leave double precision.
    squares = np.square(vectors / np.maximum(np.abs(vectors).max(axis=1, keepdims=True), _SMALLEST))
    shares: Floats = squares / np.maximum(squares.sum(axis=1, keepdims=True), _SMALLEST)
    return shares


#: Weights of a layer from which BLAS may split a block among threads.
_ONE_THREAD = 1 << 17
_SMALLEST = float(np.finfo(np.float64).tiny)
_LARGEST = float(np.finfo(np.float64).max)
