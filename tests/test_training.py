"""The plain loop: equality with a hand-written one, selection, divergence, isolation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from toll_plugin.core import (
    Autoencoder,
    ConvAutoencoder,
    DenseAutoencoder,
    DivergenceError,
    TollLoss,
    TrainingOptions,
    fit,
    terms_of,
)
from toll_plugin.core.training.divergence import DivergenceGuard


def _network(seed: int = 0) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder(6, (8,), 2)


X = torch.randn(37, 6, generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.randn(11, 6, generator=torch.Generator().manual_seed(2))


def test_equals_a_loop_written_out():
    # Without BatchNorm, behind which a bias has no effect and follows the sign of rounding errors.
    network = Autoencoder(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), nn.Linear(2, 6))
    twin = copy.deepcopy(network)
    history = fit(
        network, X, TollLoss(0.5), lr=0.01, batch_size=10, max_epochs=3, generator=torch.Generator().manual_seed(7)
    )

    optimizer, generator, totals = torch.optim.Adam(twin.parameters(), lr=0.01), torch.Generator().manual_seed(7), []
    for _ in range(3):
        order, total = torch.randperm(37, generator=generator), 0.0
        for start in range(0, 37, 10):
            batch = X[order[start : start + 10]]
            x_hat, z = twin(batch)
            per_sample = (batch - x_hat).pow(2).sum(1).sqrt() + 0.5 * z.pow(2).sum(1).sqrt()
            optimizer.zero_grad()
            per_sample.mean().backward()
            optimizer.step()
            total += float(per_sample.detach().sum())
        totals.append(total / 37)
    torch.testing.assert_close(torch.tensor(history.total), torch.tensor(totals))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)


def test_history_adds_up():
    history = fit(_network(), X, TollLoss(0.5), max_epochs=4)
    sums = [r + 0.5 * z for r, z in zip(history.reconstruction, history.latent, strict=True)]
    assert history.total == pytest.approx(sums)
    assert history.total[-1] < history.total[0]
    assert history.best_epoch == 3
    assert history.validation == []


def test_the_best_epoch_is_put_back():
    network, loss = _network(), TollLoss(0.1)
    # A learning rate this high does not settle, so the last epoch is unlikely to be the best.
    history = fit(network, X, loss, validation=HELD_OUT, lr=0.3, max_epochs=30, patience=None)
    assert history.validation[history.best_epoch] == min(history.validation)
    assert history.best_epoch < 29
    held_out = float(loss.score(terms_of(network, HELD_OUT, loss)).double().mean())
    assert held_out == pytest.approx(min(history.validation))


def test_patience_ends_the_fit():
    history = fit(_network(), X, TollLoss(0.1), validation=HELD_OUT, lr=0.3, max_epochs=500, patience=5)
    assert len(history.total) == history.best_epoch + 6


def test_no_global_state_is_touched():
    torch.manual_seed(3)
    network = _network()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    fit(network, X, TollLoss(), validation=HELD_OUT, max_epochs=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_put_back_also_after_an_error():
    network = _network().eval()
    fit(network, X, TollLoss(), max_epochs=1)
    assert not network.training
    with pytest.raises(DivergenceError):
        fit(network, X, TollLoss(), lr=1e30, max_epochs=50)
    assert not network.training


def test_divergence_keeps_the_last_good_weights():
    network = _network()
    with pytest.raises(DivergenceError, match=r"not finite at step .* last finite values were total") as caught:
        fit(network, X, TollLoss(), lr=1e30, max_epochs=50)
    error = caught.value
    assert error.step >= 1
    assert set(error.last_finite) == {"total", "reconstruction", "latent"}
    assert all(value.isfinite().all() for value in network.state_dict().values())
    again = pickle.loads(pickle.dumps(error))
    assert (again.step, again.last_finite, str(again)) == (error.step, error.last_finite, str(error))


def test_divergence_keeps_the_epoch_before():
    network, loss = _network(), TollLoss()

    class Blows(torch.optim.SGD):
        """Sane for 20 steps, then not."""

        steps = 0

        def step(self, closure=None):
            self.steps += 1
            self.param_groups[0]["lr"] = 1e-3 if self.steps <= 20 else 1e38
            return super().step(closure)

    with pytest.raises(DivergenceError):
        fit(network, X, loss, validation=HELD_OUT, optimizer=lambda p: Blows(p, lr=1e-3), max_epochs=50)
    reference = _network()
    fit(reference, X, loss, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), max_epochs=10)
    for name, value in network.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_divergence_at_the_very_last_step_is_no_success():
    class Breaks(torch.optim.SGD):
        def step(self):
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(torch.inf)

    network = _network()
    with pytest.raises(DivergenceError, match="at step 0"):
        fit(network, X, TollLoss(), optimizer=lambda p: Breaks(p, lr=1.0), batch_size=64, max_epochs=1)
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_divergence_that_validation_sees_first():
    network = Autoencoder(nn.Linear(6, 2), nn.Linear(2, 6))
    with pytest.raises(DivergenceError, match=r"total .* latent") as caught:
        fit(network, X, TollLoss(), validation=HELD_OUT, lr=1e20, batch_size=64, max_epochs=50)
    # Weights of 1e20 are finite; good ones they are not.
    assert all(value.abs().max() < 1e3 for value in network.parameters())
    assert {"total", "reconstruction", "latent"} <= set(caught.value.last_finite)


def test_guard_refuses_to_keep_broken_weights():
    network = nn.Linear(2, 2)
    good = network.weight.detach().clone()
    guard = DivergenceGuard(network)
    with torch.no_grad():
        network.weight.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="no step before it was finite"):
        guard.keep(3)
    assert torch.equal(network.weight, good)
    with pytest.raises(DivergenceError):
        guard.check(0, total=float("inf"))


def test_terms_do_not_depend_on_the_batch_size():
    network, loss = _network(), TollLoss()
    fit(network, X, loss, max_epochs=1)
    whole, parts = terms_of(network, X, loss), terms_of(network, X, loss, batch_size=5)
    torch.testing.assert_close(whole.reconstruction, parts.reconstruction)
    torch.testing.assert_close(whole.latent, parts.latent)
    assert network.training


@pytest.mark.parametrize("n", [1, 2, 33])
def test_any_number_of_samples_trains(n):
    fit(_network(), X[:n], TollLoss(), batch_size=32, max_epochs=2)


def test_progress_is_silent_unless_asked(capsys):
    fit(_network(), X, TollLoss(), max_epochs=1)
    assert capsys.readouterr() == ("", "")
    fit(_network(), X, TollLoss(), max_epochs=1, progress=True)
    assert "step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[:, :5]}, ValueError, r"input must have shape \(N, 6\), got \(37, 5\)"),
        ({"x": X[:0]}, ValueError, "x must hold at least one sample"),
        ({"x": X.clone().fill_(float("nan"))}, ValueError, "x must hold .* only finite"),
        ({"validation": HELD_OUT * float("inf")}, ValueError, "validation must hold .* only finite"),
        ({"lr": 0}, ValueError, "lr must be finite and > 0, got 0"),
        ({"lr": "fast"}, TypeError, "lr must be a real number"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"max_epochs": 0}, ValueError, "max_epochs must be at least 1, got 0"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fit(_network(), **{"x": X, "loss": TollLoss(), "max_epochs": 1} | arguments)


def test_terms_of_refuses_nothing_and_the_wrong_size():
    with pytest.raises(ValueError, match="at least one sample"):
        terms_of(_network(), X[:0], TollLoss())
    with pytest.raises(ValueError, match=r"input must have shape \(N, 1, 16, 16\)"):
        terms_of(ConvAutoencoder(16), torch.zeros(2, 1, 8, 16), TollLoss())


# -- options, and what the loop looks at -----------------------------------------------------------


def test_patience_needs_samples_to_see_improvement_on():
    with pytest.raises(ValueError, match=r"patience needs held-out samples: pass validation, .* got 5"):
        fit(_network(), X, TollLoss(), patience=5, max_epochs=1)
    assert len(fit(_network(), X, TollLoss(), patience=None, max_epochs=30).total) == 30
    history = fit(_network(), X, TollLoss(), validation=HELD_OUT, lr=0.3, max_epochs=500)
    assert len(history.total) == history.best_epoch + 21  # "auto" is 20


@pytest.mark.parametrize(
    ("options", "n", "steps"),
    [
        ({"max_epochs": 3, "batch_size": 10}, 37, 12),
        ({"max_epochs": 3, "batch_size": 10}, 31, 9),  # the last sample joins the batch before it
        ({"max_epochs": 3, "batch_size": 1}, 5, 15),
        ({"max_epochs": 3, "batch_size": 10, "max_steps": 7}, 37, 7),
        ({"max_epochs": None, "max_steps": 7}, 37, 7),
    ],
)
def test_steps_of_a_fit(options, n, steps):
    taken = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            taken.append(1)
            return super().step(closure)

    assert TrainingOptions(**options).steps(n) == steps
    fit(_network(), torch.randn(n, 6), TollLoss(), optimizer=lambda p: Counting(p, lr=0.01), **options)
    assert len(taken) == steps


def test_nothing_would_end_the_fit():
    with pytest.raises(ValueError, match="max_epochs and max_steps must not both be None"):
        TrainingOptions(max_epochs=None)


def test_the_first_step_that_is_not_finite_is_named_though_it_is_seen_later():
    taken = []

    class Breaks(torch.optim.SGD):
        """Ruins the weights at the hundredth step, which the step after it shows."""

        def step(self):
            taken.append(1)
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.mul_(float("nan") if len(taken) == 100 else 1.0)

    x = torch.randn(1000, 6)
    with pytest.raises(DivergenceError) as caught:
        fit(_network(), x, TollLoss(), optimizer=lambda p: Breaks(p, lr=1.0), batch_size=2, max_epochs=1)
    assert caught.value.step == 100
    assert caught.value.last_finite["total"] > 0
    assert 100 < len(taken) <= 164
