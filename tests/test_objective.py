"""The formula, against hand-worked values and an independent loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toll_plugin.core import TollLoss, TollTerms, terms_of_residual, toll_score, toll_terms

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
    beta=st.floats(0, 1e3),
    exponent=st.sampled_from([1, 2]),
    zero=st.sampled_from(["none", "residual", "latent"]),
)
def test_slopes_are_autograds_gradients(seed, beta, exponent, zero):
    generator = torch.Generator().manual_seed(seed)
    x, x_hat, z = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (4, 4, 2))
    if zero == "residual":
        x_hat[2] = x[2]
    if zero == "latent":
        z[2] = 0
    x_hat.requires_grad_()
    z.requires_grad_()
    loss = TollLoss(beta, exponent=exponent)
    terms = loss.terms(x, x_hat, z)
    expected = torch.autograd.grad(loss.score(terms).sum(), (x_hat, z))
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
