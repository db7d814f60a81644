"""The closed form is the minimum, training finds it, and the command measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from torch import nn

from benchmarks.studies.linear import Setup, balance, detection, gains, linear, sample, theory, train
from toll_plugin.core import Autoencoder, TollLoss

VARIANCES = np.geomspace(4, 0.01, 10)


@pytest.mark.parametrize(
    ("variance", "beta", "decay", "encoder_decay"),
    [(4, 0.3, 0.01, 0), (0.1, 0.3, 0.01, 0), (0.1, 0.3, 0.01, 0.01), (1, 3, 0.2, 0.1), (0.5, 0, 0.01, 0.01)],
)
def test_one_direction_against_a_numeric_minimum(variance, beta, decay, encoder_decay):
    def loss(w):
        e, d = w
        return variance * (1 - d * e) ** 2 + beta * variance * e**2 + encoder_decay * e**2 + decay * d**2

    found = minimize(loss, (0.7, 1.3), tol=1e-12)
    gain, passed = balance(variance, beta * variance + encoder_decay, decay)
    assert (gain, passed) == pytest.approx((abs(found.x[0]), found.x[0] * found.x[1]), abs=1e-4)
    assert loss((gain, passed / gain)) == pytest.approx(found.fun, abs=1e-9)


def test_one_direction_by_hand():
    # sqrt(beta g / l) = sqrt(0.25 * 0.04 / 1) = 0.1, and e^2 = 0.9 sqrt(0.04 / 0.25) = 0.36.
    assert balance(1.0, 0.25, 0.04) == pytest.approx((0.6, 0.9))


@pytest.mark.parametrize("variance", [0.003, 0.002])
def test_directions_of_variance_up_to_beta_times_decay_are_dropped(variance):
    beta, decay = 0.3, 0.01  # beta g = 0.003
    assert balance(variance, beta * variance, decay) == (0, 0)
    found = minimize(
        lambda w: variance * ((1 - w[0] * w[1]) ** 2 + beta * w[0] ** 2) + decay * w[1] ** 2, (0.5, 0.5), tol=1e-14
    )
    assert abs(found.x[0] * found.x[1]) < 0.03


@pytest.mark.parametrize("latent", [4, 2])
def test_whole_matrices_do_no_better(latent):
    variances, beta, decay = np.array([2.0, 0.7, 0.2, 0.02]), 0.3, 0.02
    draw = np.random.default_rng(0)

    def loss(w):
        e, d = w[: 4 * latent].reshape(latent, 4), w[4 * latent :].reshape(4, latent)
        missed = ((np.eye(4) - d @ e) ** 2 * variances).sum()
        return missed + (beta * e**2 * variances).sum() + decay * (w**2).sum()

    best = min((minimize(loss, draw.standard_normal(8 * latent), tol=1e-10) for _ in range(5)), key=lambda r: r.fun)
    expected = theory(None, variances, Setup("decayed", 2, latent, beta), decay)
    assert expected[3] == 0  # too small to pay for its decay, or for a place in the bottleneck
    np.testing.assert_allclose(gains(best.x[: 4 * latent].reshape(latent, 4), np.eye(4)), expected, atol=3e-3)


def test_gradient_flow_alone_tends_to_the_stated_power_of_variance():
    beta, time, variances = 0.3, 1000, np.array([4.0, 0.3, 0.02])
    for v in variances:

        def slope(_, w, v=v):
            e, d = w
            return [2 * v * (1 - e * d) * d - 2 * beta * v * e, 2 * v * (1 - e * d) * e]

        flow = solve_ivp(slope, (0, time), [1, 1], method="LSODA", rtol=1e-8, atol=1e-10)
        assert flow.y[0, -1] ** 2 == pytest.approx((8 * beta * v * time) ** -0.5, rel=0.02)


def test_rows_have_exactly_the_covariance():
    x = sample(VARIANCES, np.random.default_rng(0))
    np.testing.assert_allclose(x.T @ x / len(x), np.diag(VARIANCES), atol=1e-12)


@pytest.mark.parametrize(
    ("setup", "steps"),
    [
        (Setup("decayed", 2, 10, 0.3), 2500),
        (Setup("decayed", 2, 10, 0.0), 2500),
        (Setup("decayed", 1, 3, 0.3), 2500),
        (Setup("tied", 2, 10, 0.3), 1000),
        (Setup("tied", 1, 10, 0.3), 1000),
    ],
)
def test_training_finds_the_gains(setup, steps):
    x = sample(VARIANCES, np.random.default_rng(1))
    network = train(torch.tensor(x, dtype=torch.float32), setup, weight_decay=0.004, steps=steps, seed=0)
    found, expected = gains(network.encoder.weight.detach().numpy(), np.eye(10)), theory(x, VARIANCES, setup, 0.002)
    kept = expected > 0
    assert kept.sum() == setup.latent
    assert np.abs(found / np.where(kept, expected, 1) - 1)[kept].mean() < 0.03
    assert (found[~kept] < 0.05).all()


def test_plain_norms_are_stationary_where_the_theory_says():
    x, setup, decay = sample(VARIANCES, np.random.default_rng(0)), Setup("decayed", 1, 3, 0.3), 0.002
    # Signs in every combination leave the norms alone and make the directions uncorrelated under any weights.
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    x = np.concatenate([x[:50, :4] * [*s, 1] for s in signs])
    gain = theory(x, x.var(axis=0), setup, decay)
    # The gradient by d is zero where d^2 = e^2 toll / g.
    toll = 0.3 * (x**2 / np.linalg.norm(x * gain, axis=1)[:, None]).mean(axis=0) / 2 + decay
    rows, weights = torch.tensor(x), torch.tensor(np.stack([gain, gain * np.sqrt(toll / decay)]))
    weights.requires_grad_()
    loss = TollLoss(0.3)(rows, rows * weights[0] * weights[1], rows * weights[0]) + decay * weights.square().sum()
    loss.backward()
    assert weights.grad[:, :3].abs().max() < 1e-6


def test_without_decay_there_is_no_theory_and_a_large_beta_ties_to_zero():
    assert theory(None, VARIANCES, Setup("free", 2, 10, 0.3), 0.001) is None
    assert not theory(None, VARIANCES, Setup("tied", 2, 10, 3.0), 0.001).any()
    assert not theory(None, VARIANCES, Setup("tied", 1, 10, 3.0), 0.001).any()


def test_gains_by_hand():
    encoder = np.array([[3.0, 0.0], [4.0, 1.0]])
    assert gains(encoder, np.eye(2)).tolist() == [5, 1]
    assert gains(encoder, np.array([[0.6, 0.8], [0.8, -0.6]])) == pytest.approx(np.hypot([1.8, 2.4], [3.2, 2.6]))


def test_auroc_by_hand():
    # The encoder sees the first column only, and the decoder gives it back: z = x_1, residual = x_2.
    network = Autoencoder(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        network.encoder.weight.copy_(torch.tensor([[1.0, 0.0]]))
        network.decoder.weight.copy_(torch.tensor([[1.0], [0.0]]))
    normal = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    shifts = torch.tensor([[2.0, 0.0], [0.0, 9.0]])
    found = detection(network, TollLoss(1.0), normal, torch.tensor([[0.0, 1.0], [2.0, 1.0]]), shifts)
    # Latent norms 1 and 3: the first shift gives 2 and 4, three pairs of four in order; the second 0 and 2, one.
    assert found["latent"] == [0.75, 0.25]
    # Residuals 2 and 0: 1 and 1, two of four; then 10 and 10.
    assert found["reconstruction"] == [0.5, 1.0]
    # Totals 3 and 3: 3 and 5, two ties and two pairs in order; then 10 and 12.
    assert found["total"] == [0.75, 1.0]


def test_a_small_run_writes_record_and_figure(tmp_path, capsys):
    output, figure = tmp_path / "linear.json", tmp_path / "plots" / "linear.svg"
    linear(betas=(0.0, 0.3), dims=4, bottleneck=2, seeds=1, steps=30, output=output, figure=figure)
    record = json.loads(output.read_text())
    assert record["table"] in capsys.readouterr().out
    assert {"commit", "packages", "weight_decay", "steps", "variances"} <= set(record)
    assert len(record["runs"]) == 2 * 4 * 2  # betas 0 and 0.3
    assert sum(line.startswith("| ") for line in record["table"].splitlines()) == 1 + 2 * 4
    run = next(run for run in record["runs"] if run["decoder"] == "decayed" and run["beta"])
    assert len(run["gains"]) == len(run["theory"]) == len(run["auroc"]["latent"]) == 4
    assert "<!-- beta 0.3 -->" in figure.read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"betas": (0.1, -1.0)}, r"betas\[1\] must be finite and >= 0, got -1"),
        ({"betas": ()}, "betas must hold at least one weight above 0"),
        ({"betas": (0.0,)}, "betas must hold at least one weight above 0"),
        ({"weight_decay": 0.0}, "weight_decay must be finite and > 0"),
        ({"dims": 3}, "dims must be at least 4"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"figure": Path("linear.txt")}, "figure's ending must be one of"),
    ],
)
def test_bad_settings_are_refused_before_work(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        linear(**{"output": tmp_path / "linear.json", "figure": tmp_path / "linear.svg", **wrong})
    assert not list(tmp_path.iterdir())
