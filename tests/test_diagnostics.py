"""Each failure signature is met when it should be, and only then."""

from __future__ import annotations

import pytest
import torch

from toll_plugin.core import (
    CollapseMonitor,
    DenseAutoencoder,
    TollLoss,
    TollTerms,
    TollWarning,
    fit,
    terms_of,
    toll_terms,
)
from toll_plugin.core.diagnostics import _auroc, warn

GENERATOR = torch.Generator().manual_seed(0)
X = 5 + torch.randn(200, 4, generator=GENERATOR)
Z = torch.randn(200, 2, generator=GENERATOR)


def _signatures(x, x_hat, z, anomalous=None, batches=1, exponent=1):
    monitor = CollapseMonitor()
    for part in torch.arange(len(x)).chunk(batches):
        terms = toll_terms(x[part], x_hat[part], z[part], exponent=exponent)
        monitor.update(x[part], terms, None if anomalous is None else anomalous[part], exponent=exponent)
    return {finding.signature: finding for finding in monitor.findings()}


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize("batches", [1, 7])
def test_predicting_the_mean(batches, exponent):
    found = _signatures(X, X.mean(0).expand_as(X), Z, batches=batches, exponent=exponent)
    assert set(found) == {"predicts_mean"}
    # The mean of the very samples leaves (n - 1) / n of what a mean from elsewhere leaves.
    assert found["predicts_mean"].value == pytest.approx(199 / 200, rel=1e-5)
    assert "lower beta" in found["predicts_mean"].message


def test_a_good_fit_has_no_finding():
    assert _signatures(X, X + 0.1 * torch.randn_like(X), Z) == {}
    assert _signatures(X, X + 0.1, Z, torch.arange(200) >= 200) == {}


@pytest.mark.parametrize("z", [torch.zeros(200, 2), torch.full((200, 2), 3.0)])
def test_constant_latent(z):
    found = _signatures(X, X, z)
    assert set(found) == {"constant_latent"}


def test_a_small_latent_that_still_varies_is_fine():
    assert _signatures(X, X, 1e-12 * Z) == {}


def test_latent_that_does_not_separate():
    anomalous = torch.arange(200) >= 100
    found = _signatures(X, X, Z, anomalous)
    assert set(found) == {"latent_does_not_separate"}
    assert _signatures(X, X, Z * (1 + 10 * anomalous[:, None]), anomalous) == {}


def test_only_normal_samples_count_for_the_reconstruction():
    anomalous = torch.arange(200) >= 100
    x_hat = torch.where(anomalous[:, None], torch.zeros(1), X)
    assert _signatures(X, x_hat, Z * (1 + 10 * anomalous[:, None]), anomalous) == {}


def test_auroc_equals_counting_pairs():
    normal, anomalous = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([2.0, 3.0, 5.0])
    pairs = [(a > n) + 0.5 * (a == n) for a in anomalous.tolist() for n in normal.tolist()]
    assert _auroc(normal, anomalous) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("n", [0, 1])
def test_too_little_data_finds_nothing(n):
    assert _signatures(X[:n], X[:n], Z[:n]) == {}


def test_bright_images_do_not_cancel():
    x = 1e6 + torch.randn(100, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = _signatures(x, x.mean(0).expand_as(x), Z[:100].double(), batches=10)
    assert found["predicts_mean"].value == pytest.approx(0.99, rel=1e-4)


def test_a_real_total_collapse_is_named():
    # Without normalisation behind the latent a large beta drives all weights to zero.
    torch.manual_seed(0)
    network = DenseAutoencoder(4, (), 2)
    x = torch.randn(256, 4)
    loss = TollLoss(beta=100.0)
    fit(network, x, loss, lr=0.01, max_epochs=60)
    monitor = CollapseMonitor()
    monitor.update(x, terms_of(network, x, loss))
    assert "predicts_mean" in {finding.signature for finding in monitor.findings()}


def test_warnings_are_issued_once_each():
    monitor = CollapseMonitor()
    monitor.update(X, TollTerms((X - X.mean(0)).norm(dim=1), torch.ones(200)))
    with pytest.warns(TollWarning) as caught:
        warn(monitor.findings())
    assert [str(w.message).split(":")[0] for w in caught] == ["predicts_mean", "constant_latent"]
    assert caught[0].filename == __file__
