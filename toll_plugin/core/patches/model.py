"""Feature maps, position by position: one small autoencoder, terms and a score at each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_integer, check_option
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import ScoreTerm, TollLoss, TollTerms
from toll_plugin.core.rows import Rows, RowSubset
from toll_plugin.core.threads import fork_safe
from toll_plugin.core.training.fit import History, fit, fit_ensemble
from toll_plugin.core.training.optimizers import cosine_adam

__all__ = ["PatchAutoencoder", "PreparedRows", "enlarge", "fit_patches"]

#: Channels that hardly vary on normal images are not blown up beyond this share of the median
#: deviation of those that vary: of some backbones most channels are silent.
_SMALLEST_SCALE = 1e-3


class PatchAutoencoder(nn.Module):
    r"""Targeted collapse at each position of a feature map.

    The features :math:`f_p` of a position :math:`p` are standardised by the mean and deviation that
    normal images have over all positions, and where the network takes fewer numbers than there are
    channels, projected on their leading principal components: :math:`x_p = ((f_p - \mu) / \sigma) V`.
    The network makes :math:`(\hat x_p, z_p)` of them. So loss and score are those of
    :mod:`toll_plugin.core.objective` with a position in the place of a sample:
    :math:`s_p = \|x_p - \hat x_p\| + \beta\|z_p\|`.

    Args:
        network: Module that returns ``(reconstruction, latent)`` of rows ``(N, K)``, with an
            ``input_shape`` ``(K,)``.
        loss: The objective.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"``.
        channels: C, at least K. Default K, and nothing is projected.

    Attributes:
        mean: Subtracted from each channel, shape ``(C,)``; see :meth:`standardise_by`.
        scale: What it is divided by then.
        components: V, shape ``(C, K)``, or ``None`` if nothing is projected; see :meth:`project_on`.

    Shape:
        Feature maps ``(N, C, H, W)``; scores ``(N, 1, H, W)`` come out.

    Raises:
        TypeError: If ``channels`` is no integer.
        ValueError: If ``score_term`` is unknown, or ``channels`` below K.

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
        self, network: nn.Module, loss: TollLoss, score_term: ScoreTerm = "total", channels: int | None = None
    ) -> None:
        super().__init__()
        check_option("score_term", score_term, get_args(ScoreTerm))
        self.network, self.loss, self.score_term = network, loss, score_term
        width = int(network.input_shape[0])  # type: ignore[index]
        channels = width if channels is None else check_integer("channels", channels, minimum=width)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("components", torch.eye(channels, width) if width < channels else None)

    @torch.no_grad()
    def standardise_by(self, mean: Tensor, deviation: Tensor) -> None:
        """Set what features are standardised by; if none varies, they are only centred."""
        self.mean.copy_(mean)
        varying = deviation[deviation > 0]
        smallest = _SMALLEST_SCALE * float(varying.median()) if len(varying) else 1.0
        self.scale.copy_(deviation.clamp_min(max(smallest, 1e-12)))

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

    def project(self, rows: Tensor) -> Tensor:
        """Standardised rows ``(N, C)`` as the network sees them, ``(N, K)``."""
        return rows if self.components is None else rows @ self.components

    def terms(self, features: Tensor) -> TollTerms:
        """Terms of each position, each ``(N, H, W)``."""
        count, channels, height, width = features.shape
        rows = self.project(self.standardise(features.permute(0, 2, 3, 1).reshape(-1, channels)))
        found = self.loss.terms(rows, *self.network(rows))
        return TollTerms(*(term.view(count, height, width) for term in found))

    def score_of(self, terms: TollTerms) -> Tensor:
        """Score of each position ``(N, 1, H, W)`` from its terms."""
        return self.loss.score(terms, self.score_term)[:, None]

    def forward(self, features: Tensor) -> Tensor:
        """Score of each position."""
        return self.score_of(self.terms(features))


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
    rows, columns = (_enlarging(n, out, sigma, maps) for n, out in zip(maps.shape[-2:], size, strict=True))
    return rows @ maps @ columns.T


def _enlarging(n: int, out: int, sigma: float, like: Tensor) -> Tensor:
    """Matrix ``(out, n)`` of both steps; its rows add up to 1."""
    pixel = torch.arange(out, device=like.device, dtype=like.dtype)
    cell = torch.arange(n, device=like.device, dtype=like.dtype)
    centre = ((pixel + 0.5) * (n / out) - 0.5).clamp(0, n - 1)
    matrix = (1 - (centre[:, None] - cell).abs()).relu()
    if sigma > 0:
        gaussian = torch.exp(-((pixel[:, None] - pixel) ** 2) / (2 * sigma**2))
        matrix = gaussian / gaussian.sum(dim=1, keepdim=True) @ matrix
    return matrix


