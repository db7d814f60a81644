"""The authors' two image networks, layer for layer.

Their network for tables is :class:`toll_plugin.core.networks.DenseAutoencoder` at its defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_integer
from toll_plugin.core.networks import Autoencoder

__all__ = ["Paper28Autoencoder", "Paper32Autoencoder"]


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

    Source:
        arXiv 2306.12627, appendix, and the authors' code.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in Paper28Autoencoder()(torch.zeros(2, 1, 28, 28))]
        [(2, 1, 28, 28), (2, 128)]
    """

    def __init__(self, latent_dim: int = 128) -> None:
        check_integer("latent_dim", latent_dim, minimum=1)
        encoder = [
            *_blocks(
                nn.Conv2d(1, 64, 4),
                nn.Conv2d(64, 128, 4),
                nn.Conv2d(128, 256, 4, stride=2),
                nn.Conv2d(256, 512, 4),
                slope=0.2,
            ),
            nn.Conv2d(512, 64, 4),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, latent_dim),
        ]
        decoder = [
            nn.Linear(latent_dim, 64 * 4 * 4),
            nn.Unflatten(1, (64, 4, 4)),
            *_blocks(
                nn.ConvTranspose2d(64, 512, 4),
                nn.ConvTranspose2d(512, 256, 4),
                nn.ConvTranspose2d(256, 128, 4, stride=2),
                nn.ConvTranspose2d(128, 64, 4),
                slope=0.2,
            ),
            nn.ConvTranspose2d(64, 1, 4),
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

    Source:
        arXiv 2306.12627, appendix, and the authors' code.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in Paper32Autoencoder()(torch.zeros(2, 3, 32, 32))]
        [(2, 3, 32, 32), (2, 64)]
    """

    def __init__(self, latent_dim: int = 64) -> None:
        check_integer("latent_dim", latent_dim, minimum=1)
        encoder = [
            *_blocks(
                nn.Conv2d(3, 32, 5, bias=False),
                nn.Conv2d(32, 64, 4, stride=2, bias=False),
                nn.Conv2d(64, 128, 4, bias=False),
                nn.Conv2d(128, 256, 4, stride=2, bias=False),
                nn.Conv2d(256, 512, 4, bias=False),
                nn.Conv2d(512, 512, 1, bias=False),
                slope=0.1,
            ),
            nn.Conv2d(512, latent_dim, 1),
            nn.Flatten(),
        ]
        decoder = [
            nn.Unflatten(1, (latent_dim, 1, 1)),
            *_blocks(
                nn.ConvTranspose2d(latent_dim, 256, 4, bias=False),
                nn.ConvTranspose2d(256, 128, 4, stride=2, bias=False),
                nn.ConvTranspose2d(128, 64, 4, bias=False),
                nn.ConvTranspose2d(64, 32, 4, stride=2, bias=False),
                nn.ConvTranspose2d(32, 32, 5, bias=False),
                nn.Conv2d(32, 32, 1, bias=False),
                slope=0.1,
            ),
            nn.Conv2d(32, 3, 1, bias=False),
            _OutputBias(3, 32, 32),
        ]
        super().__init__(nn.Sequential(*encoder), nn.Sequential(*decoder))
        self.input_shape = (3, 32, 32)
