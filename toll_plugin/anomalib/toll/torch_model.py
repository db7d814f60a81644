"""Toll's torch model: from scaled images to the loss's terms in training, to scores and anomaly maps after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torchvision.tv_tensors import TVTensor

from toll_plugin.core.networks import Autoencoder, ConvAutoencoder, check_input
from toll_plugin.core.objective import ScoreTerm, TollLoss, TollTerms
from toll_plugin.core.paper_networks import Paper28Autoencoder, Paper32Autoencoder
from toll_plugin.core.score import TollScore

__all__ = ["NetworkName", "Reconstruction", "TollModel", "build_network", "check_finite", "plain"]

NetworkName = Literal["conv", "paper28", "paper32"]


def build_network(
    name: NetworkName,
    encoder: nn.Module | None,
    decoder: nn.Module | None,
    input_shape: tuple[int, int, int],
    latent_dim: int,
    seed: int | None,
) -> nn.Module:
    """The network that the arguments of :class:`toll_plugin.anomalib.Toll` describe.

    Raises:
        ValueError: If the modules do not fit each other or the input, or the authors' network is
            asked for with another input than its own.
    """
    if (encoder is None) != (decoder is None):
        missing = "decoder" if decoder is None else "encoder"
        msg = f"encoder and decoder must be given together, {missing} is missing"
        raise ValueError(msg)
    if encoder is not None and decoder is not None:
        return Autoencoder(encoder, decoder, input_shape=input_shape)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        if name == "conv":
            return ConvAutoencoder(input_shape[1:], input_shape[0], latent_dim)
        paper = (Paper28Autoencoder if name == "paper28" else Paper32Autoencoder)(latent_dim)
    if paper.input_shape != input_shape:
        msg = (
            f"network={name!r} takes (in_channels, height, width) = {paper.input_shape}, "
            f"got in_channels={input_shape[0]} and image_size={input_shape[1:]}"
        )
        raise ValueError(msg)
    return paper


class Reconstruction(NamedTuple):
    """What a network made of a batch of N images.

    Attributes:
        x: What the network was shown, shape ``(N, C, H, W)``.
        x_hat: What its decoder returned, the same shape.
        terms: The loss's two terms of each image, shape ``(N,)``.
    """

    x: Tensor
    x_hat: Tensor
    terms: TollTerms[Tensor]


class TollModel(nn.Module):
    r"""An autoencoder, the objective it is trained with, and the score and map it gives.

    Args:
        network: Module that returns ``(reconstruction, latent)``, with an ``input_shape``
            ``(C, H, W)``; with one channel, images of three are averaged first.
        loss: The objective; its per-sample value is the score, unless the next or the units say otherwise.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"``.
        score_weight: Of the latent in the score, at least 0. Default: beta, or the strength if beta is ``"auto"``.

    Attributes:
        score: The :class:`toll_plugin.core.TollScore`, with the units of both terms: 1 until they are measured.

    Shape:
        Images ``(N, 3, H, W)``, already scaled. In training mode :class:`TollTerms` of shape
        ``(N,)``; in evaluation mode an ``InferenceBatch`` with ``pred_score`` ``(N,)`` and
        ``anomaly_map`` ``(N, 1, H, W)``, the residual's norm over the channels. The latent has
        no place in the image, so its term enters the score only:
        :math:`\text{score} = \|\text{map}\| + \beta\|z\|` at exponent 1. The map is in the same unit as the
        reconstruction term.

    Raises:
        ValueError: If images have another size or channel count than the network takes, or, in evaluation
            mode, are not finite. In training mode an image that is not finite has a reconstruction term that
            is not finite: looking at the pixels first would make each step wait for the device, see
            :meth:`Toll.training_step`.

    Example:
        >>> import torch
        >>> from toll_plugin.core import ConvAutoencoder, TollLoss
        >>> model = TollModel(ConvAutoencoder(16), TollLoss()).eval()
        >>> batch = model(torch.rand(2, 3, 16, 16))
        >>> batch.pred_score.shape, batch.anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 16, 16]))
    """

    def __init__(
        self,
        network: nn.Module,
        loss: TollLoss,
        score_term: ScoreTerm = "total",
        score_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.score = TollScore(loss.weight if score_weight is None else score_weight, score_term)

    def forward(self, images: Tensor, names: Sequence[str] | None = None) -> TollTerms[Tensor] | InferenceBatch:
        """:meth:`reconstruct`, then the terms in training mode or :meth:`predict` in evaluation mode."""
        found = self.reconstruct(images, names)
        return found.terms if self.training else self.predict(found)

    def reconstruct(self, images: Tensor, names: Sequence[str] | None = None) -> Reconstruction:
        """Show images to the network; ``names``, one per image, are for error messages."""
        x = self._as_input(images, names)
        x_hat, latent = self.network(x)
        return Reconstruction(x, x_hat, self.loss.terms(x, x_hat, latent))

    def predict(self, found: Reconstruction) -> InferenceBatch:
        """Score and anomaly map from what :meth:`reconstruct` returned."""
        residual = (found.x - found.x_hat).square().sum(dim=1, keepdim=True).sqrt()
        unit = self.score.reconstruction_unit  # of the term, which is a square where the exponent is 2
        anomaly_map = residual / (unit if self.loss.exponent == 1 else unit.sqrt())
        return InferenceBatch(pred_score=self.score(found.terms), anomaly_map=anomaly_map)

    def _as_input(self, images: Tensor, names: Sequence[str] | None) -> Tensor:
        x = plain(images)
        shape = getattr(self.network, "input_shape", None)
        if shape is not None and shape[0] == 1 and x.shape[1] == 3:
            x = x.mean(dim=1, keepdim=True)
        if not torch.compiler.is_compiling():
            check_input(self.network, x)
            if not self.training:
                check_finite(x, names)
        return x


def plain(images: Tensor) -> Tensor:
    """``images`` as a plain tensor, which is faster: every operation on a ``TVTensor`` passes through Python."""
    return images.as_subclass(Tensor) if isinstance(images, TVTensor) else images


def check_finite(images: Tensor, names: Sequence[str] | None) -> None:
    """Refuse a batch in which an image has a NaN or infinite pixel. Waits for the images' device.

    Raises:
        ValueError: If there is one; it says which, by name or by position in the batch.
    """
    if not bool(images.isfinite().all()):
        bad = [i for i, image in enumerate(images) if not bool(image.isfinite().all())]
        which = f"sample(s) {bad} of the batch" if names is None else ", ".join(names[i] for i in bad)
        msg = f"images must be finite, got NaN or infinite pixels in: {which}"
        raise ValueError(msg)
