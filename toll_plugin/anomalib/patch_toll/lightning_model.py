"""PatchToll: targeted collapse on the features of a pretrained backbone, as an anomalib model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components.base import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from toll_plugin.anomalib.base import TollModuleMixin, is_normal, size_for, size_of, validation_batches
from toll_plugin.anomalib.patch_toll.backbone import (
    build_backbone,
    check_layers,
    check_weights,
    load_backbone,
    scaling_of,
)
from toll_plugin.anomalib.patch_toll.torch_model import PatchTollModel
from toll_plugin.anomalib.post_processor import QuantilePostProcessor
from toll_plugin.anomalib.pre_processor import TollPreProcessor
from toll_plugin.core.checks import check_finite_float, check_integer, check_share
from toll_plugin.core.diagnostics import Finding, warn
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import Beta, ScoreScale, ScoreTerm, TollLoss, check_beta, check_score_weight
from toll_plugin.core.patches.fit import examine, fit_patches
from toll_plugin.core.patches.images import ImageFeatures
from toll_plugin.core.patches.model import PatchAutoencoder
from toll_plugin.core.patches.whole import ImageScore, ImageTerms, pooled, positions_of
from toll_plugin.core.training.fit import History

__all__ = ["PatchToll"]

_logger = logging.getLogger(__name__)

#: Share of the training images that is held out where the validation split has anomalies, or there is none.
_HELD_OUT = 0.2


class PatchToll(TollModuleMixin, AnomalibModule):
    r"""Targeted collapse on the features of a frozen pretrained backbone, position by position.

    One pass over the normal training images computes their features, which are kept, standardised and
    projected on their leading principal components. Then a small autoencoder learns them,
    :math:`\frac1P\sum_p \|x_p - \hat x_p\|^2 + \beta\|z_p\|^2` over positions p. The same sum at
    each position, enlarged and smoothed, is the anomaly map: no memory bank is searched. The score of an
    image adds two terms, each divided by its median over held-out normal images: the mean of the highest
    hundredth of the map, and what the principal components of normal images leave of the features of the
    whole image, averaged in 4 x 4 windows (see :class:`toll_plugin.core.ImageScore`).
    ``beta="auto"`` and ``score_scale="median"`` depart from the paper: they make loss and score free of the
    scale of the features.

    No anomaly is used in training. Held-out normal images choose the epoch and, by ``quantile``,
    the threshold: those of the validation split where all its images are normal, else a fifth of
    the training images. One image is enough to fit to; it then also gives the threshold, which is too low.
    What so many promise of the rate of false alarms is logged by each fit and kept in
    ``post_processor.promise``, in checkpoints and exports: with 95 % confidence at most 7 % of further
    normal images are flagged where 40 were held out, 5 % with 59, and with ``confidence=0.95`` 1 % with
    299. That takes held-out images for a fair sample of those to come; that they also chose the epoch is
    not accounted for.

    Args:
        backbone: Name of a timm network. Default ``"resnet18"``. The vision transformer to try is
            ``vit_small_patch14_dinov2.lvd142m``, with the blocks of its middle as ``layers``
            (``("blocks.5", "blocks.7", "blocks.9")``), an ``image_size`` that is a multiple of 14 and a
            ``stride`` of 14; it is tested, but what it detects has not been measured here.
        layers: Its layers, as timm names them. Default ``("layer1", "layer2", "layer3")``.
        weights_path: File of the backbone's weights, a state dict by ``torch.save`` or safetensors.
            Default: timm's pretrained ones, which it downloads when a fit begins.
        pre_trained: False trains on a random backbone, which detects little; then there must be no
            ``weights_path``. Default true.
        image_size: ``(height, width)`` in pixels the image is resized to, or one integer.
            Default: that of a ``pre_processor`` you pass, else 256. More detail needs more pixels.
        n_components: Principal components of the features that are kept, at most as many as the layers
            have channels. Default 192.
        hidden_size: Width of the hidden layer of encoder and decoder. Default 1024.
        latent_dim: Length of the latent of a position. Default 32.
        beta: Weight of the latent norm in the loss, at least 0, or ``"auto"``. A number is the paper's form;
            being tied to the scale of the data, it fades as training shrinks the latent. ``"auto"`` takes in each
            batch the weight that keeps the latent term at ``strength`` times the reconstruction term, see
            :class:`toll_plugin.core.TollLoss`; the held-out loss is then (1 + strength) times the reconstruction term.
            Default 1.
        strength: Of ``beta="auto"``: how many times as large as the reconstruction term the latent term is kept, at
            least 0; 0 trains as beta 0 does. Default 1.
        exponent: Of both norms, 1 or 2 (default).
        score_scale: ``"none"`` (default): the score adds the terms as they are, as in the paper. ``"median"``: each is
            first divided by its median over all positions of the held-out images. These units are kept in the model,
            in checkpoints and in exports, and map and threshold are in them. Then both terms are near 1 on normal
            positions, and the weight is not tied to the scale of the data.
        score_weight: Weight of the latent term in the score, at least 0. Default: beta, or 0.5 with ``"median"``.
            ``beta="auto"`` with ``"none"`` needs one, for it leaves no number to weigh by.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"`` alone, in the map and its part of the
            score.
        top_share: Share of the map's pixels, the highest, whose mean is the first term of an image's score, in
            [0, 1]. Default 0.01; 0 is the maximum.
        image_weight: Weight of the second term, at least 0. With 0, and a ``top_share`` of 0, an image is flagged
            exactly where one of its pixels is, and has the score of that pixel. Default 0.5.
        neighbourhood: Side of the average over neighbouring features, odd. Default 3.
        stride: Pixels from one position to the next; finer layers are averaged, coarser ones
            interpolated. Default 8.
        sigma: Standard deviation of the map's smoothing, in pixels. Default 2.
        focus: Power of a position's distance from the mean position in proportion to which it is
            drawn for training; 0 draws all alike, backgrounds mostly. Default 4.
        lr: Largest learning rate of Adam. Default 4e-3.
        batch_size: Positions per step. Default 512.
        max_steps: Steps. Default 1500.
        patience: Epochs over the positions without a lower held-out loss before training stops;
            ``None`` never stops. Default 20.
        quantile: Share of normal images that should not be flagged, in (0, 1]; see
            :class:`QuantilePostProcessor`. Default 0.99, or the rule of the ``post_processor`` you pass.
        confidence: Share of draws of the held-out images in which ``quantile`` is kept, in (0, 1).
            Default ``None``: it is kept on average over them.
        passes: Over the training images, more than 1 only for data with random augmentations, of
            which each pass sees new ones; of few images, rotated copies help. Held-out copies count
            as images in the quantile, and promise nothing. Default 1.
        cache_limit: Bytes of features in memory; more lie in a temporary file. Default 2e9.
        seed: Of the initial weights, the order of the positions and what is held out. Default:
            drawn from the global generator.
        pre_processor: True (default) resizes, and scales by the mean and deviation that the backbone was
            pretrained with, as timm knows them: ImageNet's for ``resnet18``, 0.5 for ``tf_efficientnet_lite0``.
        post_processor: True (default) is :class:`QuantilePostProcessor`; others take their
            thresholds from the validation split.
        evaluator: True (default) tests image and pixel AUROC and F1.
        visualizer: True (default) writes heat maps in test and predict.

    Attributes:
        history: What the last fit measured, one entry per epoch over the positions.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range, or there is no such backbone or layer.

    Source:
        arXiv 2306.12627 for loss and score; features and their average as in PatchCore (arXiv 2106.08265).

    Example:
        >>> model = PatchToll(image_size=64, pre_trained=False, seed=0)
        >>> model.model.patches.components.shape  # 64, 128 and 256 channels of the three layers
        torch.Size([448, 192])
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        weights_path: str | None = None,
        pre_trained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        n_components: int = 192,
        hidden_size: int = 1024,
        latent_dim: int = 32,
        beta: Beta = 1.0,
        strength: float = 1.0,
        exponent: int = 2,
        score_scale: ScoreScale = "none",
        score_weight: float | None = None,
        score_term: ScoreTerm = "total",
        top_share: float = 0.01,
        image_weight: float = 0.5,
        neighbourhood: int = 3,
        stride: int = 8,
        sigma: float = 2.0,
        focus: float = 4.0,
        lr: float = 4e-3,
        batch_size: int = 512,
        max_steps: int = 1500,
        patience: int | None = 20,
        quantile: float | None = None,
        confidence: float | None = None,
        passes: int = 1,
        cache_limit: float = 2e9,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # The base class records these variables as hyperparameters, which must be plain data to
        # load under weights_only: numbers are made Python's own, and modules are taken out.
        layers = check_layers(layers)
        weights_path = check_weights(weights_path, pre_trained)
        n_components = check_integer("n_components", n_components, minimum=1)
        hidden_size = check_integer("hidden_size", hidden_size, minimum=1)
        latent_dim = check_integer("latent_dim", latent_dim, minimum=1)
        beta = check_beta("beta", beta)
        strength = check_finite_float("strength", strength, minimum=0)
        score_weight = None if score_weight is None else check_finite_float("score_weight", score_weight, minimum=0)
        weight = check_score_weight(score_weight, beta=beta, score_scale=score_scale)
        top_share, image_weight = _check_image_score(top_share, image_weight)
        exponent = check_integer("exponent", exponent, minimum=1)
        neighbourhood, stride = (
            check_integer(name, value, minimum=1)
            for name, value in (("neighbourhood", neighbourhood), ("stride", stride))
        )
        sigma = check_finite_float("sigma", sigma, minimum=0)
        focus = check_finite_float("focus", focus, minimum=0)
        lr = check_finite_float("lr", lr, minimum=0, exclusive=True)
        batch_size = check_integer("batch_size", batch_size, minimum=2)
        max_steps = check_integer("max_steps", max_steps, minimum=1)
        patience = None if patience is None else check_integer("patience", patience, minimum=1)
        passes = check_integer("passes", passes, minimum=1)
        cache_limit = check_finite_float("cache_limit", cache_limit, minimum=0)
        seed = None if seed is None else check_integer("seed", seed, minimum=0)
        image_size = _size(image_size, pre_processor)
        extractor = build_backbone(backbone, layers, seed)
        if for_backbone := pre_processor is True:
            pre_processor = TollPreProcessor(image_size, scaling_of(extractor))
        if post_processor is True:
            post_processor = QuantilePostProcessor(0.99 if quantile is None else quantile, confidence)
        elif quantile is not None or confidence is not None:
            msg = "quantile and confidence must be None where post_processor is passed, which has its own rule, "
            msg += f"got {quantile!r} and {confidence!r}"
            raise ValueError(msg)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.pre_trained, self.weights_path = pre_trained, weights_path
        self.focus, self.lr, self.batch_size, self.max_steps, self.patience = focus, lr, batch_size, max_steps, patience
        self.passes, self.cache_limit, self.seed = passes, cache_limit, seed
        self.findings: list[Finding] = []
        self.history: History | None = None
        self._image_size, self._scales_for_backbone = image_size, for_backbone
        self._hidden_size, self._latent_dim = hidden_size, latent_dim
        self.score_scale = score_scale
        self._loss = TollLoss(beta, strength=strength, exponent=exponent)
        self._score_term, self._score_weight = score_term, weight
        self._image_score = (top_share, image_weight)
        self._channels = sum(extractor.out_dims)
        self._n_components = min(n_components, self._channels)
        patches = self._new_patches(torch.Generator().manual_seed(seed or 0))
        self.model: PatchTollModel = PatchTollModel(
            extractor, patches, neighbourhood, stride, sigma, self._new_image_score()
        )
        self._pretrained_is_there = False
        self._features: ImageFeatures | None = None
        self._size = image_size

    def _new_patches(self, generator: torch.Generator) -> PatchAutoencoder:
        network = DenseAutoencoder(self._n_components, (self._hidden_size,), self._latent_dim, generator=generator)
        return PatchAutoencoder(network, self._loss, self._score_term, self._channels, self._score_weight)

    def _new_image_score(self) -> ImageScore:
        return ImageScore(self._channels, *self._image_score)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """As many epochs as ``passes``, one device, and validation after the last."""
        return {
            "max_epochs": self.passes,
            "check_val_every_n_epoch": self.passes,
            "val_check_interval": 1.0,
            "num_sanity_val_steps": 0,
            "devices": 1,
        }

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> TollPreProcessor:
        """The default pre-processor of the default backbone: resized, scaled by ImageNet's mean and deviation."""
        return TollPreProcessor(image_size or (256, 256), "imagenet")

    def configure_post_processor(self) -> QuantilePostProcessor:
        """The default post-processor."""
        return QuantilePostProcessor()

    def configure_optimizers(self) -> None:
        """None: Lightning's steps collect features, the fit has an optimiser of its own."""

    def on_fit_start(self) -> None:
        """Give the backbone its weights, once, and forget the features of an earlier fit."""
        super().on_fit_start()
        if not self.pre_trained:
            _logger.warning("the backbone has random weights (pre_trained=False): expect little of what it detects")
        elif not self._pretrained_is_there and not bool(self.model.is_fitted):
            load_backbone(self.model.backbone, self.weights_path)
            self._pretrained_is_there = True
        self._features = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Keep the features of a batch of normal images.

        Raises:
            ValueError: If an image or its features are not finite, or it is of another size than the first,
                or has no path by which its copies of several passes are held out together.
        """
        del batch_idx
        if self.passes > 1 and not batch.image_path:
            msg = f"passes must be 1 for data without image_path, got {self.passes}"
            raise ValueError(msg)
        if self.current_epoch < self.passes:
            with torch.no_grad():
                maps = self.model.embed(batch.image, batch.image_path)
            if self._features is None:
                self._features = ImageFeatures(maps.shape[1], (maps.shape[2], maps.shape[3]), self.cache_limit)
                self._size = (batch.image.shape[-2], batch.image.shape[-1])
            self._features.append(maps, batch.image_path)
        return torch.zeros((), device=self.device, requires_grad=True)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Fit to the features when the last are there, before Lightning validates."""
        super().on_train_batch_end(*args, **kwargs)
        if self._features is not None and self.trainer.is_last_batch and self.current_epoch + 1 == self.passes:
            features, self._features = self._features, None
            self._fit(features)

    def on_fit_end(self) -> None:
        """Say so if there was no fit.

        Raises:
            ValueError: If training ended before the last image of the last pass.
        """
        super().on_fit_end()
        if self._features is not None:
            seen, self._features = len(set(self._features.names)), None
            msg = f"training must see all images, {self.passes} time(s), but ended early, after {seen} images: "
            msg += "max_steps, max_epochs and max_time of the trainer must leave that much"
            raise ValueError(msg)

    def __getstate__(self) -> dict[str, Any]:
        """Without the features that a fit was collecting: a file of them is no part of the model."""
        return {**super().__getstate__(), "_features": None}

    def _fit(self, features: ImageFeatures) -> None:
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        validation, alone = self._validation_features(features), False
        if validation is not None:
            rows, held_out = features.in_order_of_names(), validation.rows
        else:
            rows, held_out = features.hold_out(_HELD_OUT, generator)
            if alone := len(set(features.names)) == 1:
                _logger.warning("the only image was also taken for a held-out one: expect thresholds that are too low")
        # What was fitted before stays until this fit has succeeded.
        fresh = self._new_patches(generator).to(self.device)
        self.history = fit_patches(
            fresh,
            rows,
            held_out,
            focus=self.focus,
            lr=self.lr,
            batch_size=self.batch_size,
            max_steps=self.max_steps,
            patience=self.patience,
            score_scale=self.score_scale,
            generator=generator,
            progress=self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero,
            on_epoch=self._log_epoch,
        )
        scores, findings = examine(fresh, held_out, features.grid)
        image_score = self._new_image_score().to(self.device)
        image_score.fit_pooled(
            torch.cat([pooled(maps, image_score.cells) for maps in positions_of(rows, features.grid)])
        )
        # One map at a time, of which thresholds and ranges take the extremes only.
        terms, extremes = [], []
        for of_image, maps in zip(scores, positions_of(held_out, features.grid), strict=True):
            anomaly_map = self.model.map_of(of_image[None], self._size)
            terms.append(torch.stack(image_score.terms(anomaly_map, maps.to(self.device))))
            extremes.append(torch.stack(anomaly_map.aminmax()))
        held_out_terms = ImageTerms(*torch.cat(terms, dim=1))
        image_score.measure(held_out_terms)
        self.model.patches.load_state_dict(fresh.state_dict())
        self.model.image_score = image_score  # not its numbers only: that of an older file may be of another form
        self.model.is_fitted.fill_(True)
        self.findings = findings
        if isinstance(self.post_processor, QuantilePostProcessor):
            self.post_processor.calibrate(
                torch.stack(extremes)[:, None, None],
                image_score.score_of(held_out_terms) if not image_score.is_maximum else None,
                independent=validation is not None or (self.passes == 1 and not alone),
            )
        warn(self.findings)
        best = self.history.best_epoch
        self.log_dict(
            {"train_loss": self.history.total[best], "val_loss": self.history.validation[best]}, prog_bar=True
        )

    def _log_epoch(self, epoch: int, histories: list[History]) -> None:
        (history,) = histories
        names = ("total", "reconstruction", "latent", "validation")
        for logger in self.loggers:
            logger.log_metrics({f"patches_{name}": getattr(history, name)[-1] for name in names}, step=epoch)

    def _validation_features(self, training: ImageFeatures) -> ImageFeatures | None:
        """Those of the validation split, if it has images and none is anomalous."""
        limit = max(0, self.cache_limit - 4 * self._channels * len(training.rows))
        features = ImageFeatures(self._channels, training.grid, limit)
        # The precision in which they are scored later: Lightning leaves it between training and validation.
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            for batch in validation_batches(self):
                if not bool(is_normal(batch).all()):
                    return None
                features.append(self.model.embed(batch.image, batch.image_path), batch.image_path)
        return features if features.names else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what the base classes store, and the scaling of the fit, should timm have learnt of another since."""
        config = checkpoint.get("anomalib_pre_processor_config") or {}
        super().on_load_checkpoint(checkpoint)
        if self._scales_for_backbone and isinstance(self.pre_processor, TollPreProcessor) and "scaling" in config:
            self.pre_processor.scale_by(config["scaling"], config["scaling_range"])

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """Predictions of a batch."""
        return self.test_step(batch, *args, **kwargs)


def _check_image_score(top_share: object, image_weight: object) -> tuple[float, float]:
    return check_share("top_share", top_share), check_finite_float("image_weight", image_weight, minimum=0)


def _size(image_size: object, pre_processor: PreProcessor | bool) -> tuple[int, int]:
    size, resized = size_for(image_size, pre_processor), size_of(pre_processor)
    if resized not in (None, size):
        msg = f"image_size must be left out or that of pre_processor, {resized}, got {size}"
        raise ValueError(msg)
    return size
