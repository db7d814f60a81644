"""Thresholds and normalisation that suit unbounded scores and normal-only validation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import Batch, ImageBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from sklearn.exceptions import NotFittedError
from torch import Tensor
from torchmetrics import MaxMetric

from toll_plugin.anomalib.metrics import ScoreThreshold, updated_anywhere
from toll_plugin.core.checks import check_finite_float

__all__ = ["QuantilePostProcessor", "TollPostProcessor"]


class TollPostProcessor(PostProcessor):
    r"""anomalib's post-processor, with three differences.

    - Thresholds are found on the scores themselves. anomalib's squeeze scores outside [0, 1]
      through a sigmoid first, after which a threshold on a score of 60 is 1. With normal or
      unlabelled images only, the threshold is the largest of their scores; with anomalies, it is
      anomalib's best F1, taken halfway to the next lower score so that it flags what it should.
    - Normalisation keeps the ranking: with the threshold :math:`t` and the range :math:`r` of
      the validation scores, :math:`\frac12(1 + \frac{u}{1 + |u|})`, :math:`u = 2(s - t)/r`. It
      has anomalib's value and slope at the threshold (0.5), and no ties where anomalib clips
      to 0 and 1.
    - Without masks, the pixel threshold is the largest map value of a normal validation image;
      anomalib would put the image threshold, which has another unit, on the map.

    Example:
        >>> import torch
        >>> TollPostProcessor()._normalize(*map(torch.tensor, (9.0, 1.0, 3.0, 3.0)))
        tensor(0.9286)
    """

    def __init__(self, **kwargs: Any) -> None:
        # Score and map have different units, so neither threshold can stand in for the other.
        super().__init__(**{"enable_threshold_matching": False} | kwargs)
        self._image_threshold_metric = ScoreThreshold("pred_score", "gt_label")
        self._pixel_threshold_metric = ScoreThreshold("anomaly_map", "gt_mask")
        self._normal_pixel_max = MaxMetric()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Collect what thresholds and normalisation are made from."""
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if self.enable_thresholding and outputs.gt_label is None:
            normal = torch.zeros(len(outputs.image), dtype=torch.int64, device=outputs.image.device)
            unlabelled = ImageBatch(image=outputs.image, pred_score=outputs.pred_score, gt_label=normal)
            self._image_threshold_metric.update(unlabelled)
        if outputs.anomaly_map is None:
            return
        maps = outputs.anomaly_map.as_subclass(Tensor)
        if outputs.gt_label is not None:
            maps = maps[outputs.gt_label == 0]
        if len(maps):
            self._normal_pixel_max.update(maps.amax())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute thresholds and ranges, the same in all processes."""
        has_masks, has_normals = updated_anywhere(self._pixel_threshold_metric, self._normal_pixel_max)
        if has_masks and not self._pixel_threshold_metric.update_called:
            self._pixel_threshold_metric.update(_no_pixels(self._pixel_threshold.device))
        super().on_validation_epoch_end(trainer, pl_module)
        if self.enable_thresholding and not has_masks and has_normals:
            self._pixel_threshold.copy_(self._normal_pixel_max.compute())
        self._normal_pixel_max.reset()

    @staticmethod
    def _normalize(
        preds: Tensor | None,
        norm_min: Tensor,
        norm_max: Tensor,
        threshold: Tensor,
    ) -> Tensor | None:
        if preds is None:
            return None
        threshold = torch.where(threshold.isnan(), (norm_max + norm_min) / 2, threshold)
        value_range = norm_max - norm_min
        # One validation image, or a constant score: any unit will do, and 1 is the score's own.
        distance = 2 * (preds - threshold) / torch.where(value_range > 0, value_range, torch.ones_like(value_range))
        normalised = 0.5 * (1 + distance / (1 + distance.abs()))
        return torch.where(norm_min.isnan() | norm_max.isnan(), preds, normalised)


def _no_pixels(device: torch.device) -> SimpleNamespace:
    """A batch for a process without masks of its own, of the kinds that the others exchange."""
    return SimpleNamespace(
        anomaly_map=torch.empty(0, device=device), gt_mask=torch.empty(0, dtype=torch.bool, device=device)
    )


class QuantilePostProcessor(TollPostProcessor):
    r"""Thresholds from held-out normal images alone, for a chosen rate of false alarms.

    Of n held-out scores the threshold is the :math:`\lceil (n + 1) q \rceil`-th smallest, or the
    largest if there are not that many: then the chance that a further normal image is flagged is at
    most 1 - q (and at least 1 - q - 1/(n + 1)) where n is large enough for q, whatever the scores'
    distribution. The validation split changes nothing: the model has to call :meth:`calibrate`, as
    PatchToll does.

    Args:
        quantile: q, the share of normal images that should not be flagged, in (0, 1]. With 1 the
            threshold is the largest held-out score. Default 0.99, for which n has to be 99.
        **kwargs: As for anomalib's post-processor.

    Raises:
        TypeError: If ``quantile`` is no number.
        ValueError: If it is not in (0, 1].
        NotFittedError: If a model that has not calibrated it is validated, tested or asked to predict.

    Source:
        The split conformal quantile, e.g. arXiv 2107.07511, section 1.

    Example:
        >>> import torch
        >>> post_processor = QuantilePostProcessor(0.9)
        >>> post_processor.calibrate(torch.arange(1.0, 20.0)[:, None, None, None])
        >>> post_processor.image_threshold
        tensor(18.)
    """

    def __init__(self, quantile: float = 0.99, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantile = check_finite_float("quantile", quantile, minimum=0, exclusive=True)
        if self.quantile > 1:
            msg = f"quantile must be in (0, 1], got {quantile!r}"
            raise ValueError(msg)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "quantile")

    def calibrate(self, maps: Tensor) -> None:
        """Set thresholds and ranges from the anomaly maps ``(N, 1, H, W)`` of N held-out normal images.

        A score has to be its map's maximum, so map and score have one threshold and one range.

        Raises:
            ValueError: If there are no maps, or they are not finite.
        """
        if len(maps) == 0 or not bool(maps.isfinite().all()):
            msg = f"maps must be those of at least one image and finite, got shape {tuple(maps.shape)}"
            raise ValueError(msg)
        scores = maps.flatten(1).amax(dim=1).sort().values
        rank = min(max(math.ceil((len(scores) + 1) * self.quantile - 1e-9), 1), len(scores))
        for threshold, low, high in (
            (self._image_threshold, self.image_min, self.image_max),
            (self._pixel_threshold, self.pixel_min, self.pixel_max),
        ):
            threshold.copy_(scores[rank - 1])
            low.copy_(maps.min())
            high.copy_(scores[-1])

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is learnt from the validation split."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is learnt from the validation split."""
        if not trainer.sanity_checking:
            self._check_is_calibrated(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a threshold every image would be flagged."""
        super().on_test_start(trainer, pl_module)
        self._check_is_calibrated(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a threshold every image would be flagged."""
        super().on_predict_start(trainer, pl_module)
        self._check_is_calibrated(pl_module)

    def _check_is_calibrated(self, model: LightningModule) -> None:
        if bool(self._image_threshold.isnan()):
            name = type(model).__name__
            msg = f"QuantilePostProcessor has no threshold: {name} is not fitted yet, or never calls calibrate"
            raise NotFittedError(msg)
