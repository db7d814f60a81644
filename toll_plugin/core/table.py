"""From the raw rows of a table to scores: scaling, networks, and the metric of the residual."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toll_plugin.core.folded import BLOCK, FoldedAutoencoder, ModuleAutoencoder, in_blocks
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import TollLoss, TollTerms

__all__ = ["Floats", "Preprocessing", "ResidualMetric", "TableModel", "TableParts", "TableRows"]

Floats = NDArray[np.float64]

#: Added to the eigenvalues of the residuals' correlation matrix.
_RIDGE = 0.1
#: Norms of residuals count up to this many times their median in the metric.
_DRAWN_IN = 5.0
#: Values per pass of scoring: few enough that the processor's cache holds what lies between the layers, and
#: that torch starts no threads, for which a forked process would wait forever.
_CHUNK = 1 << 15


class Preprocessing(Protocol):
    """What brings raw rows to the scale that the networks see."""

    def transform(self, X: Any) -> Any:  # noqa: N803  scikit-learn's name
        """Rows ``(N, n_features)`` to rows ``(N, n_inputs)``, as a new array."""


class TableRows:
    """Rows of an array that are scaled when they are fetched, so that no scaled copy is kept.

    Args:
        x: Array of shape ``(N, n_features)``; a memory map is read batch by batch.
        index: Which rows, shape ``(n,)``.
        scaling: Applied in double precision; what comes out is single.
        device: Where the rows are put.
    """

    def __init__(self, x: NDArray[Any], index: NDArray[np.int64], scaling: Preprocessing, device: torch.device) -> None:
        self._x, self._index, self._scaling, self._device = x, index, scaling, device

    def __len__(self) -> int:
        """How many rows."""
        return len(self._index)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The scaled rows at ``index``."""
        rows = self._index[index if isinstance(index, slice) else index.numpy()]
        scaled = np.asarray(self._scaling.transform(self._x[rows]), dtype=np.float32)
        return torch.from_numpy(scaled).to(self._device)


