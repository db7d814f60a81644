"""Positions of feature maps: score, enlarging, images, how rows are drawn, and the fit."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.stats import chi2
from torch import nn
from torch.nn.functional import interpolate

from toll_plugin.core import Autoencoder, DenseAutoencoder, DivergenceError, PatchAutoencoder, TollLoss, fit_patches
from toll_plugin.core.patches import fit as module
from toll_plugin.core.patches.fit import examine
from toll_plugin.core.patches.images import ImageFeatures
from toll_plugin.core.patches.model import enlarge
from toll_plugin.core.rows import RowCache
from toll_plugin.core.training.optimizers import cosine_adam


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _patches(channels: int = 4, exponent: int = 2, beta: float = 0.1, seed: int = 0, term: str = "total"):
    network = DenseAutoencoder(channels, (8,), 2, generator=_generator(seed))
    return PatchAutoencoder(network, TollLoss(beta, exponent=exponent), term)


ROWS = torch.randn(300, 4, generator=_generator(1)) * torch.tensor([1.0, 2.0, 0.5, 1.0]) + 3
HELD_OUT = torch.randn(70, 4, generator=_generator(2)) * torch.tensor([1.0, 2.0, 0.5, 1.0]) + 3


# --- score of a position


class _Halves(nn.Module):
    """Reconstructs half of each value; the latent is the sum and the difference of the first two."""

    input_shape = (3,)

    def forward(self, x):
        return x / 2, torch.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], dim=1)


def test_score_by_hand():
    model = PatchAutoencoder(_Halves(), TollLoss(10.0))
    model.standardise_by(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 1.0, 1.0]))
    features = torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1)
    # x = ((3 - 1) / 0.5, 0, 0) = (4, 0, 0): the residual is (2, 0, 0), the latent (4, 4).
    assert model(features).item() == pytest.approx(2 + 10 * math.sqrt(32))


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize("term", ["total", "reconstruction", "latent"])
def test_terms_and_score_equal_a_loop_over_positions(exponent, term):
    model = _patches(exponent=exponent, beta=0.7, term=term)
    for layer in model.modules():  # statistics that are not those of an untrained network
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 2.0)
    mean, deviation = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 3.0]
    model.standardise_by(torch.tensor(mean), torch.tensor(deviation))
    features = torch.randn(2, 4, 3, 5, generator=_generator(3))
    model.eval()
    with torch.no_grad():
        terms, scores = model.terms(features), model(features)
    assert scores.shape == (2, 1, 3, 5)
    for n in range(2):
        for i in range(3):
            for j in range(5):
                x = [(float(features[n, c, i, j]) - mean[c]) / deviation[c] for c in range(4)]
                with torch.no_grad():
                    x_hat, z = (row[0].tolist() for row in model.network(torch.tensor([x])))
                residual = sum((a - b) ** 2 for a, b in zip(x, x_hat, strict=True)) ** (exponent / 2)
                latent = sum(a**2 for a in z) ** (exponent / 2)
                expected = {"total": residual + 0.7 * latent, "reconstruction": residual, "latent": latent}[term]
                assert float(terms.reconstruction[n, i, j]) == pytest.approx(residual, rel=1e-4)
                assert float(terms.latent[n, i, j]) == pytest.approx(latent, rel=1e-4)
                assert float(scores[n, 0, i, j]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("exponent", [1, 2])
def test_units_are_medians_over_held_out_positions(exponent, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 32)  # several pieces, the last of them short
    model, plain = _patches(exponent=exponent, beta="auto"), _patches(exponent=exponent, beta="auto")
    fit_patches(model, ROWS, HELD_OUT, max_steps=20, score_scale="median", generator=_generator())
    fit_patches(plain, ROWS, HELD_OUT, max_steps=20, generator=_generator())
    model.eval()
    x = (HELD_OUT - ROWS.mean(0)) / ROWS.std(0, correction=0)
    with torch.no_grad():
        made, latent = model.network(x)
    expected = [np.median([float(row.norm()) ** exponent for row in rows]) for rows in (x - made, latent)]
    assert [float(unit) for unit in model.score.units] == pytest.approx(expected, rel=1e-4)
    assert [float(unit) for unit in plain.score.units] == [1.0, 1.0]
    torch.testing.assert_close(plain.network.state_dict(), model.network.state_dict(), rtol=0, atol=0)
    fit_patches(model, ROWS, HELD_OUT, max_steps=2, generator=_generator())
    assert [float(unit) for unit in model.score.units] == [1.0, 1.0]  # a fit without units forgets them


def test_the_scores_weight_need_not_be_the_losss():
    model = PatchAutoencoder(_Halves(), TollLoss("auto", strength=3.0), score_weight=0.5)
    model.score.reconstruction_unit.fill_(4.0)
    model.score.latent_unit.fill_(2.0)
    # x = (4, 0, 0): the residual is (2, 0, 0), the latent (4, 4).
    found = model(torch.tensor([4.0, 0.0, 0.0]).view(1, 3, 1, 1)).item()
    assert found == pytest.approx(2 / 4 + 0.5 * math.sqrt(32) / 2)


def test_unknown_scales_and_weights_are_refused():
    with pytest.raises(ValueError, match="score_scale must be one of 'median', 'none', got 'mean'"):
        fit_patches(_patches(), ROWS, HELD_OUT, score_scale="mean", generator=_generator())
    with pytest.raises(ValueError, match="score_weight must be finite and >= 0, got -1"):
        PatchAutoencoder(_Halves(), TollLoss(), score_weight=-1)


def test_an_unknown_score_term_is_refused():
    with pytest.raises(ValueError, match=r"score_term must be one of .*got 'both'"):
        _patches(term="both")


def test_standardisation_travels_with_the_weights():
    model, twin = _patches(), _patches(seed=1)
    model.standardise_by(torch.arange(4.0), torch.arange(1.0, 5.0))
    twin.load_state_dict(model.state_dict())
    features = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(twin.eval()(features), model.eval()(features))
    torch.testing.assert_close(twin.standardise(torch.arange(4.0)[None]), torch.zeros(1, 4))


def test_channels_that_hardly_vary_are_not_blown_up():
    model = _patches()
    # 2 is the median of the deviations that vary: nothing is divided by less than a small share of it.
    model.standardise_by(torch.zeros(4), torch.tensor([0.0, 1e-9, 2.0, 5.0]))
    smallest = model.scale[0]
    assert 1e-9 < smallest < 2
    assert model.scale.tolist() == [smallest, smallest, 2.0, 5.0]


def test_silent_channels_do_not_drown_the_others():
    """More than half of the channels are constant in training, as with a backbone whose units are dead."""
    rows, held_out = ROWS.clone(), HELD_OUT.clone()
    rows[:, :3], held_out[:, :3] = 0.0, 1e-4
    model = _patches()
    history = fit_patches(model, rows, held_out, max_steps=20, batch_size=64, generator=_generator())
    # Divided by 1e-12 the held-out rows would lie 1e8 from the mean, and their loss would be 1e16.
    assert max(history.validation) < 100


def test_score_by_hand_of_projected_channels():
    model = PatchAutoencoder(_Halves(), TollLoss(10.0), channels=4)
    model.standardise_by(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.ones(4))
    # Most spread along the last channel, then the third and the first: those three are kept.
    model.project_on(torch.diag(torch.tensor([2.0, 1.0, 3.0, 4.0])))
    kept = model.components.abs()
    torch.testing.assert_close(kept, torch.eye(4)[:, [3, 2, 0]])
    # x = (0, 0, 2) up to signs: the residual is half of it, the latent, of the first two, 0.
    assert model(torch.tensor([3.0, 5.0, 0.0, 0.0]).view(1, 4, 1, 1)).item() == pytest.approx(1)


def test_components_are_numpys_of_the_rows_that_are_drawn():
    rows = torch.randn(500, 6, generator=_generator()) @ torch.randn(6, 6, generator=_generator(1))
    rows[::50] *= 30  # what a large focus draws almost alone
    model = PatchAutoencoder(DenseAutoencoder(2, (8,), 1), TollLoss(), channels=6)
    fit_patches(model, rows, rows, focus=8.0, max_steps=2, generator=_generator())
    torch.testing.assert_close(model.components.T @ model.components, torch.eye(2), rtol=0, atol=1e-5)
    standardised = ((rows - rows.mean(0)) / rows.std(0, correction=0)).double().numpy()
    weights = (standardised**2).sum(1) ** 4
    values = np.linalg.svd(standardised * np.sqrt(weights / weights.sum())[:, None], compute_uv=False)
    spread = ((standardised @ model.components.double().numpy()) ** 2).sum(1) @ weights / weights.sum()
    assert spread == pytest.approx((values[:2] ** 2).sum(), rel=0.02)  # the rows are drawn, so not exactly
    plain = np.linalg.svd(standardised)[2][:2].T
    assert ((standardised @ plain) ** 2).sum(1) @ weights / weights.sum() < 0.95 * spread


def test_components_travel_with_the_weights():
    model, twin = (PatchAutoencoder(DenseAutoencoder(2, (8,), 1), TollLoss(), channels=4) for _ in range(2))
    fit_patches(model, ROWS, HELD_OUT, max_steps=2, generator=_generator())
    twin.load_state_dict(model.state_dict())
    features = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(twin.eval()(features), model.eval()(features))


@pytest.mark.parametrize("channels", [4, 6])
def test_rows_are_prepared_as_the_network_sees_them(channels):
    model = PatchAutoencoder(DenseAutoencoder(4, (8,), 2), TollLoss(), channels=channels)
    raw = torch.randn(20, channels, generator=_generator())
    mean, deviation = torch.arange(float(channels)), torch.arange(1.0, channels + 1)
    model.standardise_by(mean, deviation)
    model.project_on(raw)
    standardised = (raw - mean) / deviation
    torch.testing.assert_close(model.prepare(raw), standardised if channels == 4 else standardised @ model.components)


def test_fewer_channels_than_the_network_takes():
    with pytest.raises(ValueError, match="channels must be at least 4, got 3"):
        PatchAutoencoder(DenseAutoencoder(4, (8,), 2), TollLoss(), channels=3)
    assert _patches().components is None


def test_nothing_varies():
    model = _patches()
    model.standardise_by(torch.full((4,), 7.0), torch.zeros(4))
    torch.testing.assert_close(model.standardise(torch.full((1, 4), 9.0)), torch.full((1, 4), 2.0))


# --- enlarge

SIZES = [((5, 7), (20, 28)), ((5, 7), (33, 17)), ((1, 1), (4, 6)), ((1, 3), (5, 3)), ((3, 1), (2, 9)), ((9, 8), (4, 3))]
SIZES += [((1, 4), (1, 1)), ((6, 6), (6, 6))]


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_without_sigma_it_is_torchs_bilinear_interpolation(grid, size):
    maps = torch.rand(3, 1, *grid, dtype=torch.float64)
    expected = interpolate(maps, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge(maps, size, 0.0), expected)
    torch.testing.assert_close(enlarge(maps.float(), size, 0.0), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.8, 4.0, 50.0])
@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_with_sigma_it_is_scipys_gaussian_normalised_within_the_image(grid, size, sigma):
    maps = torch.rand(2, 1, *grid, dtype=torch.float64)
    enlarged = interpolate(maps, size, mode="bilinear", align_corners=False).numpy()
    # Zeros beyond the edge, divided by the share of the kernel that lies inside; a radius beyond every size.
    blur = {"sigma": sigma, "mode": "constant", "radius": 40, "axes": (2, 3)}
    expected = gaussian_filter(enlarged, **blur) / gaussian_filter(np.ones_like(enlarged), **blur)
    torch.testing.assert_close(enlarge(maps, size, sigma), torch.from_numpy(expected))


def test_gaussian_by_hand():
    # Two pixels at distance 1: the neighbour has the weight exp(-1/2) against 1.
    weight = math.exp(-0.5)
    found = enlarge(torch.tensor([[[[1.0, 0.0]]]]), (1, 2), 1.0)[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([1 / (1 + weight), weight / (1 + weight)]))


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    sigma=st.sampled_from([0.0, 0.3, 2.0, 30.0]),
    level=st.floats(-1e3, 1e3),
    seed=st.integers(0, 100),
)
def test_enlarging_averages(grid, size, sigma, level, seed):
    """A constant stays one, nothing leaves the range of the map, and a mirrored map gives a mirrored result."""
    maps = torch.rand(2, 1, *grid, generator=_generator(seed), dtype=torch.float64)
    found = enlarge(maps, size, sigma)
    assert found.shape == (2, 1, *size)
    assert float(found.min()) >= float(maps.min()) - 1e-12
    assert float(found.max()) <= float(maps.max()) + 1e-12
    torch.testing.assert_close(enlarge(maps.flip(-1, -2), size, sigma), found.flip(-1, -2))
    constant = enlarge(torch.full_like(maps, level), size, sigma)
    torch.testing.assert_close(constant, torch.full_like(constant, level))


# --- images


def _images(limit: float = 1e9, *, names: str = "cab", seed: int = 0) -> tuple[ImageFeatures, dict[str, torch.Tensor]]:
    """Features of images of 2 by 3 positions, which came in this order and one at a time; and their rows by name."""
    features, rows = ImageFeatures(4, (2, 3), limit), {}
    maps = torch.randn(len(names), 4, 2, 3, generator=_generator(seed))
    for name, one in zip(names, maps, strict=True):
        features.append(one[None], [name])
        of_image = torch.stack([one[:, i, j] for i in range(2) for j in range(3)])
        rows[name] = torch.cat([rows[name], of_image]) if name in rows else of_image
    return features, rows


@pytest.mark.parametrize("limit", [1e9, 0])
def test_rows_of_images_are_in_the_order_of_their_names(limit):
    features, rows = _images(limit)
    assert (features.names, len(features.rows)) == (["c", "a", "b"], 18)
    assert torch.equal(features.rows[slice(None)], torch.cat([rows["c"], rows["a"], rows["b"]]))
    assert torch.equal(features.in_order_of_names()[slice(None)], torch.cat([rows["a"], rows["b"], rows["c"]]))


@pytest.mark.parametrize("names", ["abcdefghij", "jihgfedcba", "cabbagehidejfabc"])  # the last has copies
def test_images_are_held_out_whole_and_with_their_copies(names):
    features, rows = _images(names=names)
    kept, held_out = (subset[slice(None)] for subset in features.hold_out(0.3, _generator(1)))
    images = sorted(set(names))
    chosen = [name for name in images if bool((held_out == rows[name][0]).all(dim=1).any())]
    assert len(chosen) == 3
    assert torch.equal(held_out, torch.cat([rows[name] for name in chosen]))
    assert torch.equal(kept, torch.cat([rows[name] for name in images if name not in chosen]))


def test_the_generator_alone_decides_which_images_are_held_out():
    held_out = []
    for names, seed in (("abcdefghij", 0), ("hcbjdaefig", 0), ("abcdefghij", 1)):
        features, rows = _images(names=names)
        found = features.hold_out(0.3, _generator(seed))[1][slice(None)]
        held_out.append({name for name in names if bool((found == rows[name][0]).all(dim=1).any())})
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize(("count", "share", "expected"), [(2, 0.2, 1), (9, 0.2, 2), (12, 0.2, 2), (13, 0.2, 3)])
def test_a_share_of_the_images_is_held_out(count, share, expected):
    features, _ = _images(names="abcdefghijklm"[:count])
    assert [len(rows) // 6 for rows in features.hold_out(share, _generator())] == [count - expected, expected]


@pytest.mark.parametrize("names", ["a", "aaa"])
def test_one_image_is_both_trained_on_and_held_out(names):
    features, _ = _images(names=names)
    for rows in features.hold_out(0.2, _generator()):
        assert torch.equal(rows[slice(None)], features.in_order_of_names()[slice(None)])


def test_images_without_names_are_numbered():
    features = ImageFeatures(4, (2, 3))
    features.append(torch.zeros(2, 4, 2, 3))
    features.append(torch.zeros(1, 4, 2, 3))
    assert features.names == ["image 0", "image 1", "image 2"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_that_are_not_finite_are_refused_with_the_names_of_their_images(bad, dtype):
    features, _ = _images()
    maps = torch.zeros(4, 4, 2, 3, dtype=dtype)
    maps[1, 3, 0, 2], maps[3, 0, 1, 1] = bad, bad
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or infinite ones of e, g:"):
        features.append(maps, list("defg"))
    assert (features.names, len(features.rows)) == (["c", "a", "b"], 18)


def test_images_of_another_size_or_other_channels_are_refused():
    features, _ = _images()
    with pytest.raises(ValueError, match="images must have one size, d gives 3 x 2 positions, not 2 x 3"):
        features.append(torch.zeros(1, 4, 3, 2), ["d"])
    with pytest.raises(ValueError, match=r"rows must have shape \(N, 4\), got \(6, 5\)"):
        features.append(torch.zeros(1, 5, 2, 3), ["d"])
    assert features.names == ["c", "a", "b"]


# --- statistics


@pytest.mark.parametrize("offset", [0.0, 1e3, -3e6])
@pytest.mark.parametrize("piece", [7, 10_000])  # several pieces, the last of them short, and one
def test_statistics_equal_numpys_where_the_mean_is_large(offset, piece, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    # In single precision the squares of 3e6 have steps of 1e6, so nothing of a deviation of 1 would be left.
    rows = (np.random.default_rng(0).normal(size=(101, 3)) * [1, 4, 0.5] + offset).astype(np.float32)
    mean, deviation = module._statistics(torch.from_numpy(rows))
    np.testing.assert_allclose(mean, rows.astype(float).mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(deviation, rows.astype(float).std(0), rtol=1e-6)


def test_statistics_of_a_constant_are_exact(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 7)
    mean, deviation = module._statistics(torch.full((50, 2), 0.1))
    assert mean.float().tolist() == torch.full((2,), 0.1).tolist()
    assert deviation.tolist() == [0.0, 0.0]


def test_statistics_do_not_lean_on_the_first_piece(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 5)
    rows = np.concatenate([np.full((5, 1), 1e4), np.random.default_rng(0).normal(size=(95, 1))]).astype(np.float32)
    mean, deviation = module._statistics(torch.from_numpy(rows))
    np.testing.assert_allclose(mean, rows.astype(float).mean(0), rtol=1e-9)
    np.testing.assert_allclose(deviation, rows.astype(float).std(0), rtol=1e-9)


# --- focus


class _Recorded:
    """Rows that remember which of them were fetched by position."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.fetched = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):
            self.fetched.append(index)
        return self.rows[index]


