"""Metrics of scores that are not in [0, 1], and one decision on them for all processes."""

from __future__ import annotations

import torch
from anomalib.metrics import F1AdaptiveThreshold
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

__all__ = ["ScoreThreshold", "gathered", "updated_anywhere"]


class ScoreThreshold(F1AdaptiveThreshold):
    """anomalib's threshold of the best F1, on scores as they are and without anomalies as well.

    Without anomalies it is the largest score, as in anomalib, but without its warning that anomalies should be
    found. With anomalies it lies halfway between the best F1's score and the next lower one, because anomalib
    flags what is above the threshold, and would not flag that score itself.

    Args:
        field: The batch's field of scores, ``"pred_score"`` or ``"anomaly_map"``.
        target: Its field of labels, ``"gt_label"`` or ``"gt_mask"``. Batches without it are left out.

    Attributes:
        held_out: Scores that the last threshold is the largest of; 0 where there were anomalies.
    """

    def __init__(self, field: str, target: str) -> None:
        super().__init__(fields=[field, target], strict=False, normalization=None)
        self.held_out = 0

    def compute(self) -> Tensor:
        """The threshold, a scalar."""
        preds, self.held_out = dim_zero_cat(self.preds), 0
        if not (dim_zero_cat(self.target) == 1).any():
            self.value: Tensor = preds.max()
            self.held_out = preds.numel()
            return self.value
        threshold: Tensor = super().compute()
        lower = preds[preds < threshold]
        return (threshold + lower.max()) / 2 if len(lower) else threshold - 1


def gathered(values: Tensor) -> Tensor:
    """The rows of all processes, shape ``(N, *)``, N the sum of what each has, which may be none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    return torch.cat(gather_all_tensors(values.contiguous()))


def updated_anywhere(*metrics: Metric) -> list[bool]:
    """Whether each of the metrics has been updated in any process.

    Computing a metric waits for all processes, so either all of them compute it or none does. Where an update
    depends on the data, as with masks, each process alone would not know: all have to ask this together.
    """
    updated = [metric.update_called for metric in metrics]
    if not (distributed.is_available() and distributed.is_initialized()):
        return updated
    anywhere = torch.tensor(updated, dtype=torch.int32, device=metrics[0].device)
    distributed.all_reduce(anywhere, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in anywhere.tolist()]
