"""From the raw rows of a table to scores: scaling, networks, and the metric of the residual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from toll_plugin.core.checks import check_option
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import ScoreTerm, TollLoss, terms_of_residual
from toll_plugin.core.tables.metric import ResidualMetric
from toll_plugin.core.tables.rows import Preprocessing, scale_rows
from toll_plugin.core.tables.scaling import Floats, TableScaling
from toll_plugin.core.tables.scoring import BLOCK, FoldedAutoencoder, ModuleAutoencoder, in_blocks
from toll_plugin.core.threads import one_thread

__all__ = ["TableModel", "TableParts"]

#: Values per pass of scoring: few enough that the processor's cache holds what lies between the layers, and
#: that torch starts no threads, for which a forked process would wait forever.
_CHUNK = 1 << 15


class TableParts(NamedTuple):
    """What the scores of N rows are made of; means over the members.

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
    r"""A fitted model of a table: :math:`s = \frac1M \sum_m \|x - \hat x_m\|^p + \beta\|z_m\|^p`.

    Everything is computed in double precision, and a row's score does not depend on which rows
    are scored with it, to the last bit.

    Args:
        scaling: Fitted; from raw rows to the networks' input.
        networks: One or more trained networks, averaged.
        loss: Holds beta and the exponent.
        metric: Of the residual; the plain Euclidean norm by default.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"``: what :meth:`score` returns.

    Raises:
        ValueError: If ``score_term`` is unknown.

    Example:
        >>> import numpy as np
        >>> from toll_plugin.core import DenseAutoencoder, TollLoss
        >>> x = np.random.default_rng(0).normal(size=(20, 6))
        >>> model = TableModel(TableScaling().fit(x), [DenseAutoencoder(6, (8,), 2)], TollLoss(0.1))
        >>> bool((model.score(x)[:1] == model.score(x[:1])).all())
        True
    """

    def __init__(
        self,
        scaling: Preprocessing,
        networks: Sequence[nn.Module],
        loss: TollLoss,
        metric: ResidualMetric | None = None,
        score_term: ScoreTerm = "total",
    ) -> None:
        check_option("score_term", score_term, get_args(ScoreTerm))
        self.scaling, self.networks, self.loss, self.metric = scaling, list(networks), loss, metric
        self.score_term = score_term
        self.inputs = int(self.networks[0].input_shape[0])  # type: ignore[index]
        self._limit: float | None = getattr(scaling, "limit", None)
        self._members = [
            FoldedAutoencoder(network) if isinstance(network, DenseAutoencoder) else ModuleAutoencoder(network)
            for network in networks
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        # What is computed from the networks is left out of pickles, so that they name no module that may move.
        return type(self), (self.scaling, self.networks, self.loss, self.metric, self.score_term)

    def score(self, x: NDArray[Any]) -> Floats:
        """Anomaly scores ``(N,)`` of raw rows ``(N, n_features)``; higher is more anomalous."""
        scores = np.zeros(len(x))
        with self._computing():
            for rows, scaled in self._chunks(x):
                part, inputs = scores[rows], self._clipped(scaled)
                for member in self._members:
                    reconstruction, latent = member(inputs)
                    terms = terms_of_residual(
                        self._measured(scaled, reconstruction), latent, exponent=self.loss.exponent
                    )
                    part += self.loss.score(terms, self.score_term)[: len(part)]
        scores /= len(self._members)
        if not np.isfinite(scores).all():
            # Rows of raw features that are so far away that double precision ends.
            np.nan_to_num(scores, copy=False, nan=_LARGEST, posinf=_LARGEST)
        return scores

    def parts(self, x: NDArray[Any]) -> TableParts:
        """What the scores are made of, see :class:`TableParts`."""
        found: list[TableParts] = []
        with self._computing():
            for rows, scaled in self._chunks(x):
                n, members, inputs = rows.stop - rows.start, [], self._clipped(scaled)
                for member in self._members:
                    reconstruction, latent = member(inputs)
                    residual = self._measured(scaled, reconstruction)
                    error, norm = terms_of_residual(residual, latent, exponent=self.loss.exponent)
                    # Divided by the largest first, whose square may leave double precision.
                    squares = np.square(residual / np.maximum(np.abs(residual).max(axis=1, keepdims=True), _SMALLEST))
                    shares = squares / np.maximum(squares.sum(axis=1, keepdims=True), _SMALLEST)
                    members.append((error[:n], norm[:n], (shares * error[:, None])[:n]))
                means = (np.nan_to_num(np.mean(part, axis=0), nan=_LARGEST) for part in zip(*members, strict=True))
                found.append(TableParts(*means))
        return TableParts(*(np.concatenate(part) for part in zip(*found, strict=True)))

    def latent(self, x: NDArray[Any]) -> Floats:
        """Latents of the first member, shape ``(N, latent_dim)``."""
        with self._computing():
            chunks = [(rows, self._members[0](self._clipped(scaled))[1]) for rows, scaled in self._chunks(x)]
        return np.concatenate([latent[: rows.stop - rows.start] for rows, latent in chunks])

    def residuals(self, x: NDArray[Any], index: NDArray[np.int64]) -> Iterator[Floats]:
        """Residuals of the rows at ``index`` before the metric, of all members, in pieces ``(n, n_inputs)``."""
        with self._computing():
            for rows, scaled in self._chunks(x, index):
                inputs = self._clipped(scaled)
                for member in self._members:
                    yield (scaled - member(inputs)[0])[: rows.stop - rows.start]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Silence about what overflows, and one thread where more would change the last bits."""
        largest = max(0 if self.metric is None else self.metric.matrix.size, *(m.largest for m in self._members))
        threads = one_thread() if largest > _ONE_THREAD else nullcontext()
        with threads, np.errstate(over="ignore", invalid="ignore"):
            yield

    def _chunks(self, x: NDArray[Any], index: NDArray[np.int64] | None = None) -> Iterator[tuple[slice, Floats]]:
        count = len(x) if index is None else len(index)
        size = max(BLOCK, min(512, (_CHUNK - 1) // self.inputs))
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            raw = x[rows] if index is None else x[index[rows]]
            if not isinstance(self.scaling, TableScaling):
                # Always as many rows: what a transformer computes may depend on their number, as products do.
                raw = np.concatenate([raw, np.repeat(raw[-1:], size - len(raw), axis=0)])
            yield rows, in_blocks(scale_rows(self.scaling, raw)[: rows.stop - start])

    def _clipped(self, scaled: Floats) -> Floats:
        """What the networks see."""
        if self._limit is None or max(scaled.max(), -scaled.min()) <= self._limit:
            return scaled
        return scaled.clip(-self._limit, self._limit)

    def _measured(self, scaled: Floats, reconstruction: Floats) -> Floats:
        """The residual, in its metric."""
        residual = scaled - reconstruction
        if self.metric is None:
            return residual
        residual -= self.metric.mean
        measured = np.matmul(residual.reshape(-1, BLOCK, residual.shape[1]), self.metric.matrix)
        reshaped: Floats = measured.reshape(residual.shape)
        return reshaped


#: Weights of a layer from which BLAS may split a block among threads.
_ONE_THREAD = 1 << 17
_SMALLEST = float(np.finfo(np.float64).tiny)
_LARGEST = float(np.finfo(np.float64).max)
