"""Autoencoders: ``x -> (reconstruction, latent)``.

:class:`Autoencoder` joins any encoder and decoder a user brings, :class:`ConvAutoencoder` fits
any image size, :class:`DenseAutoencoder` any table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_image_size, check_integer, check_share
from toll_plugin.core.modes import evaluating

__all__ = ["Autoencoder", "ConvAutoencoder", "DenseAutoencoder", "blocks", "check_input"]


class Autoencoder(nn.Module):
    """An encoder and a decoder of the user's own.

    Args:
        encoder: Module that maps ``(N, *input_shape)`` to a latent ``(N, *)``.
        decoder: Module that maps the latent back to ``(N, *input_shape)``.
        input_shape: Shape of one sample; if given, both modules are tried on a sample of zeros.

    Raises:
        TypeError: If one of them is no :class:`torch.nn.Module`.
        ValueError: If ``input_shape`` is given and the shapes do not meet.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = Autoencoder(nn.Linear(8, 2), nn.Linear(2, 8), input_shape=(8,))
        >>> [tuple(t.shape) for t in net(torch.zeros(5, 8))]
        [(5, 8), (5, 2)]
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, input_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                msg = f"{name} must be a torch.nn.Module, got {type(module).__name__}"
                raise TypeError(msg)
        self.encoder = encoder
        self.decoder = decoder
        self.input_shape = None if input_shape is None else tuple(input_shape)
        if self.input_shape is not None:
            self._try(self.input_shape)

    def _try(self, input_shape: tuple[int, ...]) -> None:
        like = next(self.parameters(), torch.empty(0))
        x = torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
        with evaluating(self), torch.no_grad():
            stage, shape = "encoder", tuple(x.shape[1:])
            try:
                latent = self.encoder(x)
                stage, shape = "decoder", tuple(latent.shape[1:])
                reconstruction = self.decoder(latent)
            except RuntimeError as error:
                msg = f"{stage} does not accept samples of shape {shape}: {error}"
                raise ValueError(msg) from error
        if reconstruction.shape != x.shape:
            msg = (
                f"decoder must return samples of the input's shape {input_shape}, "
                f"got {tuple(reconstruction.shape[1:])} from latents of shape {shape}"
            )
            raise ValueError(msg)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(reconstruction, latent)``; the latent is flattened to ``(N, latent_dim)``."""
        latent = self.encoder(x)
        return self.decoder(latent), latent.flatten(1)


class ConvAutoencoder(Autoencoder):
    r"""Convolutional autoencoder for images of any size from 8 pixels, square or not.

    Stride-2 convolutions (4x4, BatchNorm, LeakyReLU 0.2) halve the image until its shorter
    side would fall below 4, so the depth is :math:`\lfloor\log_2(\min(H, W) / 4)\rfloor`;
    channels double from ``width`` up to ``max_width``. Images below 16 pixels, which are halved
    once, get a 3x3 convolution at full resolution before it. A linear layer makes the latent,
    and mirrored transposed convolutions restore the exact size.

    Args:
        image_size: ``(height, width)`` in pixels, or one integer; each at least 8.
        in_channels: Image channels. Default 1.
        latent_dim: Length of the latent. Default 32.
        width: Channels of the first stage. Default 32.
        max_width: Cap on the doubling. Default 256.

    Shape:
        ``(N, in_channels, H, W)`` to the same, and a latent ``(N, latent_dim)``.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If it is too small.

    Example:
        >>> import torch
        >>> net = ConvAutoencoder((24, 33), in_channels=3, latent_dim=16)
        >>> [tuple(t.shape) for t in net(torch.zeros(2, 3, 24, 33))]
        [(2, 3, 24, 33), (2, 16)]
    """

    min_size = 8

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int = 1,
        latent_dim: int = 32,
        width: int = 32,
        max_width: int = 256,
    ) -> None:
        height, breadth = check_image_size("image_size", image_size)
        if min(height, breadth) < self.min_size:
            msg = f"image_size must be at least {self.min_size} pixels on each side, got {(height, breadth)}"
            raise ValueError(msg)
        channels = [check_integer("in_channels", in_channels, minimum=1)]
        check_integer("latent_dim", latent_dim, minimum=1)
        check_integer("width", width, minimum=1)
        check_integer("max_width", max_width, minimum=width)

        sizes = [(height, breadth)]
        while min(sizes[-1]) >= 8:
            sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
            channels.append(min(width * 2 ** (len(channels) - 1), max_width))

        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        if len(sizes) == 2:
            channels[0] = width
            encoder = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), *_activation(width)]
            decoder = [*_activation(width), nn.Conv2d(width, in_channels, 3, padding=1)]
        for (outer, inner), size in zip(pairwise(channels), sizes, strict=False):
            encoder += [nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=False), *_activation(inner)]
            # Stride 2 drops the last row or column of an odd size; output_padding restores it.
            odd = (size[0] % 2, size[1] % 2)
            restore = nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1, output_padding=odd, bias=not decoder)
            decoder = [*_activation(inner), restore, *decoder]
        grid = (channels[-1], *sizes[-1])
        flat = grid[0] * grid[1] * grid[2]
        encoder += [nn.Flatten(), nn.Linear(flat, latent_dim)]
        decoder = [nn.Linear(latent_dim, flat, bias=False), nn.Unflatten(1, grid), *decoder]
        super().__init__(nn.Sequential(*encoder), nn.Sequential(*decoder))
        self.input_shape = (in_channels, height, breadth)


def _activation(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]


class DenseAutoencoder(Autoencoder):
    """Fully connected autoencoder for tables; the default is the authors' 274-256-128-16.

    Args:
        n_features: Columns of the table. Default 274 (Arrhythmia).
        hidden_sizes: Layer widths from the input to the latent. Default (256, 128).
        latent_dim: Length of the latent. Default 16.
        batch_norm: Whether a BatchNorm stands before each ReLU. Default True; without it a large
            beta shrinks every weight to zero.
        dropout: Probability of dropping a hidden unit in training, in [0, 1). Default 0.
        generator: Source of the initial weights, which are then single precision whatever torch's
            default; by default the global one.

    Shape:
        ``(N, n_features)`` to the same, and a latent ``(N, latent_dim)``.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If a size is below 1, or ``dropout`` is not in [0, 1).

    Source:
        arXiv 2306.12627, appendix, and the authors' code: BatchNorm and ReLU between.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in DenseAutoencoder()(torch.zeros(2, 274))]
        [(2, 274), (2, 16)]
    """

    def __init__(
        self,
        n_features: int = 274,
        hidden_sizes: Sequence[int] = (256, 128),
        latent_dim: int = 16,
        *,
        batch_norm: bool = True,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_integer("n_features", n_features, minimum=1)
        check_integer("latent_dim", latent_dim, minimum=1)
        # An iterator would be empty the second time that a network is built from it.
        if isinstance(hidden_sizes, str | Iterator) or not isinstance(hidden_sizes, Iterable):
            msg = f"hidden_sizes must be a sequence of integers, got {hidden_sizes!r}"
            raise TypeError(msg)
        hidden_sizes = [check_integer(f"hidden_sizes[{i}]", size, minimum=1) for i, size in enumerate(hidden_sizes)]
        dropout = check_share("dropout", dropout, below_one=True)
        widths = [n_features, *hidden_sizes, latent_dim]
        super().__init__(*(_dense(sizes, batch_norm, dropout, generator) for sizes in (widths, widths[::-1])))
        self.input_shape = (n_features,)
        #: What a network of the same shape is made with.
        self.arguments: dict[str, Any] = {
            "n_features": int(n_features),
            "hidden_sizes": hidden_sizes,
            "latent_dim": int(latent_dim),
            "batch_norm": bool(batch_norm),
            "dropout": dropout,
        }


def _dense(widths: Sequence[int], batch_norm: bool, dropout: float, generator: torch.Generator | None) -> nn.Sequential:
    dtype = None if generator is None else torch.float32
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.BatchNorm1d(before, dtype=dtype)] if batch_norm else []
            layers += [nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(_linear(before, after, generator))
    return nn.Sequential(*layers)


def _linear(before: int, after: int, generator: torch.Generator | None) -> nn.Linear:
    if generator is None:
        return nn.Linear(before, after)
    # Its constructor would draw from the global generator, and torch's way around that takes longer than a tenth of a
    # small fit.
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = before, after
    bound = before**-0.5  # the distribution that the constructor draws
    for name, shape in (("weight", (after, before)), ("bias", (after,))):
        values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        setattr(layer, name, nn.Parameter(values))
    return layer


def blocks(stack: nn.Module) -> list[list[nn.Module]]:
    """The modules of a dense stack, cut before every linear layer."""
    cut: list[list[nn.Module]] = []
    for module in stack.children():
        if isinstance(module, nn.Linear):
            cut.append([])
        cut[-1].append(module)
    return cut


def check_input(network: nn.Module, x: Tensor) -> None:
    """Refuse a batch whose samples are not what ``network`` was built for.

    Raises:
        ValueError: If the shape of one sample differs from ``network.input_shape``.
    """
    expected = getattr(network, "input_shape", None)
    if expected is not None and tuple(x.shape[1:]) != expected:
        msg = f"input must have shape (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
        raise ValueError(msg)
