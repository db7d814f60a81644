"""The step written out: autograd's gradients, the plain loop's weights, members that do not mix."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

from toll_plugin.core import DenseAutoencoder, DivergenceError, TollLoss, fit, fit_ensemble
from toll_plugin.core.training.ensemble import DenseEnsemble

X = torch.randn(41, 6, generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.randn(11, 6, generator=torch.Generator().manual_seed(2))


def networks(n: int = 3, **arguments) -> list[DenseAutoencoder]:
    generator = torch.Generator().manual_seed(4)
    return [DenseAutoencoder(6, (8, 5), 2, generator=generator, **arguments) for _ in range(n)]


def backward(ensemble, value, outputs):
    """Autograd as far as the outputs, the ensemble from there."""
    ensemble.backward(*(gradient.transpose(0, 1).numpy() for gradient in torch.autograd.grad(value, outputs)))


def loss_of(network, x, loss):
    return loss(x, *network(x))


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize(("batch_norm", "n"), [(True, 2), (True, 17), (False, 1), (False, 17)])
def test_gradients_are_autograds(batch_norm, exponent, n):
    members = [network.double() for network in networks(batch_norm=batch_norm)]
    loss, x = TollLoss(0.7, exponent=exponent), X[:n].double()
    ensemble = DenseEnsemble(members)
    reconstruction, latent = (t.requires_grad_() for t in ensemble(x))
    for m, network in enumerate(members):
        expected = network(x)
        torch.testing.assert_close(reconstruction[m], expected[0])
        torch.testing.assert_close(latent[m], expected[1])
        loss_of(network, x, loss).backward()
    value = sum(loss(x, reconstruction[m], latent[m]) for m in range(3))
    backward(ensemble, value, (reconstruction, latent))
    # Hand the gradients back by way of the weights: w - (w - g) = g, parameter by parameter.
    with torch.no_grad():
        before = [[p.clone() for p in network.parameters()] for network in members]
        ensemble.flat -= ensemble.flat.grad
    ensemble.write_back()
    for network, start in zip(members, before, strict=True):
        for (name, parameter), old in zip(network.named_parameters(), start, strict=True):
            torch.testing.assert_close(old - parameter.detach(), parameter.grad, msg=name, atol=1e-12, rtol=1e-8)


def test_gradients_of_one_sample_use_the_running_statistics():
    (network,) = networks(1)
    network.double()
    fit(network, X.double(), TollLoss(), max_epochs=2)
    x, loss, twin = X[:1].double(), TollLoss(0.7), copy.deepcopy(network).eval()
    loss_of(twin, x, loss).backward()
    ensemble = DenseEnsemble([network])
    outputs = [t.requires_grad_() for t in ensemble(x)]
    backward(ensemble, loss(x, outputs[0][0], outputs[1][0]), outputs)
    gradient = twin.encoder[0].weight.grad
    torch.testing.assert_close(ensemble.flat.grad[: gradient.numel()].view_as(gradient), gradient)


def test_dropout_drops_and_keeps_the_mean():
    (network,) = networks(1, dropout=0.25, batch_norm=False)
    generator = torch.Generator().manual_seed(0)
    ensemble = DenseEnsemble([network], generator=generator)
    x = torch.randn(4000, 6, generator=generator)
    ensemble(x)
    trace = ensemble._traces[0]
    kept = trace.dropout.mask > 0
    assert kept.mean() == pytest.approx(0.75, abs=0.01)
    assert np.unique(trace.dropout.mask[kept]).tolist() == pytest.approx([1 / 0.75])
    ensemble.eval()
    network.eval()
    torch.testing.assert_close(ensemble(x)[0][0], network(x)[0])


def test_gradients_with_dropout_are_those_of_the_masked_network():
    (network,) = networks(1, dropout=0.5)
    network.double()
    ensemble = DenseEnsemble([network], generator=torch.Generator().manual_seed(0))
    x, loss = X.double(), TollLoss(0.3)
    outputs = [t.requires_grad_() for t in ensemble(x)]
    backward(ensemble, loss(x, outputs[0][0], outputs[1][0]), outputs)
    masks = iter([torch.from_numpy(t.dropout.mask) for t in ensemble._traces if t.dropout is not None])
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.forward = functools.partial(torch.mul, next(masks))
    loss_of(network, x, loss).backward()
    gradient = network.encoder[0].weight.grad
    torch.testing.assert_close(ensemble.flat.grad[: gradient.numel()].view_as(gradient), gradient)


@pytest.mark.parametrize("validation", [None, HELD_OUT])
def test_each_member_ends_where_it_would_alone(validation):
    # SGD, because Adam blows the rounding errors in the gradient of a bias without effect up to full steps.
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)

    held_out = None if validation is None else validation.double()
    arguments = {"validation": held_out, "optimizer": optimizer, "batch_size": 8, "max_epochs": 8, "noise": 0.1}
    # Double precision, because the small differences of single precision grow with each step.
    together, alone = ([network.double() for network in networks()] for _ in range(2))
    loss, x = TollLoss(0.5), X.double()
    histories = fit_ensemble(together, x, loss, generator=torch.Generator().manual_seed(7), **arguments)
    for network, twin, history in zip(together, alone, histories, strict=True):
        expected = fit(twin, x, loss, generator=torch.Generator().manual_seed(7), **arguments)
        assert history.best_epoch == expected.best_epoch
        for name in ("total", "reconstruction", "latent", "validation"):
            assert getattr(history, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
        torch.testing.assert_close(network.eval()(x)[0], twin.eval()(x)[0], rtol=1e-5, atol=1e-6)


def test_the_best_epoch_of_each_member_is_put_back():
    members, loss = networks(), TollLoss(0.1)
    histories = fit_ensemble(members, X, loss, validation=HELD_OUT, lr=0.3, max_epochs=30, patience=None)
    assert len({history.best_epoch for history in histories}) > 1
    for network, history in zip(members, histories, strict=True):
        assert history.validation[history.best_epoch] == min(history.validation)
        held_out = float(loss_of(network.eval(), HELD_OUT, loss).detach())
        assert held_out == pytest.approx(min(history.validation), rel=1e-5)


def test_divergence_puts_good_weights_into_the_networks():
    members = networks()
    with pytest.raises(DivergenceError, match="not finite at step"):
        fit_ensemble(members, X, TollLoss(), lr=1e30, max_epochs=50)
    assert all(value.isfinite().all() for network in members for value in network.state_dict().values())


def test_steps_end_the_fit_within_an_epoch():
    histories = fit_ensemble(networks(1), X, TollLoss(), batch_size=4, max_epochs=None, max_steps=13)
    assert len(histories[0].total) == 2
    with pytest.raises(ValueError, match="nothing would end the fit"):
        fit_ensemble(networks(1), X, TollLoss(), max_epochs=None)


def test_global_state_is_untouched_and_modes_do_not_matter():
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = networks(2, dropout=0.2), networks(2, dropout=0.2)
        fit_ensemble(first, X, TollLoss(), max_epochs=2)
    torch.set_default_dtype(torch.float64)
    try:
        second = networks(2, dropout=0.2)
        fit_ensemble(second, X, TollLoss(), max_epochs=2)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_networks_that_do_not_fit_together():
    with pytest.raises(ValueError, match="all of one shape"):
        DenseEnsemble([DenseAutoencoder(6, (8,), 2), DenseAutoencoder(6, (7,), 2)])
    with pytest.raises(ValueError, match="at least one"):
        DenseEnsemble([])
    with pytest.raises(ValueError, match=r"input must have shape \(N, 6\), got \(41, 5\)"):
        fit_ensemble(networks(1), X[:, :5], TollLoss())
