"""Peers of Toll: what each computes against hand values, and what all promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks.interfaces import Budget, Split
from benchmarks.methods.peer_networks import (
    Classifier,
    Contractive,
    Memory,
    PenaltyLoss,
    Sphere,
    Variational,
    hard_shrinkage,
    standard_normal_divergence,
    transformed,
)
from benchmarks.methods.peers import PEERS
from toll_plugin.core import ConvAutoencoder, DivergenceError, TollLoss, fit, terms_of

AUTOENCODERS = [name for name in PEERS if name not in {"DeepSVDD", "Rotations"}]


def _digits():
    digits = load_digits()
    return torch.from_numpy(digits.images).float()[:, None] / 16, digits.target


def _split(normal_class: int = 1, n_train: int = 60, n_test: int = 300) -> Split:
    images, labels = _digits()
    mine, others = images[labels == normal_class], images[labels != normal_class]
    normal = mine[n_train + 30 :]
    test = torch.cat([normal, others[:n_test]])
    return Split(mine[:n_train], mine[n_train : n_train + 30], test, np.arange(len(test)) >= len(normal))


def _fitted(name: str, split: Split, seed: int = 0, epochs: int = 3, **arguments):
    detector = PEERS[name](Budget(max_epochs=epochs), seed, **arguments)
    detector.fit(split)
    return detector


def _conv(seed: int = 0) -> ConvAutoencoder:
    torch.manual_seed(seed)
    return ConvAutoencoder(8)


@pytest.mark.parametrize("name", PEERS)
def test_contract(name):
    split = _split()
    before, train = torch.get_rng_state(), split.train.clone()
    detector = _fitted(name, split)
    found = detector.score(split.test)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(split.train, train)

    assert found.scores.dtype == np.float64
    assert found.scores.shape == (len(split.test),)
    assert np.isfinite(found.scores).all()
    assert len(np.unique(found.scores)) > len(split.test) // 2
    assert set(found.terms) == ({"reconstruction", "latent"} if name in AUTOENCODERS else {"latent"})
    assert all(term.shape == found.scores.shape and np.isfinite(term).all() for term in found.terms.values())

    order = np.random.default_rng(0).permutation(len(split.test))
    np.testing.assert_allclose(detector.score(split.test[order]).scores, found.scores[order], rtol=1e-4, atol=1e-6)
    assert np.array_equal(_fitted(name, split).score(split.test).scores, found.scores)
    assert not np.allclose(_fitted(name, split, seed=1).score(split.test).scores, found.scores)

    facts = detector.facts()
    assert 1 <= facts["best_epoch"] <= facts["epochs"] <= 3
    assert facts["parameters"] > 1000
    assert detector.size() > 4 * facts["parameters"]  # and the statistics of BatchNorm


@pytest.mark.parametrize("name", PEERS)
def test_learns_what_is_normal(name):
    split = _split(n_train=100, n_test=400)
    scores = _fitted(name, split, epochs=30).score(split.test).scores
    # Many digits look alike when they are turned, and 30 epochs are few to learn the turns.
    assert roc_auc_score(split.anomalous, scores) > (0.6 if name == "Rotations" else 0.9)


@pytest.mark.parametrize("name", ["MemAE", "DeepSVDD"])
def test_bytes_are_what_floats_are(name):
    split = _split()
    as_bytes = [(part * 255).round().byte() for part in split[:3]]
    as_floats = [part / 255 for part in as_bytes]
    scores = [_fitted(name, Split(*parts, split.anomalous)).score(parts[2]).scores for parts in (as_bytes, as_floats)]
    assert np.array_equal(*scores)


def test_colour_oblong_and_no_validation():
    images = torch.rand(20, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    split = Split(images, images[:0], images, np.zeros(20, dtype=bool))
    for name in PEERS:
        if name != "Rotations":
            detector = _fitted(name, split, epochs=2)
            assert detector.history.best_epoch == len(detector.history.total) - 1
            assert np.isfinite(detector.score(images).scores).all()
    with pytest.raises(ValueError, match="square"):
        _fitted("Rotations", split)


def test_toll_is_the_plugins_loop():
    split = _split()
    network, loss = _conv(seed=3), TollLoss(0.01)
    fit(network, split.train, loss, validation=split.validation, max_epochs=3, generator=_generator(3))
    terms = terms_of(network, split.test, loss, batch_size=256)
    found = _fitted("TollAE", split, seed=3).score(split.test)
    assert np.array_equal(found.scores, loss.score(terms).double().numpy())
    assert np.array_equal(found.terms["latent"], terms.latent.double().numpy())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_plain_autoencoder_is_toll_without_the_latent():
    split = _split()
    plain, toll = (_fitted(*case, split).score(split.test) for case in (("AE",), ("TollAE",)))
    zero = _fitted("TollAE", split, beta=0).score(split.test)
    assert np.array_equal(plain.scores, zero.scores)
    assert np.array_equal(plain.scores, plain.terms["reconstruction"])
    assert not np.allclose(plain.scores, toll.scores)
    assert np.allclose(toll.scores, toll.terms["reconstruction"] + 0.01 * toll.terms["latent"])


def test_all_start_alike(monkeypatch):
    started = {}

    def start(network, *_args, **_kwargs):
        started.setdefault(len(started), {k: v.clone() for k, v in network.state_dict().items()})
        raise DivergenceError(0, None)

    monkeypatch.setattr("benchmarks.methods.peers.fit", start)
    for name in PEERS:
        with pytest.raises(DivergenceError):
            _fitted(name, _split(), seed=5)
    body = _conv(seed=5).state_dict()
    assert len(started) == len(PEERS)
    for name, state in zip(PEERS, started.values(), strict=True):
        common = [key for key in body if key in state]
        assert len(common) == len(body) or name not in AUTOENCODERS
        assert "encoder.0.weight" in common
        assert "encoder.7.weight" in common
        assert all(torch.equal(state[key], body[key]) for key in common), name


def test_penalty_takes_the_place_of_the_norm():
    loss = PenaltyLoss(0.5)
    x, x_hat, z = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([[100.0]])
    terms = loss.terms(x, x_hat, z, torch.tensor([6.0]))
    assert [term.tolist() for term in terms] == [[5.0], [6.0]]
    assert loss.score(terms).tolist() == [8.0]


def test_l1_penalty():
    network = PEERS["SparseAE"](Budget(), 0).build(_conv()).eval()
    x = torch.rand(5, 1, 8, 8)
    _, latent, penalty = network(x)
    assert penalty.tolist() == pytest.approx([sum(abs(v) for v in row) for row in latent.tolist()], rel=1e-5)


def test_divergence():
    mean, log_variance = torch.tensor([[1.0, 0.0], [0.0, -2.0]]), torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])
    # By hand: 1/2 for the shifted mean; (4 + 4 - 1 - log 4) / 2 for the other.
    assert standard_normal_divergence(mean, log_variance).tolist() == pytest.approx([0.5, (7 - math.log(4)) / 2])
    mean, log_variance = torch.randn(4, 3), torch.randn(4, 3)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(1)
    torch.testing.assert_close(standard_normal_divergence(mean, log_variance), expected)


def test_variational_draws_in_training_only():
    network, x = Variational(_conv()), torch.rand(6, 1, 8, 8)
    network.train()
    assert not torch.equal(network(x)[0], network(x)[0])
    network.eval()
    reconstruction, latent, _ = network(x)
    assert torch.equal(reconstruction, network(x)[0])
    torch.testing.assert_close(reconstruction, network.decoder(network.encoder(x)))
    torch.testing.assert_close(latent, network.encoder(x))


def test_variational_spread():
    network, x = Variational(_conv()).train(), torch.rand(1, 1, 8, 8).expand(4000, -1, -1, -1)
    latents = []
    network.decoder.register_forward_pre_hook(lambda _module, inputs: latents.append(inputs[0]))
    _, mean, _ = network(x)
    deviation = (network.log_variance(network.encoder[:-1](x))[0] / 2).exp()
    torch.testing.assert_close((latents[0] - mean).std(dim=0), deviation, rtol=0.06, atol=0)


def test_hard_shrinkage_by_hand():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]], requires_grad=True)
    shrunk = hard_shrinkage(weights, 0.25)
    torch.testing.assert_close(shrunk, torch.tensor([[0.625, 0.375, 0.0], [0.25, 0.25, 0.5]]))
    assert hard_shrinkage(torch.tensor([[0.5, 0.5]]), 0.6).tolist() == [[0.0, 0.0]]


def test_memory_by_loops():
    network, x = Memory(_conv(), n_slots=5, threshold=0.2).eval(), torch.rand(4, 1, 8, 8)
    reads = []
    network.decoder.register_forward_pre_hook(lambda _module, inputs: reads.append(inputs[0]))
    _, latent, entropy = network(x)
    slots = network.slots.detach().double().numpy()
    for i, z in enumerate(latent.detach().double().numpy()):
        cosine = np.array([z @ m / np.linalg.norm(z) / np.linalg.norm(m) for m in slots])
        weights = np.exp(cosine) / np.exp(cosine).sum()
        weights = np.array([w if w >= 0.2 else 0.0 for w in weights])
        weights /= weights.sum()
        assert 0 < np.count_nonzero(weights) < 5
        np.testing.assert_allclose(reads[0][i].detach(), weights @ slots, rtol=1e-4, atol=1e-6)
        assert entropy[i].item() == pytest.approx(-sum(w * math.log(w) for w in weights if w > 0), rel=1e-4)


def test_entropy_has_a_finite_gradient_and_the_memory_learns():
    network = Memory(_conv(), n_slots=5, threshold=0.2).train()
    reconstruction, _, entropy = network(torch.rand(4, 1, 8, 8))
    (reconstruction.square().sum() + entropy.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert network.slots.grad.abs().sum() > 0


def test_jacobian_in_expectation():
    body = _conv()
    body.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 4))
    body.decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)))
    network, x = Contractive(body).train(), torch.rand(2, 1, 8, 8)
    expected = [torch.func.jacrev(body.encoder)(image[None]).square().sum().item() for image in x]
    drawn = torch.stack([network(x)[2].detach() for _ in range(3000)])
    assert drawn.std(dim=0).min() > 0
    assert drawn.mean(dim=0).tolist() == pytest.approx(expected, rel=0.05)

    network(x)[2].sum().backward()
    assert body.encoder[1].weight.grad.abs().sum() > 0

    network.eval()
    with torch.no_grad():  # as the held-out loss is taken
        first, second = network(x), network(x)
    assert torch.equal(first[2], second[2])
    assert not first[2].requires_grad
    assert first[2].tolist() == pytest.approx(expected, rel=1)


def test_contraction_contracts():
    split, sizes = _split(), []
    for weight in (0.0, 1.0):
        network = _fitted("ContractiveAE", split, epochs=10, weight=weight).network.eval()
        jacobian = torch.func.jacrev(network.encoder)(split.test[:1])
        sizes.append(jacobian.square().sum().item())
    assert sizes[1] < sizes[0] / 2


def test_noise_reaches_training(monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.methods.peers.fit", lambda *_args, noise, **_kwargs: seen.append(noise))
    _fitted("DenoisingAE", _split())
    _fitted("DenoisingAE", _split(), noise=0.3)
    _fitted("AE", _split())
    assert seen == [0.1, 0.3, 0.0]


def test_sphere_has_no_offsets_and_does_not_collapse():
    split = _split()
    detector = _fitted("DeepSVDD", split, epochs=20)
    names = [name for name, _ in detector.network.named_parameters()]
    assert names == ["encoder.0.weight", "encoder.3.weight", "encoder.7.weight"]  # two convolutions and a linear layer
    assert detector.network.centre.abs().min() >= 0.1 - 1e-6
    assert detector.facts()["pretrain_epochs"] == 4
    assert detector.facts()["epochs"] <= 16
    scores = detector.score(split.test).scores
    normal, bad = scores[~split.anomalous], scores[split.anomalous]
    assert scores.std() > 0.1 * scores.mean()
    assert np.median(bad) > np.median(normal)


def test_centre_by_hand():
    network = Sphere(_conv())
    outputs = torch.tensor([[0.3, -0.3, 0.05, -0.05, 0.0], [0.5, -0.1, 0.05, -0.05, 0.0]])
    network.encoder, network.centre = nn.Identity(), torch.zeros(5)
    network.place(outputs)
    torch.testing.assert_close(network.centre, torch.tensor([0.4, -0.2, 0.1, -0.1, 0.1]))
    distance, latent = network(outputs)
    assert distance[0].item() == pytest.approx(0.01 + 0.01 + 0.0025 + 0.0025 + 0.01, rel=1e-5)
    assert latent is outputs


def test_pretraining_can_be_left_out():
    detector = _fitted("DeepSVDD", _split(), pretrain_epochs=0)
    assert detector.facts()["epochs"] == 3
    assert PEERS["DeepSVDD"](Budget(max_epochs=1), 0).pretrain_epochs == 0


def test_eight_different_transformations():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    corners = {tuple(transformed(image, kind).flatten().tolist()) for kind in range(8)}
    assert len(corners) == 8
    assert torch.equal(transformed(image, 0), image)
    assert transformed(image, 4)[0, 0, 0].tolist() == [2.0, 1.0, 0.0]
    assert transformed(image, 2)[0, 0, 0].tolist() == [8.0, 7.0, 6.0]


def test_surprise_by_loops():
    network, x = Classifier(_conv()).eval(), torch.rand(3, 1, 8, 8)
    surprise, latent = network(x)
    for i, image in enumerate(x):
        logs = [network.head(network.encoder(transformed(image, k)[None]))[0].log_softmax(0)[k] for k in range(8)]
        assert surprise[i].item() == pytest.approx(-sum(logs).item() / 8, rel=1e-4)
    torch.testing.assert_close(latent, network.encoder(x))
    assert not torch.equal(network.train()(x)[0], network(x)[0])


def test_turns_of_an_unsymmetric_image_are_learnt():
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(80, 1, 8, 8, generator=rng) * 0.2
    images[:, :, :3, 0] += 0.8
    images[:, :, 0, :6] += 0.4
    split = Split(images[:60], images[60:], images, np.zeros(80, dtype=bool))
    scores = _fitted("Rotations", split, epochs=40).score(images).scores
    assert scores.mean() < 0.3 < math.log(8)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("TollAE", {"beta": -1.0}, "beta must be finite and >= 0, got -1.0"),
        ("SparseAE", {"weight": float("nan")}, "weight must be finite"),
        ("ContractiveAE", {"weight": -0.1}, "weight must be finite and >= 0, got -0.1"),
        ("VAE", {"weight": -0.1}, "weight must be"),
        ("DenoisingAE", {"noise": -0.1}, "noise must be finite and >= 0, got -0.1"),
        ("MemAE", {"n_slots": 1}, "n_slots must be at least 2, got 1"),
        ("MemAE", {"threshold": 0.5}, "threshold must be from 1 to 3 times 1/n_slots, 0.01 to 0.03, got 0.5"),
        ("DeepSVDD", {"pretrain_epochs": 3}, "pretrain_epochs must be below the budget's max_epochs 3, got 3"),
        ("DeepSVDD", {"pretrain_epochs": -1}, "pretrain_epochs must be at least 0, got -1"),
    ],
)
def test_arguments_are_checked(name, arguments, match):
    with pytest.raises(ValueError, match=match):
        PEERS[name](Budget(max_epochs=3), 0, **arguments)


def test_budget_seed_and_samples_are_checked():
    with pytest.raises(ValueError, match="max_epochs must be at least 1, got 0"):
        PEERS["AE"](Budget(max_epochs=0), 0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        PEERS["AE"](Budget(), -1)
    assert PEERS["AE"](Budget(), 0).max_epochs == 200
    rows = torch.rand(10, 4)
    with pytest.raises(ValueError, match=r"train must be images \(N, C, H, W\).* got torch.float32 of shape \(10, 4\)"):
        _fitted("AE", Split(rows, rows, rows, np.zeros(10, dtype=bool)))
