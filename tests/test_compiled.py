"""The compiled passes: NumPy's numbers to the last bit, and nobody waits for a compiler or needs one."""

from __future__ import annotations

import sys

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

from toll_plugin.core import DenseAutoencoder, DivergenceError, TollLoss, fit_ensemble
from toll_plugin.core.training import compiled
from toll_plugin.core.training.batch_norm import Dropout, Norm, Weights


@pytest.fixture(scope="module")
def loops():
    return compiled.compile_kernels(numba)


@pytest.fixture
def tiers(monkeypatch):
    """A process that has trained nothing yet."""
    monkeypatch.setattr(compiled, "_tiers", compiled._Tiers())
    return compiled._tiers


def never(_numba):
    pytest.fail("nothing is to be compiled")


def both_passes(values, gradient, share):
    """All that a Norm computes from and changes of ``values`` and ``gradient``."""
    features = values.shape[1]
    draw = np.random.default_rng(features)
    weights = [Weights(draw.normal(size=features).astype("f"), np.empty(features, "f")) for _ in range(2)]
    statistics = [draw.random(features, dtype="f") for _ in range(2)]
    norm = Norm(*weights, *statistics, 0.1, 1e-5)
    x, y, d, mask = values.copy(), np.empty_like(values), gradient.copy(), np.ones_like(values)
    dropout = Dropout.draw(share, mask, np.random.SFC64(features)) if share else None
    with np.errstate(all="ignore"):
        trace = norm.forward(x, y, training=True, dropout=dropout)
        norm.backward(d, trace)
    return x, y, d, mask, trace.inverse, *statistics, *(weight.gradient for weight in weights)


@settings(max_examples=60)
@given(
    samples=st.integers(2, 300),
    features=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.2, 0.7]),
    special=st.sampled_from([None, np.nan, np.inf, 1e30, 0.0]),
    seed=st.integers(0, 2**32),
)
def test_both_forms_are_equal_to_the_last_bit(loops, samples, features, share, special, seed):
    draw = np.random.default_rng(seed)
    values, gradient = (draw.normal(size=(samples, features)).astype("f") for _ in range(2))
    if special is not None:
        values[samples // 2] = special
    tiers = compiled._tiers
    try:
        compiled._tiers = compiled._Tiers()
        compiled._tiers.next_look = np.inf
        numpys = both_passes(values, gradient, share)
        compiled._tiers.found = loops
        others = both_passes(values, gradient, share)
    finally:
        compiled._tiers = tiers
    for one, other in zip(numpys, others, strict=True):
        np.testing.assert_array_equal(one, other)


def trained(**arguments):
    generator = torch.Generator().manual_seed(4)
    networks = [DenseAutoencoder(6, (8, 5), 2, dropout=0.1, generator=generator) for _ in range(3)]
    x = torch.randn(141, 6, generator=torch.Generator().manual_seed(1))
    fit_ensemble(networks, x, TollLoss("auto"), **{"max_epochs": 12, "validation": x[:20]} | arguments)
    return networks


def test_it_does_not_matter_when_the_compiled_form_takes_over(tiers, monkeypatch, loops):
    tiers.next_look = np.inf
    plain = trained()
    monkeypatch.setattr(compiled, "compile_kernels", lambda _: loops)
    for after in (0.0, 0.002):
        monkeypatch.setattr(compiled, "_tiers", compiled._Tiers())
        compiled._tiers.next_look = after
        for network, twin in zip(trained(), plain, strict=True):
            torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)
        assert compiled._tiers.found is loops
        assert after <= compiled._tiers.lost < after + 1e-4


def test_divergence_is_noticed(tiers, loops):
    tiers.found = loops
    with pytest.raises(DivergenceError):
        trained(lr=1e30)


def test_nobody_waits_for_a_compiler_before_a_small_fit(tiers, monkeypatch, loops):
    monkeypatch.setattr(compiled, "_cached", lambda _: False)
    monkeypatch.setattr(compiled, "compile_kernels", never)
    tiers.lost = compiled._LOADING
    trained()
    assert tiers.next_look == compiled._COMPILING
    monkeypatch.setattr(compiled, "compile_kernels", lambda _: loops)
    tiers.lost = compiled._COMPILING
    trained()
    assert tiers.found is loops


@pytest.mark.usefixtures("loops")
def test_what_an_earlier_process_compiled_is_found(tiers):
    assert compiled._cached(numba)
    tiers.next_look = 0
    trained(max_epochs=1)
    assert tiers.found is not None


def _cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)


def _cannot_be_written(monkeypatch):
    cache = getattr(caching, "CacheImpl", None) or caching._CacheImpl
    monkeypatch.setattr(cache, "_locator_classes", [])


def _cannot_be_compiled(monkeypatch):
    def fails(*_arguments, **_options):
        msg = "no such processor"
        raise numba.core.errors.LoweringError(msg)

    monkeypatch.setattr(numba, "njit", fails)


def _is_switched_off(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)


@pytest.mark.parametrize("breaks", [_cannot_be_imported, _cannot_be_written, _cannot_be_compiled, _is_switched_off])
def test_without_a_compiler_all_goes_on_with_numpy(tiers, monkeypatch, breaks):
    tiers.next_look = np.inf
    plain = trained(max_epochs=2)
    breaks(monkeypatch)
    tiers.next_look = tiers.lost = compiled._COMPILING
    for network, twin in zip(trained(max_epochs=2), plain, strict=True):
        torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert tiers.found is None
    assert tiers.next_look == np.inf