class ResidualMetric(NamedTuple):
    r"""The norm that residuals are measured in, :math:`\|M(r - m)\|`.

    With :meth:`of`, ``M`` is the inverse root of the residuals' covariance on normal rows, so the
    norm is their Mahalanobis distance: a direction that normal rows are always reconstructed
    well in counts more than one that they are not.

    Attributes:
        mean: ``m``, shape ``(n_inputs,)``.
        matrix: ``M``, symmetric, shape ``(n_inputs, n_inputs)``.
    """

    mean: Floats
    matrix: Floats

    @classmethod
    def of(cls, residuals: Iterable[Floats]) -> ResidualMetric:
        """The metric of residuals that come in pieces ``(N, n_inputs)``, at least one row in all.

        A row whose norm is more than 5 times the median's of its piece is drawn in to that, so that
        anomalies among the rows do not hide others like them.
        """
        count, total, products = 0, 0.0, 0.0
        for piece in residuals:
            norm = np.sqrt(np.square(piece).sum(axis=1))
            most = _DRAWN_IN * np.median(norm)
            drawn = piece * np.divide(most, norm, out=np.ones_like(norm), where=norm > most)[:, None]
            count += len(piece)
            total = total + drawn.sum(axis=0)
            products = products + drawn.T @ drawn
        mean = np.asarray(total) / count
        covariance = products / count - np.outer(mean, mean)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
        # A column that is always reconstructed exactly would weigh without bound.
        deviation = np.maximum(deviation, 1e-3 * max(float(deviation.max()), 1e-12))
        values, vectors = np.linalg.eigh(covariance / np.outer(deviation, deviation))
        root = (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE)) @ vectors.T
        return cls(mean, root / deviation[:, None])


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
    r"""A fitted model of a table: :math:`s = \frac1M \sum_m \|M_r(x - \hat x_m)\|^p + \beta\|z_m\|^p`.

    Everything is computed in double precision, and a row's score does not depend on which rows
    are scored with it, to the last bit.

    Args:
        scaling: Fitted; from raw rows to the networks' input.
        networks: One or more trained networks, averaged.
        loss: Holds beta and the exponent.
        metric: Of the residual; the plain Euclidean norm by default.

    Example:
        >>> from toll_plugin.core.table_scaling import TableScaling
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
    ) -> None:
        self.scaling, self.networks, self.loss, self.metric = scaling, list(networks), loss, metric
        self.inputs = int(self.networks[0].input_shape[0])  # type: ignore[index]
        self._members = [
            FoldedAutoencoder(network) if isinstance(network, DenseAutoencoder) else ModuleAutoencoder(network)
            for network in networks
        ]

    def score(self, x: NDArray[Any]) -> Floats:
        """Anomaly scores ``(N,)`` of raw rows ``(N, n_features)``; higher is more anomalous."""
        scores = np.zeros(len(x))
        for rows, scaled in self._chunks(x):
            part = scores[rows]
            for terms in self._terms(scaled):
                part += np.asarray(self.loss.score(terms))[: len(part)]
        scores /= len(self._members)
        if not np.isfinite(scores).all():
            # Rows of raw features that are so far away that double precision ends.
            np.nan_to_num(scores, copy=False, nan=_LARGEST, posinf=_LARGEST)
        return scores

    def parts(self, x: NDArray[Any]) -> TableParts:
        """What the scores are made of, see :class:`TableParts`."""
        found: list[TableParts] = []
        for rows, scaled in self._chunks(x):
            n, members = rows.stop - rows.start, []
            for member in self._members:
                reconstruction, latent = member(scaled)
                target, reconstruction = self._measured(scaled, reconstruction)
                terms = self._toll_terms(target, reconstruction, latent)
                squares = np.square(target - reconstruction)
                total = squares.sum(axis=1, keepdims=True)
                shares = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
                error, norm = (np.asarray(term) for term in terms)
                members.append((error[:n], norm[:n], (shares * error[:, None])[:n]))
            found.append(TableParts(*(np.mean(part, axis=0) for part in zip(*members, strict=True))))
        return TableParts(*(np.concatenate(part) for part in zip(*found, strict=True)))

    def latent(self, x: NDArray[Any]) -> Floats:
        """Latents of the first member, shape ``(N, latent_dim)``."""
        parts = [self._members[0](scaled)[1][: rows.stop - rows.start] for rows, scaled in self._chunks(x)]
        return np.concatenate(parts)

    def residuals(self, x: NDArray[Any], index: NDArray[np.int64]) -> Iterator[Floats]:
        """Residuals of the rows at ``index`` in the networks' input, of all members, in pieces ``(n, n_inputs)``."""
        for rows, scaled in self._chunks(x, index):
            for member in self._members:
                yield (scaled - member(scaled)[0])[: rows.stop - rows.start]

    def _chunks(self, x: NDArray[Any], index: NDArray[np.int64] | None = None) -> Iterator[tuple[slice, Floats]]:
        count = len(x) if index is None else len(index)
        size = max(BLOCK, min(512, (_CHUNK - 1) // self.inputs))
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            raw = x[rows] if index is None else x[index[rows]]
            scaled = np.ascontiguousarray(self.scaling.transform(raw), dtype=np.float64)
            yield rows, in_blocks(scaled)

    def _terms(self, scaled: Floats) -> Iterator[TollTerms]:
        for member in self._members:
            reconstruction, latent = member(scaled)
            yield self._toll_terms(*self._measured(scaled, reconstruction), latent)

    def _measured(self, scaled: Floats, reconstruction: Floats) -> tuple[Floats, Floats]:
        """Both in the metric of the residual."""
        if self.metric is None:
            return scaled, reconstruction
        residual = scaled - reconstruction
        residual -= self.metric.mean
        measured = np.matmul(residual.reshape(-1, BLOCK, residual.shape[1]), self.metric.matrix)
        return measured.reshape(residual.shape), np.zeros_like(residual)

    def _toll_terms(self, x: Floats, reconstruction: Floats, latent: Floats) -> TollTerms:
        arrays: Any = (x, reconstruction, latent)
        return self.loss.terms(*arrays)


_LARGEST = float(np.finfo(np.float64).max)