class PreparedRows:
    """Rows of features that are made what the network sees when they are fetched.

    Args:
        rows: Anything that gives raw rows for indices and slices.
        model: Which standardises and projects them, on its device.
        project: False only standardises them.
    """

    def __init__(self, rows: Rows, model: PatchAutoencoder, *, project: bool = True) -> None:
        self._rows, self._model, self._project = rows, model, project

    def __len__(self) -> int:
        """How many rows."""
        return len(self._rows)

    @torch.no_grad()
    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The rows at ``index``."""
        rows = self._model.standardise(self._rows[index].to(self._model.mean.device))
        return self._model.project(rows) if self._project else rows


def fit_patches(
    model: PatchAutoencoder,
    rows: Rows,
    validation: Rows,
    *,
    focus: float = 4.0,
    lr: float = 4e-3,
    batch_size: int = 512,
    max_steps: int = 1500,
    patience: int | None = 20,
    generator: torch.Generator,
    progress: bool = False,
    on_epoch: Callable[[int, list[History]], None] | None = None,
) -> History:
    r"""Set what ``model`` standardises by and projects on, and train its network in place, on rows of features.

    Most positions of most images show a background that is learnt in a few steps. So rows are drawn
    (with replacement, once) with a probability in proportion to :math:`\|x_p\|^f`, a power of their
    distance from the mean position; the same holds for the held-out loss and the principal
    components. The learning rate rises over a tenth of the steps and falls to zero along half a cosine.

    Args:
        model: With a :class:`DenseAutoencoder`, on the CPU trained by its written-out step.
        rows: Raw features of positions of normal images, at least one, ``(N, C)`` each.
        validation: The same of held-out images; the weights of the epoch with the lowest loss on
            them stay.
        focus: ``f``, at least 0. Default 4; 0 draws all positions alike.
        lr: Largest learning rate of Adam. Default 4e-3.
        batch_size: Positions per step. Default 512.
        max_steps: Steps. Default 1500.
        patience: Epochs without a lower held-out loss before training stops; ``None`` never stops.
        generator: Source of the order.
        progress: Show a bar.
        on_epoch: See :func:`toll_plugin.core.fit`.

    Returns:
        The :class:`History`.

    Raises:
        DivergenceError: If the loss stops being finite.
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range, or rows are none, not finite or of another width; the model
            then stays as it was.
    """
    check_finite_float("focus", focus, minimum=0)
    check_finite_float("lr", lr, minimum=0, exclusive=True)
    check_integer("max_steps", max_steps, minimum=1)
    check_integer("batch_size", batch_size, minimum=2)
    if patience is not None:
        check_integer("patience", patience, minimum=1)
    for name, given in (("rows", rows), ("validation", validation)):
        _check_rows(name, given, len(model.mean))
    with _kept_on_failure(model):
        model.standardise_by(*_statistics(rows))
        held_out = _drawn(validation, model, min(len(validation), _ENOUGH), focus, generator)
        order = _drawn(rows, model, len(rows), focus, generator)
        if model.components is not None:
            model.project_on(PreparedRows(rows, model, project=False)[order[:_ENOUGH]])
        arguments: dict[str, Any] = {
            "validation": PreparedRows(RowSubset(validation, held_out), model),
            "optimizer": cosine_adam(lr, max_steps),
            "batch_size": batch_size,
            "max_epochs": None,
            "max_steps": max_steps,
            "patience": patience,
            "generator": generator,
            "progress": progress,
            "on_epoch": on_epoch,
        }
        training_rows = PreparedRows(RowSubset(rows, order), model)
        with fork_safe():
            if isinstance(model.network, DenseAutoencoder) and model.mean.device.type == "cpu":
                return fit_ensemble([model.network], training_rows, model.loss, **arguments)[0]
            return fit(model.network, training_rows, model.loss, **arguments)


#: Rows that suffice to measure the held-out loss, and to find the principal components.
_ENOUGH = 20_000
#: Rows per pass over all.
_PIECE = 16_384
_TINY = 1e-12


def _check_rows(name: str, rows: Rows, channels: int) -> None:
    if len(rows) == 0:
        msg = f"{name} must hold at least one row, got none"
        raise ValueError(msg)
    for part in _pieces(rows):
        if part.shape[1:] != (channels,):
            msg = f"{name} must have shape (N, {channels}), got {(len(rows), *part.shape[1:])}"
            raise ValueError(msg)
        if not bool(part.isfinite().all()):
            msg = f"{name} must be finite, got NaN or infinity"
            raise ValueError(msg)


@contextmanager
def _kept_on_failure(model: PatchAutoencoder) -> Iterator[None]:
    """What ``model`` standardises by and projects on, with the weights that were trained on it."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        for buffer, before in kept:
            buffer.copy_(before)
        raise


def _drawn(rows: Rows, model: PatchAutoencoder, count: int, focus: float, generator: torch.Generator) -> Tensor:
    """Positions of ``count`` rows, drawn in proportion to a power of their distance from the mean."""
    weights = torch.cat([_norms(part) for part in _pieces(PreparedRows(rows, model, project=False))])
    upto = (weights / weights.max().clamp_min(_TINY)).pow(focus).add(_TINY).cumsum(0)
    index = torch.searchsorted(upto, torch.rand(count, generator=generator, dtype=torch.float64) * upto[-1])
    return index.clamp_max(len(rows) - 1)


def _pieces(rows: Rows) -> Iterator[Tensor]:
    return (rows[slice(start, start + _PIECE)] for start in range(0, len(rows), _PIECE))


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.cpu(), dim=1, dtype=torch.float64)
    return norms


def _statistics(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from the deviations from the first piece's mean."""
    origin = rows[slice(0, _PIECE)].double().mean(dim=0)
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for part in _pieces(rows):
        moved = part.double() - origin
        total += moved.sum(dim=0)
        squares += moved.square().sum(dim=0)
    mean = total / len(rows)
    return origin + mean, (squares / len(rows) - mean.square()).clamp_min(0).sqrt()
