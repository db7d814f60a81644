"""From the raw rows of a table to scores: scaling, networks, and the metric of the residual."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import TollLoss, TollTerms
from toll_plugin.core.tables.scaling import Floats, TableScaling
from toll_plugin.core.tables.scoring import BLOCK, FoldedAutoencoder, ModuleAutoencoder, in_blocks
from toll_plugin.core.threads import one_thread

__all__ = ["Floats", "Preprocessing", "ResidualMetric", "TableModel", "TableParts", "TableRows"]

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
        scaled = _scaled(self._scaling, self._x[rows])
        with np.errstate(over="ignore"):
            single = scaled.astype(np.float32)
        if not np.isfinite(single).all():
            msg = f"preprocessing must give values that single precision holds, got up to {np.abs(scaled).max():.3g}"
            raise ValueError(msg)
        return torch.from_numpy(single).to(self._device)


def _scaled(scaling: Preprocessing, raw: NDArray[Any]) -> Floats:
    """Scaled rows, C-contiguous and in double precision; ``raw`` is left alone.

    Raises:
        ValueError: If a transformer gives something else.
    """
    if isinstance(scaling, TableScaling):
        return scaling.transform(raw)
    found = scaling.transform(np.array(raw, dtype=np.float64))  # it may write to what it is given
    try:
        scaled = np.ascontiguousarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"preprocessing must give a dense table of numbers, got {type(found).__name__} from {scaling!r}"
        raise ValueError(msg) from error
    if scaled.shape[:1] != raw.shape[:1] or scaled.ndim != 2 or not np.isfinite(scaled).all():
        msg = f"preprocessing must give one row of finite values for each row, which {scaling!r} did not"
        raise ValueError(msg)
    return scaled


class ResidualMetric(NamedTuple):
    r"""The norm that residuals are measured in, :math:`\|(r - m) M\|` of a row r.

    With :meth:`of`, ``M`` divides by the residuals' deviations on normal rows and multiplies with
    the inverse root of their correlations (a ridge of 0.1 added), so the norm is a Mahalanobis
    distance: a direction that normal rows are always reconstructed well in counts more than one
    that they are not.

    Attributes:
        mean: ``m``, shape ``(n_inputs,)``.
        matrix: ``M``, shape ``(n_inputs, n_inputs)``.
    """

    mean: Floats
    matrix: Floats

    @classmethod
    def of(cls, residuals: Iterable[Floats]) -> ResidualMetric:
        """The metric of residuals that come in pieces ``(N, n_inputs)``, at least one row in all.

        A row whose norm is more than 5 times the median of its piece is drawn in to that, so that
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
    r"""A fitted model of a table: :math:`s = \frac1M \sum_m \|x - \hat x_m\|^p + \beta\|z_m\|^p`.

    Everything is computed in double precision, and a row's score does not depend on which rows
    are scored with it, to the last bit.

    Args:
        scaling: Fitted; from raw rows to the networks' input.
        networks: One or more trained networks, averaged.
        loss: Holds beta and the exponent.
        metric: Of the residual; the plain Euclidean norm by default.

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
    ) -> None:
        self.scaling, self.networks, self.loss, self.metric = scaling, list(networks), loss, metric
        self.inputs = int(self.networks[0].input_shape[0])  # type: ignore[index]
        self._limit: float | None = getattr(scaling, "limit", None)
        self._members = [
            FoldedAutoencoder(network) if isinstance(network, DenseAutoencoder) else ModuleAutoencoder(network)
            for network in networks
        ]

    def score(self, x: NDArray[Any]) -> Floats:
        """Anomaly scores ``(N,)`` of raw rows ``(N, n_features)``; higher is more anomalous."""
        scores = np.zeros(len(x))
        with self._computing():
            for rows, scaled in self._chunks(x):
                part, inputs = scores[rows], self._clipped(scaled)
                for member in self._members:
                    reconstruction, latent = member(inputs)
                    terms = self._terms(*self._measured(scaled, reconstruction), latent)
                    part += np.asarray(self.loss.score(terms))[: len(part)]
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
                    x_measured, reconstruction = self._measured(scaled, reconstruction)
                    error, norm = (np.asarray(t) for t in self._terms(x_measured, reconstruction, latent))
                    residual = x_measured - reconstruction
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
            yield rows, in_blocks(_scaled(self.scaling, raw)[: rows.stop - start])

    def _clipped(self, scaled: Floats) -> Floats:
        """What the networks see."""
        if self._limit is None or max(scaled.max(), -scaled.min()) <= self._limit:
            return scaled
        return scaled.clip(-self._limit, self._limit)

    def _measured(self, scaled: Floats, reconstruction: Floats) -> tuple[Floats, Floats]:
        """Both in the metric of the residual: there, what is measured has the reconstruction zero."""
        if self.metric is None:
            return scaled, reconstruction
        residual = scaled - reconstruction
        residual -= self.metric.mean
        measured = np.matmul(residual.reshape(-1, BLOCK, residual.shape[1]), self.metric.matrix)
        return measured.reshape(residual.shape), np.broadcast_to(0.0, residual.shape)

    def _terms(self, x: Floats, reconstruction: Floats, latent: Floats) -> TollTerms:
        arrays: Any = (x, reconstruction, latent)
        return self.loss.terms(*arrays)


#: Weights of a layer from which BLAS may split a block among threads.
_ONE_THREAD = 1 << 17
_SMALLEST = float(np.finfo(np.float64).tiny)
_LARGEST = float(np.finfo(np.float64).max)
