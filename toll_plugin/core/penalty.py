"""Targeted collapse for other people's networks: the latent norm as a term for their loss and their score.

The latent is what one of their layers returns. Its norm, that of :func:`toll_plugin.core.toll_terms`, is added to
the loss as a mean, and to the score per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toll_plugin.core.checks import check_finite_float, check_option
from toll_plugin.core.layers import LayerPass, find_layer, only_pass, watch_layer
from toll_plugin.core.objective import SCORE_WEIGHT, Beta, TollTerms, check_beta, norm_per_sample, relative_pressure

__all__ = ["Pool", "TargetedCollapse", "WatchedLatent", "latent_norm"]

Pool = Literal["flatten", "mean", "max"]


def latent_norm(latent: Tensor, *, pool: Pool = "flatten", exponent: int = 1) -> Tensor:
    r"""Norm of each sample's latent, :math:`\|z_i\|^p`, for vectors, maps and tokens.

    Args:
        latent: Vectors ``(N, C)``, maps ``(N, C, H, W)`` (any number of spatial axes but one), or
            tokens ``(N, L, C)``.
        pool: ``"flatten"`` (default) takes the norm over everything, as the paper does for
            vectors; ``"mean"`` and ``"max"`` take it over the channels of each position and
            reduce the positions, which does not grow with the size of the image.
        exponent: ``p``, 1 or 2.

    Returns:
        Shape ``(N,)``, at least in single precision.

    Raises:
        ValueError: If ``pool`` is unknown, ``exponent`` neither 1 nor 2, or ``latent`` has no
            second axis.

    Example:
        >>> import torch
        >>> z = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]])  # one map, two channels, two positions
        >>> latent_norm(z), latent_norm(z, pool="mean"), latent_norm(z, pool="max")
        (tensor([5.]), tensor([2.5000]), tensor([5.]))
    """
    check_option("pool", pool, get_args(Pool))
    check_option("exponent", exponent, (1, 2))
    if latent.ndim < 2:
        msg = f"latent must have shape (N, ...), got {tuple(latent.shape)}"
        raise ValueError(msg)
    norms: Tensor
    if pool == "flatten" or latent.ndim == 2:
        norms = norm_per_sample(latent, exponent)
        return norms
    positions = (latent if latent.ndim == 3 else latent.movedim(1, -1)).flatten(1, -2)
    norms = norm_per_sample(positions.flatten(0, 1), exponent).unflatten(0, positions.shape[:2])
    return norms.mean(dim=1) if pool == "mean" else norms.amax(dim=1)


class WatchedLatent:
    """The latent of a network that runs within a block of :meth:`TargetedCollapse.watch`."""

    def __init__(
        self,
        collapse: TargetedCollapse,
        passes: list[LayerPass],
        latent_of: Callable[[Sequence[LayerPass]], Tensor],
    ) -> None:
        self.passes = passes
        self._collapse = collapse
        self._latent_of = latent_of

    @property
    def latent(self) -> Tensor:
        """The latent of the step, ``(N, ...)``."""
        return self._latent_of(self.passes)

    def loss(self, normal: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Weighted mean norm of the normal samples; see :meth:`TargetedCollapse.loss`.

        Raises:
            RuntimeError: If nothing that is trained makes the latent, so that the term pulls nothing.
        """
        latent = self.latent
        self._collapse._check_trained(latent)
        return self._collapse.loss(latent, normal, reference)

    def score(self) -> Tensor:
        """Weighted norm per sample; see :meth:`TargetedCollapse.score`."""
        return self._collapse.score(self.latent)


