"""What held-out images promise: against SciPy's distributions, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from toll_plugin.core import images_needed, promised_rate, threshold_rank
from toll_plugin.core.guarantee import confidence_of


@st.composite
def _ranks(draw):
    n = draw(st.integers(1, 2000))
    return n, draw(st.integers(max(1, n - 100), n) | st.integers(1, n))


@settings(deadline=None)
@given(_ranks(), st.floats(1e-6, 1 - 1e-6))
def test_the_confidence_is_a_tail_of_beta_and_of_binomial(ranks, rate):
    n, k = ranks
    found = confidence_of(rate, n, k)
    assert found == pytest.approx(beta.cdf(rate, n + 1 - k, k), abs=1e-9)
    assert found == pytest.approx(binom.sf(n - k, n, rate), abs=1e-9)


@settings(deadline=None)
@given(_ranks(), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_promised_rate_is_a_quantile_of_beta(ranks, confidence):
    n, k = ranks
    assert promised_rate(n, k, confidence) == pytest.approx(beta.ppf(confidence, n + 1 - k, k), abs=1e-9)


def test_numbers_worked_out_by_hand():
    # 0.95 ** 58 = 0.0510, 0.95 ** 59 = 0.0485; 0.99 ** 298 = 0.0500299, 0.99 ** 299 = 0.0495
    assert images_needed(0.95) == 59
    assert images_needed(0.99) == 299
    assert images_needed(0.9, 0.9) == 22
    assert images_needed(0.5, 0.75) == 2
    assert images_needed(0.5, 0.5) == 1
    assert [images_needed(q, None) for q in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
    assert promised_rate(1, 1, 0.95) == pytest.approx(0.95)
    assert promised_rate(2, 1, 0.75) == pytest.approx(0.8660254)  # (1 - F)'s distribution is r ** 2
    assert confidence_of(0.0, 3, 2) == 0
    assert confidence_of(1.0, 3, 2) == 1


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(500, 999), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_rank_is_the_least_that_keeps_the_promise(n, thousandths, confidence):
    quantile = thousandths / 1000
    k = threshold_rank(n, quantile, confidence)
    kept = binom.sf(n - np.array([k - 1, k]), n, 1 - quantile) if k > 1 else [0, binom.sf(n - k, n, 1 - quantile)]
    enough = n >= images_needed(quantile, confidence)
    assert k >= threshold_rank(n, quantile) or confidence < 0.9
    assert (promised_rate(n, k, confidence) <= 1 - quantile + 1e-9) == enough
    if enough:
        assert kept[1] >= confidence - 1e-9
        assert kept[0] < confidence + 1e-9
    else:
        assert k == n


@pytest.mark.parametrize(
    ("n", "quantile", "confidence"), [(59, 0.95, 0.95), (40, 0.99, None), (200, 0.9, 0.95), (200, 0.9, None)]
)
def test_the_promise_is_kept_in_its_share_of_draws(n, quantile, confidence):
    draw = np.random.default_rng(0)
    k = threshold_rank(n, quantile, confidence)
    rate = promised_rate(n, k, 0.95)
    # Of a uniform score the rate above a threshold is known; the order of any other is the same.
    thresholds = np.sort(draw.random((2000, n)), axis=1)[:, k - 1]
    kept = np.mean(1 - thresholds <= rate)
    assert abs(kept - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)
    assert abs(np.mean(1 - thresholds) - (n + 1 - k) / (n + 1)) < 0.005


def test_ties_only_make_fewer_false_alarms():
    draw = np.random.default_rng(1)
    rate = promised_rate(30, 28, 0.9)
    thresholds = np.sort(draw.integers(0, 5, (2000, 30)), axis=1)[:, 27]
    assert np.mean((4 - thresholds) / 5 <= rate) >= 0.9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: images_needed(1.0), ValueError, r"quantile must be in \(0, 1\), got 1.0"),
        (lambda: images_needed(0.9, 1), ValueError, r"confidence must be in \(0, 1\), got 1"),
        (lambda: promised_rate(3, 4), ValueError, "k must be at most n, 3, got 4"),
        (lambda: promised_rate(0, 1), ValueError, "n must be at least 1"),
        (lambda: threshold_rank(3, 1.5), ValueError, r"quantile must be in \(0, 1\], got 1.5"),
        (lambda: threshold_rank(3.0, 0.5), TypeError, "n must be an integer"),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
