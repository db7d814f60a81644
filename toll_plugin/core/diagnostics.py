"""Name the method's failure signatures on held-out data, and what to do about them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toll_plugin.core.objective import TollTerms

__all__ = ["CollapseMonitor", "Finding", "TollWarning", "warn"]

Signature = Literal["predicts_mean", "constant_latent", "latent_does_not_separate"]

_ADVICE: dict[Signature, str] = {
    "predicts_mean": (
        "lower beta (or its strength, where it is 'auto'), train longer, or raise latent_dim or the learning rate"
    ),
    "constant_latent": (
        "lower beta (or its strength, where it is 'auto'), or keep a BatchNorm behind the latent so that its scale "
        "stays free"
    ),
    "latent_does_not_separate": (
        "lower beta (or its strength, where it is 'auto') or stop earlier, or score by the reconstruction alone if "
        "beta 0 ranks as well"
    ),
}


class TollWarning(UserWarning):
    """A fit ended in a state that is known to detect badly."""


@dataclass(frozen=True)
class Finding:
    """One failure signature that was met.

    Attributes:
        signature: ``"predicts_mean"``, ``"constant_latent"`` or ``"latent_does_not_separate"``.
        value: The measured number.
        message: What was measured, against which bound, and what to do.
    """

    signature: Signature
    value: float
    message: str


class CollapseMonitor:
    r"""Collect held-out batches, then look for three signatures of failure.

    ================================ ================================================= =========
    signature                        measured                                          met if
    ================================ ================================================= =========
    ``predicts_mean``                residual sum of squares over that of the mean     >= 0.95
    ``constant_latent``              standard deviation of ‖z‖ over its mean           < 1e-3
    ``latent_does_not_separate``     AUROC of ‖z‖ alone, anomalies against normals     < 0.55
    ================================ ================================================= =========

    The first two need at least two normal samples, the third two of each kind. A diverging
    loss, the fourth signature, stops the fit instead
    (:class:`toll_plugin.core.DivergenceError`).

    Example:
        >>> import torch
        >>> from toll_plugin.core import toll_terms
        >>> x = torch.linspace(-1, 1, 100)[:, None]
        >>> monitor = CollapseMonitor()
        >>> monitor.update(x, toll_terms(x, torch.zeros(100, 1), 0.1 * x))
        >>> [finding.signature for finding in monitor.findings()]
        ['predicts_mean']
    """

    max_unexplained = 0.95
    min_variation = 1e-3
    min_separation = 0.55

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | None = None
        self._spread = 0.0
        self._residual = 0.0
        self._normal: list[Tensor] = []
        self._anomalous: list[Tensor] = []

    @torch.no_grad()
    def update(
        self, x: Tensor, terms: TollTerms[Tensor], anomalous: Tensor | None = None, *, exponent: int = 1
    ) -> None:
        """Add a batch.

        Args:
            x: What the network was asked to reconstruct, shape ``(N, *)``.
            terms: The batch's terms.
            anomalous: Shape ``(N,)``, true for anomalies; by default all are normal.
            exponent: The exponent that ``terms`` were made with.
        """
        # Some devices have no double precision.
        reconstruction, latent = (term.cpu().double() ** (1 / exponent) for term in terms)
        normal = torch.ones(len(x), dtype=torch.bool) if anomalous is None else ~anomalous.cpu().bool()
        self._anomalous.append(latent[~normal])
        if not normal.any():
            return
        self._normal.append(latent[normal])
        self._residual += float(reconstruction[normal].square().sum())
        # Pooled mean and spread (Chan et al.): a plain sum of squares cancels for bright images.
        batch = x.cpu()[normal].double()
        mean, count = batch.mean(dim=0), len(batch)
        spread = float((batch - mean).square().sum())
        if self._mean is None:
            self._mean, self._spread, self._count = mean, spread, count
            return
        delta, total = mean - self._mean, self._count + count
        self._spread += spread + float(delta.square().sum()) * self._count * count / total
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def findings(self) -> list[Finding]:
        """Signatures met by what was collected so far."""
        found: list[Finding] = []

        def check(signature: Signature, value: float, met: bool, what: str) -> None:
            if met:
                found.append(Finding(signature, value, f"{signature}: {what}; {_ADVICE[signature]}"))

        normal = torch.cat(self._normal) if self._normal else torch.empty(0)
        anomalous = torch.cat(self._anomalous) if self._anomalous else torch.empty(0)
        if self._count >= 2 and self._spread > 0:
            unexplained = self._residual / (self._spread * self._count / (self._count - 1))
            check(
                "predicts_mean",
                unexplained,
                unexplained >= self.max_unexplained,
                f"the reconstruction leaves {unexplained:.2f} of the held-out variance unexplained "
                f"(predicting the mean leaves 1, a fit should leave less than {self.max_unexplained})",
            )
        if len(normal) >= 2:
            mean = float(normal.mean())
            variation = float(normal.std()) / mean if mean > 0 else 0.0
            check(
                "constant_latent",
                variation,
                variation < self.min_variation,
                f"the latent norm is the same for every held-out sample (mean {mean:.3g}, relative "
                f"spread {variation:.1g}), so it carries no information",
            )
        if len(normal) >= 2 and len(anomalous) >= 2:
            auroc = _auroc(normal, anomalous)
            check(
                "latent_does_not_separate",
                auroc,
                auroc < self.min_separation,
                f"the latent norm ranks anomalies above normal samples with AUROC {auroc:.2f} only "
                f"(chance is 0.50, a fit should reach {self.min_separation})",
            )
        return found


def _auroc(normal: Tensor, anomalous: Tensor) -> float:
    order = normal.sort().values
    below = torch.searchsorted(order, anomalous, right=False) + torch.searchsorted(order, anomalous, right=True)
    return float(below.double().mean()) / (2 * len(normal))


def warn(findings: list[Finding]) -> None:
    """Issue one :class:`TollWarning` per finding, from the caller's line."""
    for finding in findings:
        warnings.warn(finding.message, TollWarning, stacklevel=2)
