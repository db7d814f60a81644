"""What the mixins for anomalib and PyOD share: the attributes that describe the term, and the term."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from toll_plugin.core.layers import LayerPass, only_pass
from toll_plugin.core.objective import Beta, check_beta
from toll_plugin.core.penalty import Pool, TargetedCollapse

__all__ = ["COLLAPSE_ARGUMENTS", "TargetedCollapseBase"]

#: The arguments that both mixins add to those of the host; attributes of the same names hold them.
COLLAPSE_ARGUMENTS = (
    "collapse_weight",
    "collapse_score_weight",
    "collapse_layer",
    "collapse_pool",
    "collapse_strength",
)


class TargetedCollapseBase:
    """Base class of both hosts' ``TargetedCollapseMixin``.

    The attributes are what users read and change (PyOD's ``set_params`` does), so :attr:`collapse` is
    always made of their present values. Class attributes are the defaults.
    """

    collapse_layer: str = ""
    collapse_weight: Beta = 0.1
    collapse_strength: float = 1.0
    collapse_score_weight: float | None = None
    collapse_pool: Pool = "flatten"

    @property
    def collapse(self) -> TargetedCollapse:
        """The term that the attributes describe.

        Raises:
            TypeError: If a weight is no number or ``collapse_layer`` no string.
            ValueError: If a weight is negative or not finite, or the pool is unknown.
        """
        score_weight = self.collapse_score_weight
        weight = check_beta("collapse_weight", self.collapse_weight)
        if score_weight is None and weight != "auto":
            score_weight = weight * self.collapse_score_factor()
        return TargetedCollapse(
            self.collapse_layer,
            self.collapse_weight,
            strength=self.collapse_strength,
            score_weight=score_weight,
            pool=self.collapse_pool,
            prefix="collapse_",
        )

    def collapse_score_factor(self) -> float:
        """Weight in the score over weight in the loss, where ``collapse_score_weight`` is ``None``.

        Override it for hosts whose score has another unit than their loss, as where one is a mean over the
        features and the other a sum.
        """
        return 1.0

    def collapse_latent(self, passes: Sequence[LayerPass], batch_size: int) -> Tensor:
        """The latent ``(N, ...)`` of a step, from the calls of the layer.

        Args:
            passes: One per call, in their order.
            batch_size: N.

        Raises:
            RuntimeError: Unless the layer was called once. Override this for hosts whose layer is
                called more often.
        """
        del batch_size
        return only_pass(passes)
