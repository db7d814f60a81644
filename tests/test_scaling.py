"""Scalings, against the papers' constants worked by hand."""

from __future__ import annotations

import pytest
import torch

from toll_plugin.core import ImageScaling, contrast_normalise, contrast_range
from toll_plugin.core.image_scaling import named_statistics


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("unit", 0.5, 0.5),
        ("paper_mnist", 1.0, (1 - 0.1307) / 0.3081),
        ("paper_mnist", 0.0, -0.1307 / 0.3081),
        ("paper_fashion_mnist", 1.0, (1 - 0.2860) / 0.3530),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_constants(name, value, expected, channels):
    scaled = ImageScaling(name)(torch.full((2, channels, 3, 4), value))
    torch.testing.assert_close(scaled, torch.full((2, channels, 3, 4), expected))


def test_imagenet():
    scaled = ImageScaling("imagenet")(torch.full((1, 3, 1, 1), 0.5))
    expected = [(0.5 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(scaled.flatten(), torch.tensor(expected))


def test_statistics_of_your_own():
    scaled = ImageScaling(((0.5, 0.25, 0.0), (0.5, 0.25, 2.0)))(torch.full((2, 3, 1, 1), 0.75))
    torch.testing.assert_close(scaled[1].flatten(), torch.tensor([0.5, 2.0, 0.375]))
    # As lists, which a checkpoint or a YAML may have made of them.
    assert ImageScaling([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]).name == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert named_statistics([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) == "imagenet"
    assert named_statistics((0.5,) * 3, (0.5,) * 3) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        (((0.5,), (0.5, 0.5)), TypeError, "scaling must be a name, or a mean and a deviation of each channel"),
        (3, TypeError, "scaling must be a name, or a mean and a deviation of each channel, got 3"),
        (((0.5,), (0.0,)), ValueError, r"scaling\[1\]\[0\] must be finite and > 0, got 0.0"),
    ],
)
def test_bad_statistics(statistics, error, message):
    with pytest.raises(error, match=message):
        ImageScaling(statistics)


def test_contrast_by_hand():
    image = torch.tensor([0.0, 1.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    # Mean 1, mean absolute value of (-1, 0, 0, 1) is 0.5.
    torch.testing.assert_close(contrast_normalise(image).flatten(), torch.tensor([-2.0, 0.0, 0.0, 2.0]))
    assert contrast_range(image) == (-2.0, 2.0)
    scaled = ImageScaling("paper_cifar", (-2.0, 6.0))(image)
    torch.testing.assert_close(scaled.flatten(), torch.tensor([0.0, 0.25, 0.25, 0.5]))


def test_contrast_does_not_depend_on_the_unit():
    images = torch.rand(4, 3, 5, 5)
    torch.testing.assert_close(contrast_normalise(images), contrast_normalise(255 * images))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_a_constant_image_becomes_zeros(level):
    assert not contrast_normalise(torch.full((1, 3, 9, 9), level)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), "scaling must be one of .*'paper_mnist'.*got 'mnist'"),
        (("unit", (0, 1)), "scaling_range must be given with scaling='standard' or 'paper_cifar' only"),
        (("paper_cifar", (1.0, 1.0)), r"scaling_range\[1\] must be finite and > 1"),
        (("paper_cifar", (0.0, float("nan"))), r"scaling_range\[1\] must be finite"),
        (("paper_cifar", (0.0, 1.0, 2.0)), "scaling_range must be a pair"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageScaling(*arguments)


def test_a_range_that_is_not_known_yet():
    with pytest.raises(RuntimeError, match="scaling_range of scaling='paper_cifar' is not known yet: fit the model"):
        ImageScaling("paper_cifar")(torch.rand(1, 3, 4, 4))
