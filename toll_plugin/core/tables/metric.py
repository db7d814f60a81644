"""The norm that the residuals of a table are measured in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from toll_plugin.core.tables.scaling import Floats

__all__ = ["ResidualMetric"]

#: Added to the eigenvalues of the residuals' correlation matrix.
_RIDGE = 0.1
#: Norms of residuals count up to this many times their median in the metric.
_DRAWN_IN = 5.0


class ResidualMetric(NamedTuple):
    r"""The norm that residuals are measured in, :math:`\|(r - m) M\|` of a row r.

    With :meth:`of`, ``M`` divides by the residuals' deviations on normal rows and multiplies with
    the inverse root of their correlations (a ridge of 0.1 added), so the norm is a Mahalanobis
    distance: a direction that normal rows are always reconstructed well in counts more than one
    that they are not.

    Attributes:
        mean: ``m``, shape ``(n_inputs,)``.
        matrix: ``M``, shape ``(n_inputs, n_inputs)``.

    Example:
        >>> import numpy as np
        >>> metric = ResidualMetric.of([np.array([[1.0, 10.0], [1.0, -10.0], [-1.0, 10.0], [-1.0, -10.0]])])
        >>> (1.1**0.5 * metric.matrix).round(6)  # one over the deviations; 1.1 is one and the ridge
        array([[1. , 0. ],
               [0. , 0.1]])
    """

    mean: Floats
    matrix: Floats

    @classmethod
    def of(cls, residuals: Iterable[Floats]) -> ResidualMetric:
        """The metric of residuals that come in pieces ``(N, n_inputs)``, at least one row in all.

        A row whose norm is more than 5 times the median of its piece is drawn in to that, so that
        anomalies among the rows do not hide others like them.
        """
        rows, total, products = 0, np.zeros(1), np.zeros((1, 1))
        for piece in residuals:
            norm = np.sqrt(np.square(piece).sum(axis=1))
            most = _DRAWN_IN * np.median(norm)
            drawn = piece * np.divide(most, norm, out=np.ones_like(norm), where=norm > most)[:, None]
            rows += len(piece)
            total = total + drawn.sum(axis=0)
            products = products + drawn.T @ drawn
        mean = total / rows
        covariance = products / rows - np.outer(mean, mean)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
        # A column that is always reconstructed exactly would weigh without bound.
        deviation = np.maximum(deviation, 1e-3 * max(float(deviation.max()), 1e-12))
        values, vectors = np.linalg.eigh(covariance / np.outer(deviation, deviation))
        root = (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE)) @ vectors.T
        return cls(mean, root / deviation[:, None])
