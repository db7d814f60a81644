"""The model of feature maps: one small autoencoder at every position, and its scores enlarged to a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_integer
from toll_plugin.core.objective import ScoreTerm, TollLoss, TollTerms
from toll_plugin.core.resize import resize_matrix
from toll_plugin.core.score import TollScore

__all__ = ["PatchAutoencoder", "enlarge", "usable_scale"]

#: No channel is divided by less than this share of the median deviation of the channels that vary:
#: in some backbones most channels hardly vary on normal images, and would drown the others.
_SMALLEST_SCALE = 1e-3


class PatchAutoencoder(nn.Module):
    r"""Targeted collapse at each position of a feature map.

    The features :math:`f_p` of a position :math:`p` are standardised by the mean and deviation that
    normal images have over all positions, and where the network takes fewer numbers than there are
    channels, projected on their leading principal components: :math:`x_p = ((f_p - \mu) / \sigma) V`.
    The network makes :math:`(\hat x_p, z_p)` of them. So loss and score are those of
    :mod:`toll_plugin.core.objective` with a position in the place of a sample:
    :math:`s_p = \|x_p - \hat x_p\| + \beta\|z_p\|`. Both terms can have units of their own and the latent a weight
    of its own in the score, see :class:`TollScore`.

    Args:
        network: Module that returns ``(reconstruction, latent)`` of rows ``(N, K)``, with an
            ``input_shape`` ``(K,)``.
        loss: The objective.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"``.
        channels: C, at least K. Default K, and nothing is projected.
        score_weight: Of the latent in the score, at least 0. Default: beta, or the strength if beta is ``"auto"``.

    Attributes:
        mean: Subtracted from each channel, shape ``(C,)``; see :meth:`standardise_by`.
        scale: What it is divided by then.
        components: V, shape ``(C, K)``, or ``None`` if nothing is projected; see :meth:`project_on`.
        score: The :class:`TollScore`, whose units :func:`toll_plugin.core.fit_patches` sets.

    Shape:
        Feature maps ``(N, C, H, W)``; scores ``(N, 1, H, W)`` come out.

    Raises:
        TypeError: If ``channels`` is no integer, or ``score_weight`` no number.
        ValueError: If ``score_term`` is unknown, ``channels`` below K, or ``score_weight`` negative or not finite.

    Source:
        arXiv 2306.12627, section 3, applied to positions instead of samples.

    Example:
        >>> import torch
        >>> from toll_plugin.core import DenseAutoencoder, TollLoss
        >>> model = PatchAutoencoder(DenseAutoencoder(8, (16,), 4), TollLoss()).eval()
        >>> model(torch.rand(2, 8, 5, 6)).shape
        torch.Size([2, 1, 5, 6])
    """

    mean: Tensor
    scale: Tensor
    components: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        loss: TollLoss,
        score_term: ScoreTerm = "total",
        channels: int | None = None,
        score_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.score = TollScore(loss.weight if score_weight is None else score_weight, score_term)
        width = int(network.input_shape[0])  # type: ignore[index]
        channels = width if channels is None else check_integer("channels", channels, minimum=width)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("components", torch.eye(channels, width) if width < channels else None)

    @torch.no_grad()
    def standardise_by(self, mean: Tensor, deviation: Tensor) -> None:
        """Set what features are standardised by; if none varies, they are only centred."""
        self.mean.copy_(mean)
        self.scale.copy_(usable_scale(deviation))

    @torch.no_grad()
    def project_on(self, rows: Tensor) -> None:
        """Set the principal components to those of standardised rows ``(N, C)``, about their origin."""
        if self.components is not None:
            rows = rows.cpu().double()  # some devices have no double precision
            directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)
            self.components.copy_(directions[:, : self.components.shape[1]])

    def standardise(self, rows: Tensor) -> Tensor:
        """Rows of features ``(N, C)`` with each channel standardised."""
        return (rows - self.mean) / self.scale

    def prepare(self, rows: Tensor) -> Tensor:
        """Rows of features ``(N, C)`` as the network sees them, ``(N, K)``: standardised, then projected."""
        rows = self.standardise(rows)
        return rows if self.components is None else rows @ self.components

    def terms(self, features: Tensor) -> TollTerms[Tensor]:
        """Terms of each position, each ``(N, H, W)``."""
        count, channels, height, width = features.shape
        rows = self.prepare(features.permute(0, 2, 3, 1).reshape(-1, channels))
        found = self.loss.terms(rows, *self.network(rows))
        return TollTerms(*(term.view(count, height, width) for term in found))

    def score_of(self, terms: TollTerms[Tensor]) -> Tensor:
        """Score of each position ``(N, 1, H, W)`` from its terms."""
        scores: Tensor = self.score(terms)
        return scores[:, None]

    def forward(self, features: Tensor) -> Tensor:
        """Score of each position."""
        return self.score_of(self.terms(features))


def usable_scale(deviation: Tensor) -> Tensor:
    """Deviations to divide by, none below a thousandth of the median of those that vary; 1 where none does."""
    varying = deviation[deviation > 0]
    smallest = _SMALLEST_SCALE * float(varying.median()) if len(varying) else 1.0
    return deviation.clamp_min(max(smallest, 1e-12))


def enlarge(maps: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Bring maps to the size of an image: bilinear interpolation, then a Gaussian.

    Both act on rows and columns apart, so they are two small matrix products, which cost a
    fiftieth of a two-dimensional convolution and which every exporter knows.

    Args:
        maps: Shape ``(N, 1, h, w)``.
        size: ``(height, width)`` in pixels.
        sigma: Standard deviation of the Gaussian in pixels; 0 for none.

    Returns:
        Shape ``(N, 1, height, width)``; a constant map stays constant.

    Example:
        >>> import torch
        >>> enlarge(torch.tensor([[[[0.0, 4.0]]]]), (1, 4), 0.0)
        tensor([[[[0., 1., 3., 4.]]]])
    """
    sides = zip(maps.shape[-2:], size, strict=True)
    rows, columns = (_smoothed(resize_matrix(n, out, maps, antialias=False), sigma) for n, out in sides)
    return rows @ maps @ columns.T


def _smoothed(matrix: Tensor, sigma: float) -> Tensor:
    """A matrix ``(out, n)`` followed by a Gaussian over its outputs; its rows still add up to 1."""
    if sigma == 0:
        return matrix
    pixel = torch.arange(matrix.shape[0], device=matrix.device)
    # One exponential for each distance, not for each pair of pixels: half of the time of the whole enlargement.
    gaussian = torch.exp(pixel.to(matrix.dtype).square() / (-2 * sigma**2))[(pixel[:, None] - pixel).abs()]
    return gaussian / gaussian.sum(dim=1, keepdim=True) @ matrix
