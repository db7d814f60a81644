r"""What held-out normal samples promise of the rate of false alarms, by order statistics alone.

Let n scores be held out, exchangeable with those to come, and the threshold the k-th smallest of them. The rate at
which further normal samples lie above it is a number that depends on the draw of the n. If scores have no ties it has
a beta distribution, whatever that of the scores:

.. math:: P(\text{rate} \le r) = P(\mathrm{Beta}(n + 1 - k, k) \le r)
    = 1 - \sum_{j=0}^{n-k} \binom nj r^j (1 - r)^{n-j},

the chance that of n samples more than n - k lie above the true quantile 1 - r; ties only make the rate smaller. Its
mean is :math:`(n + 1 - k) / (n + 1)`. So a quantile can be asked for on average over draws, or at a confidence.
"""

from __future__ import annotations

import math

from toll_plugin.core.checks import check_integer, check_share

__all__ = ["confidence_of", "images_needed", "promised_rate", "threshold_rank"]


def confidence_of(rate: float, n: int, k: int) -> float:
    """The chance that the rate of false alarms is at most ``rate``.

    Args:
        rate: r, in [0, 1].
        n: Held-out scores.
        k: The threshold is the k-th smallest of them, 1 to n.

    Example:
        >>> round(confidence_of(0.05, 59, 59), 4)  # 1 - 0.95 ** 59
        0.9515
    """
    n, k = _checked(n, k)
    if not 0 < check_share("rate", rate) < 1:
        return float(rate >= 1)
    logs = (math.log(rate), math.log1p(-rate))
    chances = (_log_choose(n, j) + j * logs[0] + (n - j) * logs[1] for j in range(n - k + 1))
    return max(0.0, 1 - math.fsum(math.exp(chance) for chance in chances))


def promised_rate(n: int, k: int, confidence: float = 0.95) -> float:
    """The rate of false alarms that is not exceeded, at this confidence.

    Args:
        n: Held-out scores.
        k: The threshold is the k-th smallest of them, 1 to n.
        confidence: The share of draws of the n for which it holds, in (0, 1).

    Returns:
        The smallest r whose :func:`confidence_of` is at least ``confidence``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range.

    Example:
        >>> round(promised_rate(59, 59), 4), round(promised_rate(40, 40), 4)
        (0.0495, 0.0722)
    """
    n, k = _checked(n, k)
    confidence = check_share("confidence", confidence, above_zero=True, below_one=True)
    if k == n:
        return -math.expm1(math.log1p(-confidence) / n)
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if confidence_of(middle, n, k) >= confidence else (middle, high)
    return high


def images_needed(quantile: float, confidence: float | None = 0.95) -> int:
    r"""How many held-out scores it takes to promise that at least ``quantile`` of normal samples are not flagged.

    With fewer, even their largest is no such threshold.

    Args:
        quantile: q, in (0, 1).
        confidence: Of the promise, in (0, 1). ``None`` is satisfied where it holds on average over draws.

    Returns:
        The least n of which :math:`1 - q^n \ge` confidence, or :math:`n / (n + 1) \ge q` on average.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range.

    Example:
        >>> images_needed(0.95), images_needed(0.99), images_needed(0.99, confidence=None)
        (59, 299, 99)
    """
    quantile = check_share("quantile", quantile, above_zero=True, below_one=True)
    if confidence is None:
        return max(1, math.ceil(quantile / (1 - quantile) - 1e-9))
    n = math.log1p(-check_share("confidence", confidence, above_zero=True, below_one=True)) / math.log(quantile)
    return max(1, math.ceil(n - 1e-9))


def threshold_rank(n: int, quantile: float, confidence: float | None = None) -> int:
    r"""Which of n held-out scores is the threshold for a chosen rate of false alarms.

    Args:
        n: Held-out scores.
        quantile: q, the share of normal samples that should not be flagged, in (0, 1].
        confidence: ``None`` (default): on average over draws of the n, which is split conformal prediction. In (0, 1):
            in this share of draws.

    Returns:
        The k of the k-th smallest: :math:`\lceil (n + 1) q \rceil`, or the least k whose :func:`confidence_of` the rate
        1 - q is at least ``confidence``; n where there are too few, see :func:`images_needed`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range.

    Source:
        On average: e.g. arXiv 2107.07511, section 1. At a confidence: Wilks (1941), tolerance limits.

    Example:
        >>> threshold_rank(1000, 0.99), threshold_rank(1000, 0.99, confidence=0.95)
        (991, 996)
    """
    n, quantile = check_integer("n", n, minimum=1), check_share("quantile", quantile, above_zero=True)
    if confidence is None:
        return min(max(math.ceil((n + 1) * quantile - 1e-9), 1), n)
    confidence = check_share("confidence", confidence, above_zero=True, below_one=True)
    low, high = 1, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if confidence_of(1 - quantile, n, middle) >= confidence else (middle + 1, high)
    return low


def _checked(n: int, k: int) -> tuple[int, int]:
    n, k = check_integer("n", n, minimum=1), check_integer("k", k, minimum=1)
    if k > n:
        msg = f"k must be at most n, {n}, got {k}"
        raise ValueError(msg)
    return n, k


def _log_choose(n: int, j: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1)
