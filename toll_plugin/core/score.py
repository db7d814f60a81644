"""The score as a module of a network's model: the units of both terms, and the weight of the latent term."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_option
from toll_plugin.core.objective import ScoreTerm, TollTerms, in_units, toll_score, typical_terms

__all__ = ["TermUnits", "TollScore"]


class TermUnits(nn.Module):
    r"""The units in which a model's two terms are added, kept with its weights: 1 until :meth:`measure` sets them.

    Attributes:
        reconstruction_unit: Of the first term, a scalar; it is part of the state, as a buffer.
        latent_unit: Of the second, the same.

    Example:
        >>> import torch
        >>> units, terms = TermUnits(), TollTerms(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([1.0, 2.0, 2.0]))
        >>> units.measure(terms)
        >>> units.units
        TollTerms(reconstruction=tensor(4.), latent=tensor(2.))
    """

    reconstruction_unit: Tensor
    latent_unit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reconstruction_unit", torch.ones(()))
        self.register_buffer("latent_unit", torch.ones(()))

    @property
    def units(self) -> TollTerms[Tensor]:
        """Both units."""
        return TollTerms(self.reconstruction_unit, self.latent_unit)

    @torch.no_grad()
    def measure(self, terms: TollTerms[Tensor] | None) -> None:
        """Set the units to the medians of the terms of normal samples; with ``None``, to 1."""
        found = TollTerms(1.0, 1.0) if terms is None else typical_terms(terms)
        for unit, value in zip(self.units, found, strict=True):
            unit.fill_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Files from before there were units have none, and mean 1.
        for name, unit in self.named_buffers():
            state_dict.setdefault(prefix + name, torch.ones_like(unit))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class TollScore(TermUnits):
    r"""Anomaly score :math:`\|r_i\|^p / u + w \|z_i\|^p / v` from the terms of samples.

    With the units 1 and 1 and beta as the weight this is the paper's score, to the last bit. The units that
    :meth:`measure` sets are the medians of both terms on normal samples: then ``w`` is not tied to the scale of
    the data, and need not be the weight that training had.

    Args:
        weight: ``w``, at least 0.
        term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"`` alone, in its unit.

    Attributes:
        reconstruction_unit: ``u``, a scalar; it is part of the state, as a buffer.
        latent_unit: ``v``, the same.

    Shape:
        Terms and scores of any one shape.

    Raises:
        TypeError: If ``weight`` is no number.
        ValueError: If it is negative or not finite, or ``term`` is unknown.

    Source:
        arXiv 2306.12627, section 3; the units are this package's.

    Example:
        >>> import torch
        >>> score, terms = TollScore(0.5), TollTerms(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([1.0, 2.0, 2.0]))
        >>> score(terms)
        tensor([ 2.5000,  5.0000, 10.0000])
        >>> score.measure(terms)  # the medians are 4 and 2
        >>> score(terms)
        tensor([0.7500, 1.5000, 2.7500])
    """

    def __init__(self, weight: float, term: ScoreTerm = "total") -> None:
        super().__init__()
        check_option("score_term", term, get_args(ScoreTerm))
        self.weight, self.term = check_finite_float("score_weight", weight, minimum=0), term

    @property
    def has_latent(self) -> bool:
        """Whether the latent term has a part in the score."""
        return self.term == "latent" or (self.term == "total" and self.weight > 0)

    def forward(self, terms: TollTerms[Tensor]) -> Tensor:
        """Score of each sample."""
        return toll_score(in_units(terms, self.units), beta=self.weight, term=self.term)

    def extra_repr(self) -> str:
        """Arguments as the constructor takes them."""
        return f"{self.weight:g}, {self.term!r}"
