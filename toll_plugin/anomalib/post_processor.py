"""Thresholds and normalisation that suit unbounded scores and normal-only validation."""

from __future__ import annotations

import logging
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
from toll_plugin.core.checks import check_share
from toll_plugin.core.guarantee import images_needed, promised_rate, threshold_rank

__all__ = ["QuantilePostProcessor", "TollPostProcessor"]

_logger = logging.getLogger(__name__)

#: Of the rate that is stated, where none was asked for.
_CONFIDENCE = 0.95


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

    Attributes:
        promise: Where held-out normal images alone gave the image threshold: their number, ``held_out``; the
            ``quantile`` and the ``confidence`` that were asked for, or 0.95; and ``false_alarms``, the rate at which
            further normal images are flagged at most, at that confidence (see :func:`toll_plugin.core.promised_rate`,
            which takes them to be like the held-out ones, and a sensitivity of 0.5). Else empty. Checkpoints and
            exports keep it, ONNX and OpenVINO in their metadata, by names that begin with ``toll_``.

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
        self.promise: dict[str, float] = {}

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "promise")

    def _promise(self, held_out: int, rank: int, confidence: float, **asked: float) -> None:
        rate = promised_rate(held_out, rank, confidence)
        self.promise = {"held_out": held_out, "confidence": confidence, "false_alarms": rate, **asked}

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
        decided = self.enable_thresholding and self._image_threshold_metric.update_called
        super().on_validation_epoch_end(trainer, pl_module)
        if self.enable_thresholding and not has_masks and has_normals:
            self._pixel_threshold.copy_(self._normal_pixel_max.compute())
        self._normal_pixel_max.reset()
        if decided:
            self.promise = {}
            if held_out := self._image_threshold_metric.held_out:
                self._promise(held_out, held_out, _CONFIDENCE)

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
    distribution. That is an average over draws of the held-out images; some draws have a higher rate.
    With a ``confidence`` the threshold is the least score for which the rate is at most 1 - q in that
    share of draws: for 0.95 the largest of 59 images for one false alarm in twenty, of 299 for one in
    a hundred. A log message of each fit says what n images promise, and ``promise`` keeps it. The
    validation split changes nothing: the model has to call :meth:`calibrate`, as PatchToll does.

    Args:
        quantile: q, the share of normal images that should not be flagged, in (0, 1]. With 1 the
            threshold is the largest held-out score. Default 0.99, for which n has to be 99.
        confidence: Share of draws in which the rate is kept, in (0, 1). Default ``None``: on average over draws.
        **kwargs: As for anomalib's post-processor.

    Raises:
        TypeError: If ``quantile`` or ``confidence`` is no number.
        ValueError: If ``quantile`` is not in (0, 1], or ``confidence`` not in (0, 1).
        NotFittedError: If a model that has not calibrated it is validated, tested or asked to predict.

    Source:
        The split conformal quantile, e.g. arXiv 2107.07511, section 1; tolerance limits, Wilks (1941).

    Example:
        >>> import torch
        >>> post_processor = QuantilePostProcessor(0.9)
        >>> post_processor.calibrate(torch.arange(1.0, 20.0)[:, None, None, None])
        >>> post_processor.image_threshold
        tensor(18.)
        >>> round(post_processor.promise["false_alarms"], 3)  # of 19 images, at a confidence of 0.95
        0.226
    """

    def __init__(self, quantile: float = 0.99, confidence: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantile = check_share("quantile", quantile, above_zero=True)
        self.confidence = confidence
        if confidence is not None:
            self.confidence = check_share("confidence", confidence, above_zero=True, below_one=True)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "quantile", "confidence")

    def calibrate(self, maps: Tensor, scores: Tensor | None = None, *, independent: bool = True) -> None:
        """Set thresholds and ranges from the predictions for N held-out normal images.

        Args:
            maps: Their anomaly maps, ``(N, 1, H, W)``. The pixel threshold is for the map's maximum: at most 1 - q
                of the images have a pixel that is flagged.
            scores: Their scores, ``(N,)``. Default: the maxima of the maps; then map and score have one threshold
                and one range.
            independent: False if several are of one image, augmented: then nothing is promised.

        Raises:
            ValueError: If there are no maps, or as many scores as maps are not there, or one is not finite.
        """
        if len(maps) == 0 or not bool(maps.isfinite().all()):
            msg = f"maps must be those of at least one image and finite, got shape {tuple(maps.shape)}"
            raise ValueError(msg)
        highest = maps.flatten(1).amax(dim=1)
        if scores is not None and (scores.shape != highest.shape or not bool(scores.isfinite().all())):
            msg = f"scores must be finite, one for each of {len(maps)} maps, got shape {tuple(scores.shape)}"
            raise ValueError(msg)
        rank = threshold_rank(len(maps), self.quantile, self.confidence)
        lowest = maps.min() if scores is None else scores.min()
        of_image = highest if scores is None else scores
        for threshold, low, high, values, least in (
            (self._image_threshold, self.image_min, self.image_max, of_image, lowest),
            (self._pixel_threshold, self.pixel_min, self.pixel_max, highest, maps.min()),
        ):
            threshold.copy_(values.sort().values[rank - 1])
            low.copy_(least)
            high.copy_(values.max())
        self.promise = {}
        if independent:
            self._promise(len(maps), rank, self.confidence or _CONFIDENCE, quantile=self.quantile)
            self._say()

    def _say(self) -> None:
        """What the held-out images promise, and whether it is what was asked for."""
        n, confidence, rate = (self.promise[name] for name in ("held_out", "confidence", "false_alarms"))
        needed = images_needed(self.quantile, self.confidence) if self.quantile < 1 else 0
        few = f", too few for quantile {self.quantile:g}, which takes {needed}" if n < needed else ""
        say = _logger.warning if few else _logger.info
        message = "%d held-out images%s: with %g %% confidence at most %.2g %% of further normal images are flagged"
        say(message, n, few, 100 * confidence, 100 * rate)

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
