"""The score of a whole image: both terms against sums written out, units, few images, older files."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toll_plugin.core import ImageScore, ImageTerms
from toll_plugin.core.patches.whole import pooled, positions_of


def _features(count, channels=3, seed=0, grid=(6, 5)):
    return torch.randn(count, channels, *grid, generator=torch.Generator().manual_seed(seed))


def test_the_position_term_is_the_mean_of_the_highest():
    maps = torch.arange(100.0).flip(0).view(1, 1, 10, 10)
    assert ImageScore(1, share=0.03).position_term(maps).tolist() == [(99 + 98 + 97) / 3]
    assert ImageScore(1, share=0.0).position_term(maps).tolist() == [99]
    assert ImageScore(1, share=1.0).position_term(maps).tolist() == [49.5]


@pytest.mark.parametrize("count", [2, 3, 8, 40])
def test_the_image_term_is_the_residual_of_numpys_components(count):
    score, features = ImageScore(3, cells=2, n_components=5), _features(count)
    score.fit(features)
    vectors = pooled(features, 2).double().numpy()
    mean, deviation = vectors.mean(axis=0), vectors.std(axis=0)
    components = np.linalg.svd((vectors - mean) / deviation, full_matrices=False)[2][: min(5, count // 2)]
    new = _features(7, seed=1)
    x = (pooled(new, 2).double().numpy() - mean) / deviation
    expected = np.linalg.norm(x - x @ components.T @ components, axis=1)
    torch.testing.assert_close(score.image_term(new), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def test_windows_overlap_and_keep_a_constant():
    assert torch.allclose(pooled(torch.full((1, 2, 7, 9), 3.0), 4), torch.full((1, 32), 3.0))
    # Of four cells, the windows of two take weights of 3/8, 3/8, 1/4 and 0 if each reaches one cell into the other.
    found = pooled(torch.eye(4)[None, :, :, None].expand(1, 4, 4, 2), 2)[0].view(4, 2, 2)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(2, 2))
    torch.testing.assert_close(found[:, 0, 0], found[:, 1, 0].flip(0))


def test_both_terms_are_added_in_their_units():
    score = ImageScore(3, share=0.0, weight=0.5)
    score.measure(ImageTerms(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([2.0, 2.0, 3.0])))
    assert score.score_of(ImageTerms(torch.tensor([8.0]), torch.tensor([6.0]))).tolist() == [8 / 4 + 0.5 * 6 / 2]


def test_without_the_term_the_score_keeps_the_unit_of_the_map():
    score, maps = ImageScore(3, share=0.0, weight=0.0), torch.rand(4, 1, 6, 5)
    score.measure(ImageTerms(torch.tensor([7.0]), torch.tensor([1.0])))
    assert score.is_maximum
    assert torch.equal(score(maps, _features(4)), maps.amax(dim=(1, 2, 3)))


def test_one_image_says_nothing_of_what_images_have_in_common():
    score, maps = ImageScore(3), torch.rand(2, 1, 6, 5)
    score.fit(_features(1))
    score.measure(score.terms(maps, _features(2)))
    new = _features(2, seed=5)
    torch.testing.assert_close(score(maps, new), score.position_term(maps) / score.position_unit)


def test_a_second_fit_forgets_the_first():
    once, twice = ImageScore(3), ImageScore(3)
    for features in (_features(40, seed=1), _features(4)):
        twice.fit(features)
    once.fit(_features(4))
    assert all(torch.equal(a, b) for a, b in zip(once.buffers(), twice.buffers(), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_units_of_the_features_do_not_matter(count, seed, factor, offset):
    features, new, maps = _features(count, seed=seed), _features(6, seed=seed + 1), torch.rand(6, 1, 4, 4)
    found = []
    for scale, shift in ((1.0, 0.0), (factor, offset * factor)):
        score = ImageScore(3)
        score.fit((features * scale + shift).double())
        score = score.double()
        score.measure(score.terms(maps.double(), (new * scale + shift).double()))
        found.append(score(maps.double(), (new * scale + shift).double()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_files_from_before_mean_the_maximum():
    score = ImageScore(3)
    score.load_state_dict({})
    assert score.is_maximum
    with pytest.raises(RuntimeError, match="components"):
        ImageScore(3).load_state_dict({"mean": torch.zeros(48)})


def test_rows_come_back_as_maps():
    features = _features(3)
    rows = features.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(torch.cat(list(positions_of(rows, (6, 5)))), features)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"share": 1.5}, ValueError, r"top_share must be in \[0, 1\], got 1.5"),
        ({"share": "1"}, TypeError, "top_share must be a real number, got '1'"),
        ({"weight": -1}, ValueError, "image_weight must be finite and >= 0, got -1"),
        ({"cells": 0}, ValueError, "cells must be"),
    ],
)
def test_errors_name_the_parameter(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageScore(3, **arguments)