class TargetedCollapse:
    r"""Targeted collapse for a network of yours: :math:`w\|z_i\|^p`, of a latent named by its layer.

    Adding the mean to the loss and the norm to the score of a plain autoencoder gives Toll.

    Args:
        layer: Dotted path of the submodule whose output is the latent.
        weight: ``w`` in the loss, in units of the loss per unit of the latent, at least 0; or ``"auto"``: in each
            step the weight that :func:`toll_plugin.core.relative_pressure` gives, so that the term is as large as
            the loss it joins. Default 0.1.
        strength: Of ``"auto"``: how many times as large. Default 1.
        score_weight: ``w`` in the score, where losses and scores have different units. Default:
            ``weight``; with ``"auto"`` 0.5, of terms that are :func:`toll_plugin.core.in_units`.
        pool: How a map becomes one norm, see :func:`latent_norm`. Default ``"flatten"``.
        exponent: ``p``, 1 (default, the authors' code) or 2.
        prefix: Of the parameter names in errors, for callers whose parameters have one.

    Raises:
        TypeError: If a weight is no number, nor ``"auto"``, or ``layer`` no string.
        ValueError: If a weight is negative or not finite, or an option is unknown.

    Source:
        The latent term of arXiv 2306.12627, section 3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4))
        >>> collapse = TargetedCollapse("0", weight=0.1)
        >>> x = torch.ones(8, 4)
        >>> with collapse.watch(network) as latent:
        ...     loss = (network(x) - x).square().mean()
        >>> (loss + latent.loss()).backward()
        >>> latent.score().shape
        torch.Size([8])
    """

    def __init__(
        self,
        layer: str,
        weight: Beta = 0.1,
        *,
        strength: float = 1.0,
        score_weight: float | None = None,
        pool: Pool = "flatten",
        exponent: int = 1,
        prefix: str = "",
    ) -> None:
        if not isinstance(layer, str):
            msg = f"{prefix}layer must be the dotted path of a submodule, got {layer!r}"
            raise TypeError(msg)
        check_option(f"{prefix}pool", pool, get_args(Pool))
        check_option(f"{prefix}exponent", exponent, (1, 2))
        self.layer = layer
        self.weight = check_beta(f"{prefix}weight", weight)
        self.strength = check_finite_float(f"{prefix}strength", strength, minimum=0)
        own = (SCORE_WEIGHT if self.weight == "auto" else self.weight) if score_weight is None else score_weight
        self.score_weight = check_finite_float(f"{prefix}score_weight", own, minimum=0)
        self.pool = pool
        self.exponent = int(exponent)

    def __repr__(self) -> str:
        weight = f"'auto', strength={self.strength:g}" if self.weight == "auto" else f"{self.weight:g}"
        return (
            f"TargetedCollapse({self.layer!r}, {weight}, score_weight={self.score_weight:g}, "
            f"pool={self.pool!r}, exponent={self.exponent})"
        )

    def find(self, owner: object) -> nn.Module:
        """The layer below ``owner``; see :func:`find_layer`."""
        return find_layer(owner, self.layer)

    def norms(self, latent: Tensor) -> Tensor:
        """Unweighted norm per sample, see :func:`latent_norm`."""
        return latent_norm(latent, pool=self.pool, exponent=self.exponent)

    @property
    def is_off(self) -> bool:
        """Whether the loss stays as it is."""
        return self.weight == 0 or (self.weight == "auto" and self.strength == 0)

    def loss(self, latent: Tensor, normal: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        r"""Weighted mean norm, :math:`w \cdot \mathrm{mean}_i \|z_i\|^p`, a scalar to add to a mean loss.

        Args:
            latent: Shape ``(N, ...)``.
            normal: Which samples count, booleans ``(N,)``: the method must not pull anomalies,
                synthetic ones neither, to the centre. Default: all. Where none does, the result
                is zero.
            reference: The loss that the term joins, a scalar; needed by ``"auto"``. Its absolute value counts,
                because the losses of some hosts are negative; where it is 0, so is the term.

        Raises:
            ValueError: If ``normal`` does not have one entry per sample, or ``reference`` is missing.
        """
        if self.weight != "auto":
            return self._weighted_mean(latent, normal, self.weight)
        if reference is None:
            msg = "weight='auto' needs the loss that the term joins, as reference, got None"
            raise ValueError(msg)
        mean = self._weighted_mean(latent, normal, 1.0)
        weight: Tensor = relative_pressure(TollTerms(reference.detach().abs(), mean), self.strength)
        return weight * mean

    def _weighted_mean(self, latent: Tensor, normal: Tensor | None, weight: float) -> Tensor:
        """Mean norm of the samples that count, times ``weight``."""
        if normal is None:
            norms = self.norms(latent)
            return weight * (norms.mean() if len(norms) else norms.sum())
        if normal.shape != latent.shape[:1]:
            msg = f"normal must have shape {tuple(latent.shape[:1])}, one entry per sample, got {tuple(normal.shape)}"
            raise ValueError(msg)
        counts = normal.to(latent.device, torch.bool)
        # Zeroed before the norm, so that an anomaly that overflows spoils no gradient; to select samples by a mask
        # would wait for the device.
        kept = torch.where(counts.view(-1, *[1] * (latent.ndim - 1)), latent, 0)
        return weight * self.norms(kept).sum() / counts.sum().clamp_min(1)

    def score(self, latent: Tensor) -> Tensor:
        """Weighted norm per sample, ``(N,)``, to add to a score."""
        return self.score_weight * self.norms(latent)

    def pull(self, latent: Tensor) -> None:
        """Let the next backward pass through ``latent`` also follow the gradient of :meth:`loss`.

        For training loops that keep their loss to themselves: the weights move as if the term
        had been added to a loss that reaches ``latent``. The size of such a loss is not known, so ``"auto"``
        makes the gradient that is added as long as the one that is there, times ``strength``.

        Raises:
            RuntimeError: If nothing that is trained makes the latent.
        """
        self._check_trained(latent)
        with torch.enable_grad():
            leaf = latent.detach().requires_grad_()
            own = self._weighted_mean(leaf, None, 1.0 if self.weight == "auto" else self.weight)
            (slope,) = torch.autograd.grad(own, leaf)

        def add(gradient: Tensor) -> Tensor:
            handle.remove()
            if self.weight != "auto":
                return gradient + slope
            lengths = TollTerms(*(torch.linalg.vector_norm(g) for g in (gradient, slope)))
            weight: Tensor = relative_pressure(lengths, self.strength)
            return gradient + weight * slope

        handle: RemovableHandle = latent.register_hook(add)  # type: ignore[no-untyped-call]

    def _check_trained(self, latent: Tensor) -> None:
        if torch.is_grad_enabled() and not latent.requires_grad:
            msg = f"nothing that is trained makes the latent, the output of layer {self.layer!r}"
            raise RuntimeError(msg)

    @contextmanager
    def watch(
        self,
        owner: object,
        latent_of: Callable[[Sequence[LayerPass]], Tensor] = only_pass,
    ) -> Iterator[WatchedLatent]:
        """Note what the layer returns, until the block ends.

        Args:
            owner: What ``layer`` is looked up in.
            latent_of: Makes one latent of the calls of the layer. Default: there must be one
                call, whose output it is.

        Yields:
            The latent, with :meth:`WatchedLatent.loss` and :meth:`WatchedLatent.score`.

        Raises:
            ValueError: If there is no such layer.
        """
        with watch_layer(owner, self.layer) as passes:
            yield WatchedLatent(self, passes, latent_of)
