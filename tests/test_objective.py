"""The formula, against hand-worked values and an independent loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toll_plugin.core import (
    TollLoss,
    TollScore,
    TollTerms,
    in_units,
    relative_pressure,
    terms_of_residual,
    toll_score,
    toll_terms,
    typical_terms,
)
from toll_plugin.core.objective import check_score_weight

X = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
X_HAT = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
Z = torch.tensor([[0.6, 0.8], [0.0, 2.0]])


@pytest.mark.parametrize(
    ("exponent", "reconstruction", "latent", "score", "loss"),
    [(1, [5.0, 1.0], [1.0, 2.0], [15.0, 21.0], 18.0), (2, [25.0, 1.0], [1.0, 4.0], [35.0, 41.0], 38.0)],
)
def test_hand_worked_values(exponent, reconstruction, latent, score, loss):
    objective = TollLoss(beta=10.0, exponent=exponent)
    terms = objective.terms(X, X_HAT, Z)
    torch.testing.assert_close(terms.reconstruction, torch.tensor(reconstruction))
    torch.testing.assert_close(terms.latent, torch.tensor(latent))
    torch.testing.assert_close(objective.score(terms), torch.tensor(score))
    torch.testing.assert_close(objective.score(terms, "reconstruction"), torch.tensor(reconstruction))
    torch.testing.assert_close(objective.score(terms, "latent"), torch.tensor(latent))
    torch.testing.assert_close(objective(X, X_HAT, Z), torch.tensor(loss))


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(5,), (1, 4, 3), (3, 2, 2)]),
    beta=st.floats(0, 1e4),
    exponent=st.sampled_from([1, 2]),
)
def test_equals_an_independent_loop(seed, shape, beta, exponent):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    x_hat = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    z = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    expected = []
    for i in range(4):
        residual = sum((a - b) ** 2 for a, b in zip(x[i].flatten().tolist(), x_hat[i].flatten().tolist(), strict=True))
        norm = sum(a**2 for a in z[i].tolist())
        expected.append(math.sqrt(residual) ** exponent + beta * math.sqrt(norm) ** exponent)
    loss = TollLoss(beta, exponent=exponent)
    scores = loss.score(loss.terms(x, x_hat, z))
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(loss(x, x_hat, z), torch.tensor(sum(expected) / 4, dtype=torch.float64))


@given(scale=st.floats(1e-3, 1e3), beta=st.floats(0, 100))
def test_scaling_input_and_latent_scales_the_score(scale, beta):
    whole = toll_score(toll_terms(X.double(), X_HAT.double(), Z.double()), beta=beta)
    scaled = toll_score(toll_terms(scale * X.double(), scale * X_HAT.double(), scale * Z.double()), beta=beta)
    torch.testing.assert_close(scaled, scale * whole)


def test_a_score_does_not_depend_on_the_rest_of_the_batch():
    alone = toll_terms(X[:1], X_HAT[:1], Z[:1])
    together = toll_terms(X, X_HAT, Z)
    assert alone.reconstruction[0] == together.reconstruction[0]
    assert alone.latent[0] == together.latent[0]


@pytest.mark.parametrize("exponent", [1, 2])
def test_gradient_is_finite_at_a_perfect_reconstruction_and_a_zero_latent(exponent):
    x_hat, z = X.clone().requires_grad_(), torch.zeros(2, 3, requires_grad=True)
    TollLoss(1.0, exponent=exponent)(X, x_hat, z).backward()
    assert x_hat.grad.isfinite().all()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_do_not_overflow(dtype):
    x = torch.full((1, 3, 64, 64), 8.0, dtype=dtype)
    terms = toll_terms(x, torch.zeros_like(x), torch.ones(1, 2, dtype=dtype))
    torch.testing.assert_close(terms.reconstruction, torch.tensor([8.0 * math.sqrt(3 * 64 * 64)]))


@pytest.mark.parametrize(
    ("beta", "error"),
    [
        (-1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_bad_beta(beta, error):
    with pytest.raises(error, match=r"beta .*got"):
        TollLoss(beta)
    with pytest.raises(error, match=r"beta .*got"):
        toll_score(TollTerms(torch.ones(1), torch.ones(1)), beta=beta)


@given(scale=st.floats(1e-6, 1e6), strength=st.floats(0, 10))
def test_the_pressure_follows_the_scale_of_both_terms(scale, strength):
    loss = TollLoss("auto", strength=strength)
    plain, scaled = (loss.terms(X.double(), X_HAT.double(), factor * Z.double()) for factor in (1.0, scale))
    # Means 3 and 1.5: the latent term is kept at strength times 3.
    torch.testing.assert_close(loss.losses(plain).mean(), torch.tensor(3 + 3 * strength).double())
    torch.testing.assert_close(loss.losses(scaled), loss.losses(plain))
    assert relative_pressure(TollTerms(3.0, 1.5 * scale), strength) == pytest.approx(2 * strength / scale)


def test_the_pressure_has_no_gradient():
    z = Z.double().requires_grad_()
    loss = TollLoss("auto")
    loss(X.double(), X_HAT.double(), z).backward()
    # Means 3 and 1.5: b is 2, and each of two samples has the gradient of b / 2 times its norm.
    torch.testing.assert_close(z.grad, Z.double() / torch.tensor([[1.0], [2.0]]).double())


def test_no_strength_is_no_beta_to_the_last_bit():
    none, zero = TollLoss("auto", strength=0), TollLoss(0.0)
    terms = zero.terms(X, X_HAT, Z)
    assert torch.equal(none.losses(terms), zero.losses(terms))
    for one, other in zip(none.slopes(terms), zero.slopes(terms), strict=True):
        assert torch.equal(one, other.expand_as(one))


def test_the_loss_of_means_is_the_mean_of_losses():
    for loss in (TollLoss(0.3), TollLoss("auto", strength=0.5)):
        terms = loss.terms(X, X_HAT, Z)
        means = TollTerms(*(term.mean() for term in terms))
        torch.testing.assert_close(loss.of_means(means), loss.losses(terms).mean())
        assert loss.of_means(TollTerms(*map(float, means))) == pytest.approx(float(loss.losses(terms).mean()))


def test_units_by_hand():
    terms = TollTerms(np.array([1.0, 2.0, 90.0]), np.array([0.0, 0.0, 4.0]))
    units = typical_terms(terms)
    assert units == (2.0, 4.0)  # where more than half are zero, the median of the others
    score = toll_score(in_units(terms, units), beta=0.5)
    np.testing.assert_allclose(score, [0.5, 1.0, 45.5])


def test_strength_belongs_to_the_relative_pressure():
    with pytest.raises(ValueError, match=r"strength belongs to beta='auto', got 0\.5 with beta=1\.0"):
        TollLoss(1.0, strength=0.5)
    with pytest.raises(ValueError, match=r"strength must be finite and >= 0, got -1"):
        TollLoss("auto", strength=-1)
    with pytest.raises(TypeError, match="beta must be a number of at least 0 or 'auto', got 'none'"):
        TollLoss("none")
    assert repr(TollLoss("auto", strength=0.5)) == "TollLoss(beta='auto', strength=0.5, exponent=1)"


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="exponent must be one of 1, 2, got 3"):
        TollLoss(1.0, exponent=3)
    with pytest.raises(ValueError, match="reconstruction must have the shape of x"):
        toll_terms(X, X_HAT[:, :1], Z)
    with pytest.raises(ValueError, match="latent must have shape"):
        toll_terms(X, X_HAT, Z[:1])
    with pytest.raises(ValueError, match="latent must have shape"):
        toll_terms(X, X_HAT, Z[:, 0])
    with pytest.raises(ValueError, match=r"term must be one of .*got 'both'"):
        toll_score(toll_terms(X, X_HAT, Z), beta=1, term="both")


@given(
    seed=st.integers(0, 1000),
    beta=st.floats(0, 1e3) | st.just("auto"),
    strength=st.floats(0, 10),
    exponent=st.sampled_from([1, 2]),
    zero=st.sampled_from(["none", "residual", "latent", "every latent"]),
)
def test_slopes_are_autograds_gradients(seed, beta, strength, exponent, zero):
    generator = torch.Generator().manual_seed(seed)
    x, x_hat, z = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (4, 4, 2))
    if zero == "residual":
        x_hat[2] = x[2]
    if zero == "latent":
        z[2] = 0
    if zero == "every latent":
        z[:] = 0
    x_hat.requires_grad_()
    z.requires_grad_()
    loss = TollLoss(beta, strength=strength if beta == "auto" else 1.0, exponent=exponent)
    terms = loss.terms(x, x_hat, z)
    expected = torch.autograd.grad(loss.losses(terms).sum(), (x_hat, z))
    a, b = loss.slopes(TollTerms(*(term.detach() for term in terms)))
    torch.testing.assert_close((x_hat - x).detach() * a[:, None], expected[0])
    torch.testing.assert_close(z.detach() * b[:, None], expected[1])


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_give_what_tensors_give(exponent, dtype):
    loss = TollLoss(0.7, exponent=exponent)
    tensors = [values.to(dtype) for values in (X, X_HAT, Z)]
    terms, arrays = loss.terms(*tensors), loss.terms(*(values.numpy() for values in tensors))
    for term, array in zip(terms, arrays, strict=True):
        torch.testing.assert_close(torch.from_numpy(array), term)
    torch.testing.assert_close(torch.from_numpy(loss.score(arrays)), loss.score(terms))


@pytest.mark.parametrize("exponent", [1, 2])
def test_terms_of_a_residual_are_those_of_what_it_is_the_residual_of(exponent):
    x, x_hat, z = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.randn(5, 2)
    expected = toll_terms(x, x_hat, z, exponent=exponent)
    for kind in (lambda tensor: tensor, torch.Tensor.numpy):
        found = terms_of_residual(kind(x - x_hat), kind(z), exponent=exponent)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one), other.numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"latent must have shape \(5, ...\), one row per sample, got \(4, 2\)"):
        terms_of_residual(x, z[:4])
    with pytest.raises(ValueError, match="exponent must be one of 1, 2, got 3"):
        terms_of_residual(x, z, exponent=3)


def test_means_of_terms_are_numbers():
    assert toll_score(TollTerms(5.0, 2.0), beta=10.0) == 25.0


def test_the_plain_score_is_the_papers_to_the_last_bit_and_old_states_still_load():
    terms = TollTerms(torch.rand(100), torch.rand(100))
    score = TollScore(0.01)
    assert torch.equal(score(terms), toll_score(terms, beta=0.01))
    score.measure(TollTerms(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 5.0])))
    assert torch.equal(score(terms), terms.reconstruction / 2 + 0.01 * (terms.latent / 5))
    assert torch.equal(TollScore(0.01, "latent").to(torch.float32)(terms), terms.latent)
    other = TollScore(0.01)
    other.load_state_dict(score.state_dict())
    assert torch.equal(other(terms), score(terms))
    score.load_state_dict({})  # from before there were units
    assert torch.equal(score(terms), toll_score(terms, beta=0.01))


@pytest.mark.parametrize(
    ("weight", "beta", "scale", "expected"),
    [(None, 10, "none", 10.0), (None, 10, "median", 0.5), (None, "auto", "median", 0.5), (2, "auto", "none", 2.0)],
)
def test_the_weight_of_the_score(weight, beta, scale, expected):
    assert check_score_weight(weight, beta=beta, score_scale=scale) == expected


def test_a_weight_that_follows_the_loss_is_none_of_the_score():
    with pytest.raises(ValueError, match="score_scale='none' with beta='auto' needs a score_weight"):
        check_score_weight(None, beta="auto", score_scale="none")
