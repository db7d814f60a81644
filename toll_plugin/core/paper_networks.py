"""The authors' two image networks, layer for layer.

Their network for tables is :class:`toll_plugin.core.networks.DenseAutoencoder` at its defaults. ``width`` makes
networks of the same layout with fewer or more channels, which are not the authors' and cost less or more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.core.networks import Autoencoder

__all__ = ["Paper28Autoencoder", "Paper32Autoencoder"]


def scaled_sizes(width: float, *sizes: int) -> tuple[int, ...]:
    """Hidden sizes times ``width``, rounded to the nearest integer and at least 1.

    Raises:
        TypeError: If ``width`` is no real number.
        ValueError: If it is not finite or not above 0.

    Example:
        >>> scaled_sizes(0.25, 64, 50, 1)
        (16, 12, 1)
    """
    check_finite_float("width", width, minimum=0, exclusive=True)
    return tuple(max(1, round(width * size)) for size in sizes)


def _blocks(*layers: nn.Conv2d | nn.ConvTranspose2d, slope: float) -> list[nn.Module]:
    """Follow each convolution by BatchNorm and LeakyReLU."""
    blocks: list[nn.Module] = []
    for layer in layers:
        blocks += [layer, nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU(slope)]
    return blocks


class Paper28Autoencoder(Autoencoder):
    """The authors' network for 28x28 grey images (MNIST, Fashion-MNIST), 6.8 M parameters.

    Five 4x4 convolutions 1-64-128-256-512-64, the third with stride 2, a linear layer to the
    latent, mirrored transposed convolutions; BatchNorm and LeakyReLU(0.2) between.

    Args:
        latent_dim: Length of the latent. The authors use 128 (MNIST, default) and 256
            (Fashion-MNIST).
        width: What all hidden channel counts are multiplied by; each is rounded and at least 1. The latent's length
            stays. Default 1, the authors' network.

    Raises:
        TypeError: If ``latent_dim`` is no integer, or ``width`` no real number.
        ValueError: If ``latent_dim`` is below 1, or ``width`` is not finite or not above 0.

    Source:
        arXiv 2306.12627, appendix, and the authors' code.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in Paper28Autoencoder()(torch.zeros(2, 1, 28, 28))]
        [(2, 1, 28, 28), (2, 128)]
        >>> sum(p.numel() for p in Paper28Autoencoder(width=0.25).parameters())
        477489
    """

    def __init__(self, latent_dim: int = 128, width: float = 1.0) -> None:
        check_integer("latent_dim", latent_dim, minimum=1)
        c1, c2, c3, c4, c5 = scaled_sizes(width, 64, 128, 256, 512, 64)
        encoder = [
            *_blocks(
                nn.Conv2d(1, c1, 4),
                nn.Conv2d(c1, c2, 4),
                nn.Conv2d(c2, c3, 4, stride=2),
                nn.Conv2d(c3, c4, 4),
                slope=0.2,
            ),
            nn.Conv2d(c4, c5, 4),
            nn.Flatten(),
            nn.Linear(c5 * 4 * 4, latent_dim),
        ]
        decoder = [
            nn.Linear(latent_dim, c5 * 4 * 4),
            nn.Unflatten(1, (c5, 4, 4)),
            *_blocks(
                nn.ConvTranspose2d(c5, c4, 4),
                nn.ConvTranspose2d(c4, c3, 4),
                nn.ConvTranspose2d(c3, c2, 4, stride=2),
                nn.ConvTranspose2d(c2, c1, 4),
                slope=0.2,
            ),
            nn.ConvTranspose2d(c1, 1, 4),
        ]
        super().__init__(nn.Sequential(*encoder), nn.Sequential(*decoder))
        self.input_shape = (1, 28, 28)


class _OutputBias(nn.Module):
    """A learned bias for each pixel of the reconstruction."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Paper32Autoencoder(Autoencoder):
    """The authors' network for 32x32 colour images (CIFAR-10, CIFAR-100), 5.6 M parameters.

    Convolutions 5x5 3-32, 4x4 32-64 (stride 2), 4x4 64-128, 4x4 128-256 (stride 2), 4x4
    256-512, 1x1 512-512, 1x1 to the latent; transposed convolutions 256-128-64-32-32 back,
    then two 1x1 convolutions and a learned bias per pixel. No biases except the latent's,
    BatchNorm and LeakyReLU(0.1) between.

    Args:
        latent_dim: Length of the latent. Default 64, the authors' value.
        width: What all hidden channel counts are multiplied by; each is rounded and at least 1. The latent's length
            stays. Default 1, the authors' network.

    Raises:
        TypeError: If ``latent_dim`` is no integer, or ``width`` no real number.
        ValueError: If ``latent_dim`` is below 1, or ``width`` is not finite or not above 0.

    Source:
        arXiv 2306.12627, appendix, and the authors' code.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in Paper32Autoencoder()(torch.zeros(2, 3, 32, 32))]
        [(2, 3, 32, 32), (2, 64)]
    """

    def __init__(self, latent_dim: int = 64, width: float = 1.0) -> None:
        check_integer("latent_dim", latent_dim, minimum=1)
        c1, c2, c3, c4, c5 = scaled_sizes(width, 32, 64, 128, 256, 512)
        encoder = [
            *_blocks(
                nn.Conv2d(3, c1, 5, bias=False),
                nn.Conv2d(c1, c2, 4, stride=2, bias=False),
                nn.Conv2d(c2, c3, 4, bias=False),
                nn.Conv2d(c3, c4, 4, stride=2, bias=False),
                nn.Conv2d(c4, c5, 4, bias=False),
                nn.Conv2d(c5, c5, 1, bias=False),
                slope=0.1,
            ),
            nn.Conv2d(c5, latent_dim, 1),
            nn.Flatten(),
        ]
        decoder = [
            nn.Unflatten(1, (latent_dim, 1, 1)),
            *_blocks(
                nn.ConvTranspose2d(latent_dim, c4, 4, bias=False),
                nn.ConvTranspose2d(c4, c3, 4, stride=2, bias=False),
                nn.ConvTranspose2d(c3, c2, 4, bias=False),
                nn.ConvTranspose2d(c2, c1, 4, stride=2, bias=False),
                nn.ConvTranspose2d(c1, c1, 5, bias=False),
                nn.Conv2d(c1, c1, 1, bias=False),
                slope=0.1,
            ),
            nn.Conv2d(c1, 3, 1, bias=False),
            _OutputBias(3, 32, 32),
        ]
        super().__init__(nn.Sequential(*encoder), nn.Sequential(*decoder))
        self.input_shape = (3, 32, 32)
