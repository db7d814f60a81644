"""Networks: shapes for every size, the authors' layers, and what a user brings."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toll_plugin.core import (
    Autoencoder,
    ConvAutoencoder,
    DenseAutoencoder,
    Paper28Autoencoder,
    Paper32Autoencoder,
)
from toll_plugin.core.modes import batch_norm_fits, evaluating

NETWORKS = [
    pytest.param(lambda: ConvAutoencoder((17, 30), in_channels=2, latent_dim=5, width=4), (2, 17, 30), 5, id="conv"),
    pytest.param(
        lambda: ConvAutoencoder((8, 15), in_channels=3, latent_dim=5, width=4), (3, 8, 15), 5, id="conv-small"
    ),
    pytest.param(lambda: Paper28Autoencoder(7), (1, 28, 28), 7, id="paper28"),
    pytest.param(lambda: Paper32Autoencoder(7), (3, 32, 32), 7, id="paper32"),
    pytest.param(lambda: Paper28Autoencoder(7, width=0.1), (1, 28, 28), 7, id="narrow paper28"),
    pytest.param(lambda: Paper32Autoencoder(7, width=0.1), (3, 32, 32), 7, id="narrow paper32"),
    pytest.param(lambda: DenseAutoencoder(9, (8, 4), 3), (9,), 3, id="dense"),
    pytest.param(
        lambda: Autoencoder(
            nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 4)))
        ),
        (3, 4),
        4,
        id="own",
    ),
]


@pytest.mark.parametrize(("build", "shape", "latent_dim"), NETWORKS)
def test_contract(build, shape, latent_dim):
    network = build()
    x = torch.rand(3, *shape)
    reconstruction, latent = network(x)
    assert reconstruction.shape == x.shape
    assert latent.shape == (3, latent_dim)
    (reconstruction.sum() + latent.sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    network.eval()
    expected = network(x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        for a, b in zip(other(x), expected, strict=True):
            torch.testing.assert_close(a, b)
    # In evaluation mode a sample's result does not depend on its batch.
    torch.testing.assert_close(network(x[:1])[0], expected[0][:1], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(8, 160),
    width=st.integers(8, 160),
    channels=st.integers(1, 5),
)
def test_conv_restores_any_size(height, width, channels):
    network = ConvAutoencoder((height, width), in_channels=channels, latent_dim=3, width=2).eval()
    x = torch.rand(1, channels, height, width)
    reconstruction, latent = network(x)
    assert reconstruction.shape == x.shape
    assert latent.shape == (1, 3)


@pytest.mark.parametrize(
    ("size", "halvings"), [(8, 1), (16, 2), (28, 2), (32, 3), (64, 4), (256, 6), (512, 7), ((32, 512), 3)]
)
def test_conv_depth_follows_the_size(size, halvings):
    network = ConvAutoencoder(size, width=2)
    assert sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in network.encoder) == halvings


def _layers(module):
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return [
        (type(m).__name__, *((m.in_features, m.out_features) if isinstance(m, nn.Linear) else _conv(m)))
        for m in module
        if isinstance(m, kinds)
    ]


def _conv(m):
    return m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.bias is not None


def test_paper28_is_the_authors_network():
    network = Paper28Autoencoder(128)
    assert _layers(network.encoder) == [
        ("Conv2d", 1, 64, 4, 1, True),
        ("Conv2d", 64, 128, 4, 1, True),
        ("Conv2d", 128, 256, 4, 2, True),
        ("Conv2d", 256, 512, 4, 1, True),
        ("Conv2d", 512, 64, 4, 1, True),
        ("Linear", 1024, 128),
    ]
    assert _layers(network.decoder) == [
        ("Linear", 128, 1024),
        ("ConvTranspose2d", 64, 512, 4, 1, True),
        ("ConvTranspose2d", 512, 256, 4, 1, True),
        ("ConvTranspose2d", 256, 128, 4, 2, True),
        ("ConvTranspose2d", 128, 64, 4, 1, True),
        ("ConvTranspose2d", 64, 1, 4, 1, True),
    ]
    assert [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [
        64, 128, 256, 512, 512, 256, 128, 64,
    ]  # fmt: skip
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    # Counted by hand from the layer list.
    weights = 2 * (16 * (1 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 64) + 1024 * 128)
    biases = (64 + 128 + 256 + 512 + 64 + 128) + (1024 + 512 + 256 + 128 + 64 + 1)
    norms = 2 * 2 * (64 + 128 + 256 + 512)
    assert sum(p.numel() for p in network.parameters()) == weights + biases + norms


def test_paper32_is_the_authors_network():
    network = Paper32Autoencoder(64)
    assert _layers(network.encoder) == [
        ("Conv2d", 3, 32, 5, 1, False),
        ("Conv2d", 32, 64, 4, 2, False),
        ("Conv2d", 64, 128, 4, 1, False),
        ("Conv2d", 128, 256, 4, 2, False),
        ("Conv2d", 256, 512, 4, 1, False),
        ("Conv2d", 512, 512, 1, 1, False),
        ("Conv2d", 512, 64, 1, 1, True),
    ]
    assert _layers(network.decoder) == [
        ("ConvTranspose2d", 64, 256, 4, 1, False),
        ("ConvTranspose2d", 256, 128, 4, 2, False),
        ("ConvTranspose2d", 128, 64, 4, 1, False),
        ("ConvTranspose2d", 64, 32, 4, 2, False),
        ("ConvTranspose2d", 32, 32, 5, 1, False),
        ("Conv2d", 32, 32, 1, 1, False),
        ("Conv2d", 32, 3, 1, 1, False),
    ]
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}
    bias = network.decoder[-1].bias
    assert bias.shape == (3, 32, 32)
    assert not bias.any()


def test_a_narrow_paper28_by_hand():
    network = Paper28Autoencoder(5, width=0.03)  # 1.92, 3.84, 7.68, 15.36 and 1.92 channels
    assert [layer[:3] for layer in _layers(network.encoder)] == [
        ("Conv2d", 1, 2),
        ("Conv2d", 2, 4),
        ("Conv2d", 4, 8),
        ("Conv2d", 8, 15),
        ("Conv2d", 15, 2),
        ("Linear", 2 * 4 * 4, 5),
    ]
    assert [layer[1:3] for layer in _layers(network.decoder)] == [(5, 32), (2, 15), (15, 8), (8, 4), (4, 2), (2, 1)]


def test_a_narrow_paper32_by_hand():
    network = Paper32Autoencoder(5, width=0.01)  # 0.32, 0.64, 1.28, 2.56, 5.12 channels
    encoder, decoder = ([layer[1:3] for layer in _layers(part)] for part in (network.encoder, network.decoder))
    assert encoder == [(3, 1), (1, 1), (1, 1), (1, 3), (3, 5), (5, 5), (5, 5)]
    assert decoder == [(5, 3), (3, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 3)]


@pytest.mark.parametrize("build", [Paper28Autoencoder, Paper32Autoencoder])
def test_a_width_of_one_changes_no_weight_and_others_are_checked(build):
    states = []
    for arguments in ({}, {"width": 1.0}):
        torch.manual_seed(0)
        states.append(build(3, **arguments).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for width in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="width must be finite and > 0"):
            build(width=width)
    with pytest.raises(TypeError, match="width must be a real number, got '1'"):
        build(width="1")


def test_dense_default_is_the_authors_network():
    network = DenseAutoencoder()
    assert _layers(network.encoder) == [("Linear", 274, 256), ("Linear", 256, 128), ("Linear", 128, 16)]
    assert _layers(network.decoder) == [("Linear", 16, 128), ("Linear", 128, 256), ("Linear", 256, 274)]
    kinds = [type(m).__name__ for m in network.encoder]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_own_modules_that_do_not_meet():
    with pytest.raises(ValueError, match=r"encoder does not accept samples of shape \(9,\)"):
        Autoencoder(nn.Linear(8, 2), nn.Linear(2, 8), input_shape=(9,))
    with pytest.raises(ValueError, match=r"decoder does not accept samples of shape \(2,\)"):
        Autoencoder(nn.Linear(8, 2), nn.Linear(3, 8), input_shape=(8,))
    with pytest.raises(ValueError, match=r"decoder must return samples of the input's shape \(8,\), got \(7,\)"):
        Autoencoder(nn.Linear(8, 2), nn.Linear(2, 7), input_shape=(8,))
    with pytest.raises(TypeError, match=r"decoder must be a torch\.nn\.Module, got function"):
        Autoencoder(nn.Linear(8, 2), lambda z: z)


def test_trying_the_modules_leaves_no_trace():
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(encoder.state_dict())
    Autoencoder(encoder, nn.Linear(4, 4), input_shape=(4,))
    assert encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_size": 7}, ValueError, "image_size must be at least 8"),
        ({"image_size": (28, 4)}, ValueError, "image_size must be at least 8"),
        ({"image_size": "28"}, TypeError, "image_size must be an integer or a pair"),
        ({"image_size": (28.0, 28)}, TypeError, r"image_size\[0\] must be an integer"),
        ({"image_size": 28, "in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"image_size": 28, "latent_dim": 0}, ValueError, "latent_dim must be at least 1, got 0"),
        ({"image_size": 28, "width": 1.5}, TypeError, "width must be an integer"),
    ],
)
def test_bad_conv_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvAutoencoder(**arguments)


def test_a_batch_of_one_trains_where_batch_norm_would_refuse_it():
    network = Paper32Autoencoder(4)
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(x)
    with batch_norm_fits(network, 1):
        network(x)
    assert all(m.training for m in network.modules())


def test_modes_are_put_back_each_to_its_own():
    network = DenseAutoencoder(4, (4,), 2)
    network.encoder.eval()
    with evaluating(network):
        assert not network.decoder.training
    assert network.decoder.training
    assert not network.encoder.training


def test_an_iterator_is_no_list_of_layers():
    """It would be empty for the second network that is built from it."""
    with pytest.raises(TypeError, match="hidden_sizes must be a sequence of integers, got <generator"):
        DenseAutoencoder(6, (size for size in (8, 4)), 2)
    assert DenseAutoencoder(6, range(4, 6), 2).arguments["hidden_sizes"] == [4, 5]
