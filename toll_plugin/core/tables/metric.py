"""The norm that residuals and latents of a table are measured in."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from toll_plugin.core.tables.scaling import Floats

__all__ = ["MahalanobisNorm"]

#: Added to the eigenvalues of the correlation matrix.
_RIDGE = 0.1
#: Norms of rows count up to this many times their median.
_DRAWN_IN = 5.0
#: Eigenvalues below this share of the largest are rounding errors of the products.
_ROUNDING = 1e-12


class MahalanobisNorm(NamedTuple):
    r"""A distance under the covariance of normal rows, as the plain norm of measured rows.

    With :math:`u = (r - m) / d`, a row r is measured as

    .. math:: u / \sqrt\rho - (u V) \operatorname{diag}(c) V^\top

    The deviations d bring the columns to one scale. With the eigenvectors V and eigenvalues :math:`\lambda` of their
    correlations, a ridge :math:`\rho = 0.1` and :math:`c = \rho^{-1/2} - (\lambda + \rho)^{-1/2}`, this is the product
    with the inverse root of the correlations plus the ridge: a direction in which normal rows lie close
    together counts more than one in which they do not.

    V has as many columns as there are directions in which the rows vary, so a table of more columns than
    rows costs what its rows do. Where they vary in all, the matrix of the whole product is kept instead.

    Attributes:
        mean: ``m``, shape ``(n,)``.
        scale: One over ``d`` and the root of the ridge, shape ``(n,)``; with a matrix, of ones.
        directions: ``V``, shape ``(n, k)``; with a matrix, of no columns.
        shrinkage: ``c`` times the root of the ridge, shape ``(k,)``.
        matrix: The whole product, shape ``(n, n)``; of no rows where it is not kept.

    Example:
        >>> import numpy as np
        >>> norm = MahalanobisNorm.of([np.array([[1.0, 10.0], [1.0, -10.0], [-1.0, 10.0], [-1.0, -10.0]])])
        >>> (1.1**0.5 * norm.matrix).round(6)  # one over the deviations; 1.1 is one and the ridge
        array([[1. , 0. ],
               [0. , 0.1]])
    """

    mean: Floats
    scale: Floats
    directions: Floats
    shrinkage: Floats
    matrix: Floats

    @classmethod
    def of(cls, pieces: Iterable[Floats], count: int | None = None) -> MahalanobisNorm:
        """The norm of rows that come in pieces ``(N, n)``, at least one row in all.

        They are kept in memory only if they are fewer than their columns, which is known beforehand if their
        ``count`` is given. A row whose plain norm is more than 5 times the median of its piece is drawn in to
        that, so that anomalies among the rows do not hide others like them.
        """
        if count is None:
            pieces = list(pieces)
            count = sum(map(len, pieces))
        rest = map(_drawn_in, pieces)
        first = next(rest)
        drawn = itertools.chain([first], rest)
        return cls.low_rank(np.concatenate(list(drawn))) if count < first.shape[1] else cls.dense(drawn)

    @classmethod
    def dense(cls, pieces: Iterable[Floats]) -> MahalanobisNorm:
        """From the covariance ``(n, n)``."""
        rows, total, products = 0, np.zeros(1), np.zeros((1, 1))
        for piece in pieces:
            rows += len(piece)
            total = total + piece.sum(axis=0)
            products = products + piece.T @ piece
        mean = total / rows
        covariance = products / rows - np.outer(mean, mean)
        deviation = _deviation(np.diag(covariance))
        values, vectors = np.linalg.eigh(covariance / np.outer(deviation, deviation))
        root = (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE)) @ vectors.T
        size = len(mean)
        return cls(mean, np.ones(size), np.zeros((size, 0)), np.zeros(0), root / deviation[:, None])

    @classmethod
    def low_rank(cls, rows: Floats) -> MahalanobisNorm:
        """From the products of the rows with each other, ``(N, N)``: the same norm, for fewer rows than columns."""
        mean = rows.mean(axis=0)
        rows = rows - mean
        deviation = _deviation(np.einsum("nd,nd->d", rows, rows) / len(rows))
        rows /= deviation
        values, vectors = np.linalg.eigh(rows @ rows.T / len(rows))
        varying = values > _ROUNDING * max(float(values[-1]), 0.0)
        values = values[varying]
        directions = rows.T @ (vectors[:, varying] / np.sqrt(values * len(rows)))
        scale = 1 / (deviation * np.sqrt(_RIDGE))
        return cls(mean, scale, directions, 1 - np.sqrt(_RIDGE / (values + _RIDGE)), np.zeros((0, len(mean))))

    def __call__(self, rows: Any, product: Callable[[Any, Any], Any] = operator.matmul, *, over: bool = False) -> Any:
        """Measured rows, of the shape ``(..., n)`` of ``rows``; NumPy arrays, or tensors if the attributes are.

        ``rows`` may be written ``over``.
        """
        rows = np.subtract(rows, self.mean, out=rows) if over else rows - self.mean
        if len(self.matrix):
            return product(rows, self.matrix)
        rows = rows * self.scale
        return rows - product(product(rows, self.directions) * self.shrinkage, self.directions.T)

    @property
    def largest(self) -> int:
        """Size of the largest factor."""
        return max(self.matrix.size, self.directions.size)


def _drawn_in(piece: Floats) -> Floats:
    norm = np.sqrt(np.square(piece).sum(axis=1))
    most = _DRAWN_IN * np.median(norm)
    drawn: Floats = piece * np.divide(most, norm, out=np.ones_like(norm), where=norm > most)[:, None]
    return drawn


def _deviation(variance: Floats) -> Floats:
    deviation = np.sqrt(np.maximum(variance, 0))
    # A column that hardly varies would weigh without bound.
    return np.maximum(deviation, 1e-3 * max(float(deviation.max()), 1e-12))
