"""The linear peer of PatchToll, against NumPy's singular value decomposition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.interfaces import Budget, Split
from benchmarks.methods.engine import EngineDetector
from benchmarks.methods.rotations import at_angles, turned
from benchmarks.methods.subspace import Moments, Subspace, residual_basis
from toll_plugin.anomalib import PatchToll

RANDOM = Budget(pretrained=False)


def _rows(seed, count, channels, offset=0.0):
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(count, channels)) * 2.0 ** -np.arange(channels)
    return mixed @ np.linalg.qr(draw.normal(size=(channels, channels)))[0] + offset


def _moments(pieces):
    moments = Moments()
    for piece in pieces:
        moments.update(torch.from_numpy(piece))
    return moments


def _by_svd(rows, new, variance):
    """Norm of what new rows have beyond the directions that hold ``variance``, and the number of directions."""
    mean = rows.mean(axis=0)
    _, values, directions = np.linalg.svd(rows - mean, full_matrices=False)
    share = np.cumsum(values**2) / np.sum(values**2)
    kept = int(np.argmax(share >= variance)) + 1
    moved = new - mean
    return np.linalg.norm(moved - moved @ directions[:kept].T @ directions[:kept], axis=1), kept


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 1000))
def test_moments_do_not_depend_on_the_pieces(sizes, seed):
    rows = _rows(seed, sum(sizes), 5, offset=1e4)
    found = _moments(np.split(rows, np.cumsum(sizes)[:-1]))
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True).reshape(5, 5), atol=1e-8)


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99, 0.9999])
def test_the_residual_is_that_of_the_singular_vectors(variance):
    rows, new = _rows(0, 200, 8, offset=3.0), _rows(1, 20, 8)
    moments = _moments(np.split(rows, 4))
    basis = residual_basis(moments.covariance, variance)
    expected, kept = _by_svd(rows, new, variance)
    assert basis.shape == (8, 8 - kept)
    np.testing.assert_allclose(np.linalg.norm((new - moments.mean.numpy()) @ basis.numpy(), axis=1), expected)


def test_the_least_number_of_directions_that_hold_the_variance():
    covariance = torch.diag(torch.tensor([1.0, 6.0, 3.0], dtype=torch.float64))
    assert residual_basis(covariance, 0.6).shape == (3, 2)
    assert residual_basis(covariance, 0.61).shape == (3, 1)
    torch.testing.assert_close(residual_basis(covariance, 0.9).abs().flatten().tolist(), [1.0, 0.0, 0.0])
    # One direction is left, or nothing would be anomalous; where nothing varies all are.
    assert residual_basis(covariance, 0.99).shape == (3, 1)
    assert residual_basis(torch.zeros(3, 3, dtype=torch.float64), 0.99).shape == (3, 3)


def _split(count=6, side=64):
    images = torch.randint(0, 256, (count + 7, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()
    return Split(images[:count], images[count : count + 1], images[count + 1 :], np.arange(6) > 2)


@pytest.mark.parametrize("standardise", [False, True])
def test_scores_and_maps_from_images(standardise):
    split = _split()
    detector = EngineDetector("Subspace", RANDOM, 0, standardise=standardise, share=0.1, image_size=64)
    detector.fit(split)
    model = detector.model.model
    see = detector.model.pre_processor.transform

    def positions(images):
        features = model.embed(see(images.float() / 255))
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).double().numpy()

    rows, new = positions(split.train), positions(split.test)
    if standardise:
        scale = rows.std(axis=0)
        scale = np.maximum(scale, 1e-3 * np.median(scale[scale > 0]))
        rows, new = rows / scale, new / scale
    expected = _by_svd(rows, new, 0.99)[0].reshape(6, 64)
    found = detector.score(split.test)
    # A tenth of 8x8 positions, rounded up.
    np.testing.assert_allclose(found.scores, np.sort(expected)[:, -math.ceil(6.4) :].mean(axis=1), rtol=1e-3)
    assert found.maps.shape == (6, 64, 64)
    inside = found.maps.mean(axis=(1, 2))
    np.testing.assert_allclose(inside, expected.mean(axis=1), rtol=0.1)
    # What is kept to score does not grow with the images: the mean and the directions that are left.
    backbone = sum(value.nbytes for value in model.backbone.state_dict().values())
    kept = 4 * (model.mean.numel() + model.basis.numel())
    blur = sum(value.nbytes for value in model.anomaly_map_generator.state_dict().values())
    assert detector.size() == backbone + kept + blur


def test_features_are_patch_tolls():
    model = Subspace(pre_trained=False)
    other = PatchToll(pre_trained=False, image_size=64)
    other.model.backbone.load_state_dict(model.model.backbone.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.model.embed(images), other.model.embed(images))


def test_few_images_are_seen_turned():
    counts, update = {}, Moments.update
    for rotations in (1, 4):
        detector = EngineDetector("Subspace", RANDOM, 0, rotations=rotations, image_size=64)
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Moments, "update", lambda self, rows, seen=seen: (seen.append(len(rows)), update(self, rows)))
            detector.fit(_split())
        counts[rotations] = sum(seen)
    assert counts == {1: 384, 4: 1536}


def test_equal_angles():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = at_angles(images, 4)
    expected = torch.cat([torch.rot90(images, quarter, (2, 3)) for quarter in range(4)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert at_angles(images, 1).equal(images)
    with pytest.raises(ValueError, match="rotations must be at least 1, got 0"):
        at_angles(images, 0)


def test_one_image_is_enough():
    split = _split(count=1)
    detector = EngineDetector("Subspace", RANDOM, 0, rotations=3, image_size=64)
    detector.fit(split)
    assert np.isfinite(detector.score(split.test).scores).all()


def test_turning():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned(images, 90.0), torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)
    flat = torch.full((1, 3, 8, 12), 0.7)
    torch.testing.assert_close(turned(flat, 45.0), flat)


def test_arguments():
    for argument, value in (("variance", 1.0), ("share", 1.5)):
        with pytest.raises(ValueError, match="variance must be below 1 and share at most 1"):
            Subspace(pre_trained=False, **{argument: value})