def _drawn(rows: torch.Tensor, focus: float, *, of: str = "rows", seed: int = 0) -> np.ndarray:
    """How often each row was fetched in one epoch."""
    rows_of = {"rows": _Recorded(ROWS), "validation": _Recorded(HELD_OUT)} | {of: _Recorded(rows)}
    steps = -(-len(rows_of["rows"]) // 4096)
    fit_patches(
        _patches(rows.shape[1]), **rows_of, focus=focus, batch_size=4096, max_steps=steps, generator=_generator(seed)
    )
    return np.bincount(torch.cat(rows_of[of].fetched), minlength=len(rows))


@pytest.mark.parametrize("focus", [0.0, 0.5, 2.0, 3.0])
@pytest.mark.parametrize("of", ["rows", "validation"])
def test_rows_are_drawn_in_proportion_to_a_power_of_their_distance(focus, of, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 1000)
    rows = torch.randn(12_000, 4, generator=_generator(4)).mul(torch.linspace(0.1, 3, 12_000)[:, None]).add(50)
    counts = _drawn(rows, focus, of=of)
    assert counts.sum() == len(rows)

    array = rows.double().numpy()
    # Held-out rows are standardised by the training rows, and a channel's deviation is NumPy's.
    basis = array if of == "rows" else ROWS.double().numpy()
    weights = (((array - basis.mean(0)) / basis.std(0)) ** 2).sum(1) ** (focus / 2)
    bins = np.array_split(np.argsort(weights), 30)
    shares = np.array([weights[chosen].sum() for chosen in bins]) / weights.sum()
    observed, expected = np.array([counts[chosen].sum() for chosen in bins]), shares * len(rows)
    # Chi-square of the bins, at a level that a right sampler misses once in 10^6 seeds; there is one seed.
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(1 - 1e-6, len(bins) - 1)


def test_every_row_can_be_drawn_and_the_order_is_no_privilege():
    counts = sum(_drawn(ROWS, 0.0, seed=seed) for seed in range(40))
    assert counts.min() >= 15  # 40 are expected of each, with a deviation of 6.3
    assert counts.max() <= 70


def test_the_only_row_away_from_the_mean_is_drawn_alone():
    rows = torch.zeros(400, 4)
    rows[123] = 400.0
    counts = _drawn(rows, 8.0)
    # The others lie at 1 from a mean of 1, it lies at 399: (399)^8 against 399 times 1.
    assert counts[123] == 400


@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_a_constant_table_is_drawn_and_fitted_without_nan(value, focus):
    model = _patches()
    recorded = _Recorded(torch.full((50, 4), value))
    history = fit_patches(model, recorded, recorded, focus=focus, max_steps=5, batch_size=16, generator=_generator())
    assert np.isfinite([history.total, history.validation, history.reconstruction, history.latent]).all()
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert len(torch.cat(recorded.fetched).unique()) > 20  # all weights are zero, which means uniform
    assert bool(model.eval()(torch.full((1, 4, 2, 2), value)).isfinite().all())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, -1e4]),
    focus=st.sampled_from([0.0, 0.3, 2.0, 60.0]),
    seed=st.integers(0, 100),
)
def test_any_table_is_fitted_with_finite_numbers(n, scale, offset, focus, seed):
    rows = torch.randn(n, 3, generator=_generator(seed)) * scale + offset
    model = _patches(3)
    history = fit_patches(model, rows, rows, focus=focus, max_steps=3, batch_size=8, generator=_generator(seed))
    assert np.isfinite([history.total, history.validation]).all()
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_some_of_the_held_out_rows_suffice(monkeypatch):
    monkeypatch.setattr(module, "_ENOUGH", 25)
    recorded = _Recorded(HELD_OUT)
    fit_patches(_patches(), ROWS, recorded, max_steps=1, generator=_generator())
    assert len(torch.cat(recorded.fetched)) == 25


