"""The torch model: images in, per-sample terms or a score and an anomaly map out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torchvision.tv_tensors import TVTensor

from toll_plugin.core.networks import check_input
from toll_plugin.core.objective import ScoreTerm, TollLoss, TollTerms

__all__ = ["TollModel"]


class TollModel(nn.Module):
    r"""An autoencoder, the objective it is trained with, and the score and map it gives.

    Args:
        network: Module that returns ``(reconstruction, latent)``, with an ``input_shape``
            ``(C, H, W)``; with one channel, images of three are averaged first.
        loss: The objective; its per-sample value is the score.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"``.

    Shape:
        Images ``(N, 3, H, W)``, already scaled. In training mode :class:`TollTerms` of shape
        ``(N,)``; in evaluation mode an ``InferenceBatch`` with ``pred_score`` ``(N,)`` and
        ``anomaly_map`` ``(N, 1, H, W)``, the residual's norm over the channels. The latent has
        no place in the image, so its term enters the score only:
        :math:`\text{score} = \|\text{map}\| + \beta\|z\|` at exponent 1.

    Raises:
        ValueError: If images have another size or channel count, or are not finite.

    Example:
        >>> import torch
        >>> from toll_plugin.core import ConvAutoencoder, TollLoss
        >>> model = TollModel(ConvAutoencoder(16), TollLoss()).eval()
        >>> batch = model(torch.rand(2, 3, 16, 16))
        >>> batch.pred_score.shape, batch.anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 16, 16]))
    """

    def __init__(self, network: nn.Module, loss: TollLoss, score_term: ScoreTerm = "total") -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.score_term = score_term

    def forward(self, images: Tensor, names: Sequence[str] | None = None) -> TollTerms | InferenceBatch:
        """Terms in training mode, predictions in evaluation mode; ``names`` are for error messages."""
        x, reconstruction, terms = self.reconstruct(images, names)
        return terms if self.training else self.predict(x, reconstruction, terms)

    def reconstruct(self, images: Tensor, names: Sequence[str] | None = None) -> tuple[Tensor, Tensor, TollTerms]:
        """What the network was shown, what it made of it, and the terms of both."""
        x = self._as_input(images, names)
        reconstruction, latent = self.network(x)
        return x, reconstruction, self.loss.terms(x, reconstruction, latent)

    def predict(self, x: Tensor, reconstruction: Tensor, terms: TollTerms) -> InferenceBatch:
        """Score and anomaly map from what :meth:`reconstruct` returned."""
        residual = (x - reconstruction).square().sum(dim=1, keepdim=True).sqrt()
        return InferenceBatch(pred_score=self.loss.score(terms, self.score_term), anomaly_map=residual)

    def _as_input(self, images: Tensor, names: Sequence[str] | None) -> Tensor:
        # tv_tensors dispatch every operation through Python; the network needs a plain tensor.
        x = images.as_subclass(Tensor) if isinstance(images, TVTensor) else images
        shape = getattr(self.network, "input_shape", None)
        if shape is not None and shape[0] == 1 and x.shape[1] == 3:
            x = x.mean(dim=1, keepdim=True)
        if not torch.compiler.is_compiling():
            check_input(self.network, x)
            if not bool(x.isfinite().all()):
                bad = [i for i, sample in enumerate(x) if not bool(sample.isfinite().all())]
                which = f"sample(s) {bad} of the batch" if names is None else ", ".join(names[i] for i in bad)
                msg = f"images must be finite, got NaN or infinite pixels in: {which}"
                raise ValueError(msg)
        return x