# --- fit


def _fitted(rows=ROWS, held_out=HELD_OUT, *, seed: int = 5, **arguments):
    model = _patches()
    arguments = {"max_steps": 30, "batch_size": 64, "lr": 0.01} | arguments
    return model, fit_patches(model, rows, held_out, generator=_generator(seed), **arguments)


def _assert_equal(model, other):
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_generator_decides():
    (model, history), (again, history_again), (other, _) = _fitted(), _fitted(), _fitted(seed=6)
    _assert_equal(model, again)
    assert history == history_again
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_global_state_is_touched():
    state = torch.get_rng_state()
    _fitted(focus=1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("limit", [0, 2000, 1e9])
def test_it_makes_no_difference_where_the_rows_lie(limit):
    caches = []
    for rows in (ROWS, HELD_OUT):
        cache = RowCache(4, limit=limit)
        for part in rows.split(13):
            cache.append(part)
        caches.append(cache)
    assert caches[0].in_memory == (limit == 1e9)
    model, history = _fitted(*caches)
    expected, expected_history = _fitted()
    _assert_equal(model, expected)
    assert history == expected_history


def test_it_learns_and_standardises():
    model, history = _fitted(max_steps=300)
    assert min(history.validation) < 0.7 * history.validation[0]
    standardised = model.standardise(ROWS)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(standardised.std(0, correction=0), torch.ones(4), rtol=0, atol=1e-5)


def test_the_written_out_step_and_autograd_agree():
    """The same network as one that only autograd can train."""
    model = _patches()
    twin = copy.deepcopy(model)
    twin.network = Autoencoder(twin.network.encoder, twin.network.decoder, input_shape=(4,))
    arguments = {"lr": 0.003, "batch_size": 64, "max_steps": 12}
    history = fit_patches(model, ROWS, HELD_OUT, generator=_generator(), **arguments)
    expected = fit_patches(twin, ROWS, HELD_OUT, generator=_generator(), **arguments)
    np.testing.assert_allclose(history.total, expected.total, rtol=1e-4)
    np.testing.assert_allclose(history.validation, expected.validation, rtol=1e-3)


#: Far from all training rows, so it is reconstructed the worse the longer the fit goes on. As all
#: held-out rows are this one, it does not matter which of them are drawn.
OUTLIER = torch.tensor([[3.0, 3.0, 13.0, 3.0]]).expand(9, 4)


def _outlier_loss(model) -> float:
    with torch.no_grad():
        return float(model.eval()(OUTLIER[:1].reshape(1, 4, 1, 1)))


def test_the_best_weights_are_put_back():
    model, history = _fitted(held_out=OUTLIER, max_steps=400, lr=0.1, patience=None)
    assert len(history.validation) == 400 // 5 + (400 % 5 > 0)
    assert history.best_epoch == int(np.argmin(history.validation)) < len(history.validation) - 1
    assert history.validation[-1] > 1.01 * min(history.validation)  # so the last weights would be told apart
    assert _outlier_loss(model) == pytest.approx(min(history.validation), rel=1e-4)


def test_patience_ends_the_fit():
    _, history = _fitted(held_out=OUTLIER, max_steps=4000, lr=0.1, patience=3)
    assert len(history.total) == history.best_epoch + 4
    assert len(history.total) < 4000 // 5


def test_steps_end_the_fit():
    seen = []
    model, history = _fitted(max_steps=12, patience=1, on_epoch=lambda epoch, _: seen.append(epoch))
    assert len(history.total) == 3  # 300 rows, 64 at a time: five, five and two steps
    assert seen == [0, 1, 2]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_focus_is_for_rare_positions():
    """3 of 100 positions show something else than the others, further from the mean and along other directions."""
    usual, rare = torch.randn(2, 4, 12, generator=_generator(99)) * torch.tensor([0.3, 1.5])[:, None, None]

    def table(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = _generator(seed)
        causes = torch.randn(n, 4, generator=generator).tanh()
        is_rare = torch.rand(n, 1, generator=generator) < 0.03
        rows = torch.where(is_rare, causes @ rare, causes @ usual)
        return rows + 0.02 * torch.randn(n, 12, generator=generator), is_rare[:, 0]

    (train, _), (held_out, _), (fresh, is_rare) = table(3000, 0), table(600, 1), table(3000, 2)
    errors = {}
    for focus in (0.0, 2.0):
        model = PatchAutoencoder(DenseAutoencoder(12, (32,), 4, generator=_generator()), TollLoss(0.01))
        arguments = {"max_steps": 300, "batch_size": 128, "lr": 0.01, "patience": None}
        fit_patches(model, train, held_out, focus=focus, generator=_generator(), **arguments)
        with torch.no_grad():
            errors[focus] = model.eval().terms(fresh[is_rare][:, :, None, None]).reconstruction.mean().item()
    assert errors[2.0] < 0.5 * errors[0.0]  # a quarter, with this seed and others


def test_divergence_leaves_finite_weights():
    model = _patches()
    with pytest.raises(DivergenceError, match="not finite at step"):
        fit_patches(model, ROWS, HELD_OUT, lr=1e30, max_steps=200, batch_size=64, generator=_generator())
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert bool(model.eval()(torch.randn(1, 4, 2, 2)).isfinite().all())


@pytest.mark.parametrize("n", [1, 2, 3, 33])
@pytest.mark.parametrize("held_out", [1, 2])
def test_few_rows(n, held_out):
    model, history = _fitted(ROWS[:n], HELD_OUT[:held_out], max_steps=4, batch_size=32)
    assert np.isfinite([history.total, history.validation]).all()
    assert bool(model.eval()(torch.randn(1, 4, 2, 3)).isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"focus": -1.0}, ValueError, "focus must be finite and >= 0, got -1"),
        ({"focus": math.inf}, ValueError, "focus must be finite"),
        ({"lr": 0}, ValueError, "lr must be finite and > 0, got 0"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2, got 1"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps must be an integer, got 1.5"),
        ({"rows": ROWS[:0]}, ValueError, "rows must hold at least one row, got none"),
        ({"rows": ROWS[:, :3]}, ValueError, r"rows must have shape \(N, 4\), got \(300, 3\)"),
        ({"rows": ROWS[:, :1]}, ValueError, r"rows must have shape \(N, 4\), got \(300, 1\)"),
        ({"rows": ROWS / 0}, ValueError, "rows must be finite, got NaN or infinity"),
        ({"validation": HELD_OUT.log()}, ValueError, "validation must be finite, got NaN or infinity"),
        ({"lr": 1e30, "max_steps": 50}, DivergenceError, "not finite at step"),
        ({"validation": ROWS[:0]}, ValueError, "validation must hold at least one row, got none"),
    ],
)
def test_bad_arguments_leave_a_fitted_model_as_it_was(arguments, error, message):
    model, _ = _fitted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        fit_patches(model, **{"rows": ROWS, "validation": HELD_OUT, "generator": _generator()} | arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_held_out_images_are_scored_one_by_one():
    features, rows = _images(names="cabd")
    model, _ = _fitted()
    model.train()
    scores, _ = examine(model, features.in_order_of_names(), (2, 3))
    assert model.training
    maps = torch.stack([rows[name].T.reshape(4, 2, 3) for name in "abcd"])
    with torch.no_grad():
        torch.testing.assert_close(scores, model.eval()(maps))


@pytest.mark.parametrize(("share", "signatures"), [(0.0, ["predicts_mean"]), (0.9, [])])
def test_a_model_that_predicts_the_mean_is_found(share, signatures):
    network = nn.Module()
    network.input_shape, network.forward = (4,), lambda x: (share * x, x[:, :2])
    _, findings = examine(PatchAutoencoder(network, TollLoss()), _images()[0].rows, (2, 3))
    assert [finding.signature for finding in findings] == signatures


# --- the learning rate

#: Of 20 steps: two rise by halves of the largest rate, along half a cosine that begins at once.
BY_HAND = {0: 0.5, 1: (1 + math.cos(math.pi / 20)) / 2, 5: (1 + math.sqrt(0.5)) / 2, 10: 0.5, 15: (1 - 0.5**0.5) / 2}


@pytest.mark.parametrize("parameters", [1, 2])  # one has a path of its own, two go through torch.optim
def test_learning_rates_by_hand(parameters):
    held = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(parameters)]
    optimizer = cosine_adam(0.2, 20)(held)
    moves = []
    for _ in range(24):
        before = held[0].detach().clone()
        for parameter in held:
            # Of a constant gradient Adam takes the sign, so a parameter moves by the learning rate.
            parameter.grad = torch.tensor([1.0, -3.0, 50.0], dtype=torch.float64)
        optimizer.step()
        moves.append((before - held[0].detach()) * torch.tensor([1, -1, 1]))
    for step, share in BY_HAND.items():
        torch.testing.assert_close(moves[step], torch.full((3,), 0.2 * share, dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.stack(moves[:20]).min() > 0
    assert torch.stack(moves[20:]).abs().max() < 1e-12  # what was to be done is done
    assert all(torch.equal(parameter, held[0]) for parameter in held)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in held)


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("parameters", [1, 2])
def test_steps_equal_torchs_adam_with_a_schedule(steps, parameters):
    held = [nn.Parameter(torch.randn(4)) for _ in range(parameters)]
    twins = copy.deepcopy(held)
    optimizer, expected = cosine_adam(0.05, steps)(held), torch.optim.Adam(twins, lr=1.0)
    for step in range(steps):
        for parameter, twin in zip(held, twins, strict=True):
            parameter.grad = torch.randn(4)
            twin.grad = parameter.grad.clone()
        rise = min(1.0, (step + 1) / (steps / 10))
        expected.param_groups[0]["lr"] = 0.05 * rise * math.cos(math.pi * step / (2 * steps)) ** 2
        optimizer.step()
        expected.step()
    for parameter, twin in zip(held, twins, strict=True):
        torch.testing.assert_close(parameter, twin)


@pytest.mark.parametrize(
    ("lr", "steps", "error"),
    [(0.0, 5, ValueError), (math.nan, 5, ValueError), ("1", 5, TypeError), (0.1, 0, ValueError), (0.1, 5.0, TypeError)],
)
def test_bad_arguments_of_the_optimiser(lr, steps, error):
    with pytest.raises(error, match=r"lr must be|steps must be"):
        cosine_adam(lr, steps)
