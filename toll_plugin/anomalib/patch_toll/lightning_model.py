"""PatchToll: targeted collapse on the features of a pretrained backbone, as an anomalib model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, get_args

import torch
from anomalib.data import Batch
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components import TimmFeatureExtractor
from anomalib.models.components.base import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from toll_plugin.anomalib.base import TollModuleMixin, is_normal, size_for, size_of, validation_batches
from toll_plugin.anomalib.patch_toll.torch_model import PatchTollModel, load_backbone
from toll_plugin.anomalib.post_processor import QuantilePostProcessor
from toll_plugin.anomalib.pre_processor import TollPreProcessor
from toll_plugin.core.checks import check_finite_float, check_integer, check_option
from toll_plugin.core.diagnostics import CollapseMonitor, Finding, warn
from toll_plugin.core.modes import evaluating
from toll_plugin.core.networks import DenseAutoencoder
from toll_plugin.core.objective import ScoreTerm, TollLoss, TollTerms
from toll_plugin.core.patches.model import PatchAutoencoder, PreparedRows, fit_patches
from toll_plugin.core.rows import RowCache, RowSubset
from toll_plugin.core.training.fit import History
from toll_plugin.core.training.learners import Rows

__all__ = ["PatchToll"]

_logger = logging.getLogger(__name__)

#: Share of the training images that is held out where the validation split has anomalies, or there is none.
_HELD_OUT = 0.2
#: One is held out, one trained on.
_FEWEST = 2


class PatchToll(TollModuleMixin, AnomalibModule):
    r"""Targeted collapse on the features of a frozen pretrained backbone, position by position.

    One pass over the normal training images computes their features, which are kept, standardised and
    projected on their leading principal components. Then a small autoencoder learns them,
    :math:`\frac1P\sum_p \|x_p - \hat x_p\|^2 + \beta\|z_p\|^2` over positions p. The same sum at
    each position, enlarged and smoothed, is the anomaly map, and its maximum the score: no memory
    bank is searched.

    No anomaly is used in training. Held-out normal images choose the epoch and, by ``quantile``,
    the threshold: those of the validation split where all its images are normal, else a fifth of
    the training images.

    Args:
        backbone: Name of a timm network. Default ``"resnet18"``.
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
        beta: Weight of the latent norm, at least 0. Default 1.
        exponent: Of both norms, 1 or 2 (default).
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"`` alone, in map and score.
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
        passes: Over the training images, more than 1 only for data with random augmentations, of
            which each pass sees new ones. Held-out copies count as images in the quantile. Default 1.
        cache_limit: Bytes of features in memory; more lie in a temporary file. Default 2e9.
        seed: Of the initial weights, the order of the positions and what is held out. Default:
            drawn from the global generator.
        pre_processor: True (default) resizes, and scales by ImageNet's mean and deviation.
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
        beta: float = 1.0,
        exponent: int = 2,
        score_term: ScoreTerm = "total",
        neighbourhood: int = 3,
        stride: int = 8,
        sigma: float = 2.0,
        focus: float = 4.0,
        lr: float = 4e-3,
        batch_size: int = 512,
        max_steps: int = 1500,
        patience: int | None = 20,
        quantile: float | None = None,
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
        layers = _layers(layers)
        weights_path = _weights(weights_path, pre_trained)
        n_components = check_integer("n_components", n_components, minimum=1)
        hidden_size = check_integer("hidden_size", hidden_size, minimum=1)
        latent_dim = check_integer("latent_dim", latent_dim, minimum=1)
        beta = check_finite_float("beta", beta, minimum=0)
        exponent = check_integer("exponent", exponent, minimum=1)
        check_option("score_term", score_term, get_args(ScoreTerm))
        neighbourhood = check_integer("neighbourhood", neighbourhood, minimum=1)
        if neighbourhood % 2 == 0:
            msg = f"neighbourhood must be odd, got {neighbourhood}"
            raise ValueError(msg)
        stride = check_integer("stride", stride, minimum=1)
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
        if pre_processor is True:
            pre_processor = TollPreProcessor(image_size, "imagenet")
        if post_processor is True:
            post_processor = QuantilePostProcessor() if quantile is None else QuantilePostProcessor(quantile)
        elif quantile is not None:
            msg = f"quantile must be None where post_processor is passed, which has its own rule, got {quantile!r}"
            raise ValueError(msg)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.pre_trained, self.weights_path = pre_trained, weights_path
        self.focus, self.lr, self.batch_size, self.max_steps, self.patience = focus, lr, batch_size, max_steps, patience
        self.passes, self.cache_limit, self.seed = passes, cache_limit, seed
        self.findings: list[Finding] = []
        self.history: History | None = None
        self._image_size = image_size
        extractor = _extractor(backbone, layers, seed)
        self._network = {
            "n_features": min(n_components, sum(extractor.out_dims)),
            "hidden_sizes": (hidden_size,),
            "latent_dim": latent_dim,
        }
        self._objective = (TollLoss(beta, exponent=exponent), score_term, sum(extractor.out_dims))
        patches = self._new_patches(torch.Generator().manual_seed(seed or 0))
        self.model: PatchTollModel = PatchTollModel(extractor, patches, neighbourhood, stride, sigma)
        self._pretrained_is_there = False
        self._features: RowCache | None = None
        self._names: list[str] = []
        self._grid: tuple[int, int] = (0, 0)
        self._size = image_size

    def _new_patches(self, generator: torch.Generator) -> PatchAutoencoder:
        return PatchAutoencoder(DenseAutoencoder(**self._network, generator=generator), *self._objective)

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
        """The default pre-processor: resized, scaled by ImageNet's mean and deviation."""
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
        self._features, self._names = None, []

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
                features = self.model.embed(batch.image, batch.image_path)
            if self._features is None:
                self._grid = (features.shape[2], features.shape[3])
                self._size = (batch.image.shape[-2], batch.image.shape[-1])
                self._features = RowCache(features.shape[1], self.cache_limit)
            names = batch.image_path or [
                f"image {i}" for i in range(len(self._names), len(self._names) + len(features))
            ]
            self._keep(self._features, features, names)
            self._names += names
        return torch.zeros((), device=self.device, requires_grad=True)

    def _keep(self, cache: RowCache, features: Tensor, names: Sequence[str]) -> None:
        if (features.shape[2], features.shape[3]) != self._grid:
            msg = f"images must have one size, got another in {names[0]}: let a pre_processor resize them"
            raise ValueError(msg)
        if not bool(features.isfinite().all()):
            bad = [name for name, one in zip(names, features, strict=True) if not bool(one.isfinite().all())]
            msg = f"features must be finite, got NaN or infinite ones of {', '.join(bad)}: the backbone overflows"
            raise ValueError(msg)
        cache.append(features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Fit to the features when the last are there, before Lightning validates."""
        super().on_train_batch_end(*args, **kwargs)
        if self._features is not None and self.trainer.is_last_batch and self.current_epoch + 1 == self.passes:
            features, names = self._features, self._names
            self._features, self._names = None, []
            self._fit(features, names)

    def on_fit_end(self) -> None:
        """Say so if there was no fit.

        Raises:
            ValueError: If training ended before the last image of the last pass.
        """
        super().on_fit_end()
        if self._features is not None:
            seen, self._features, self._names = len(set(self._names)), None, []
            msg = f"training must see all images, {self.passes} time(s), but ended early, after {seen} images: "
            msg += "max_steps, max_epochs and max_time of the trainer must leave that much"
            raise ValueError(msg)

    def __getstate__(self) -> dict[str, Any]:
        """Without the features that a fit was collecting: a file of them is no part of the model."""
        return {**super().__getstate__(), "_features": None, "_names": []}

    def _fit(self, features: RowCache, names: list[str]) -> None:
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        # Loaders shuffle by the global generator: in the order of names, the seed alone decides.
        order = sorted(range(len(names)), key=names.__getitem__)
        per_image = len(features) // len(names)
        sorted_rows = (torch.tensor(order)[:, None] * per_image + torch.arange(per_image)).flatten()
        rows, held_out = self._split(RowSubset(features, sorted_rows), sorted(names), generator)
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
            generator=generator,
            progress=self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero,
            on_epoch=self._log_epoch,
        )
        self.model.patches.load_state_dict(fresh.state_dict())
        self.model.is_fitted.fill_(True)
        self._examine(held_out)
        best = self.history.best_epoch
        self.log_dict(
            {"train_loss": self.history.total[best], "val_loss": self.history.validation[best]}, prog_bar=True
        )

    def _log_epoch(self, epoch: int, histories: list[History]) -> None:
        (history,) = histories
        names = ("total", "reconstruction", "latent", "validation")
        for logger in self.loggers:
            logger.log_metrics({f"patches_{name}": getattr(history, name)[-1] for name in names}, step=epoch)

    def _split(self, features: Rows, names: list[str], generator: torch.Generator) -> tuple[Rows, Rows]:
        """Rows to train on, and rows of held-out images."""
        validation = self._validation_features(self.cache_limit - 4 * self.model.patches.mean.numel() * len(features))
        if validation is not None:
            return features, validation
        images = sorted(set(names))
        if len(images) < _FEWEST:
            msg = f"training must have at least {_FEWEST} images where the validation split has no normal images only, "
            msg += f"because some are held out, got {len(images)}"
            raise ValueError(msg)
        count = max(1, round(_HELD_OUT * len(images)))
        chosen = {images[i] for i in torch.randperm(len(images), generator=generator)[:count].tolist()}
        of_image = torch.tensor([name in chosen for name in names])
        of_row = of_image.repeat_interleave(len(features) // len(names))
        return RowSubset(features, (~of_row).nonzero()[:, 0]), RowSubset(features, of_row.nonzero()[:, 0])

    def _validation_features(self, limit: float) -> RowCache | None:
        """Those of the validation split, if it has images and none is anomalous."""
        cache = RowCache(self.model.patches.mean.numel(), max(0, limit))
        # The precision in which they are scored later: Lightning leaves it between training and validation.
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            for batch in validation_batches(self):
                if not bool(is_normal(batch).all()):
                    return None
                features = self.model.embed(batch.image, batch.image_path)
                self._keep(cache, features, batch.image_path or ["a validation image"] * len(features))
        return cache if len(cache) else None

    @torch.no_grad()
    def _examine(self, held_out: Rows) -> None:
        """Thresholds from held-out images, and the method's failure signatures."""
        height, width = self._grid
        monitor, maps = CollapseMonitor(), []
        patches = self.model.patches
        prepared = PreparedRows(held_out, patches)
        with evaluating(self.model):
            for start in range(0, len(prepared), height * width):
                x = prepared[slice(start, start + height * width)]
                terms = patches.loss.terms(x, *patches.network(x))
                monitor.update(x, terms, exponent=patches.loss.exponent)
                of_image = TollTerms(*(term.view(1, height, width) for term in terms))
                found = self.model.predict(patches.score_of(of_image), self._size).anomaly_map
                # Of a map, thresholds and ranges take the extremes only.
                maps.append(torch.stack(found.aminmax()).view(1, 1, 1, 2))
        if isinstance(self.post_processor, QuantilePostProcessor):
            self.post_processor.calibrate(torch.cat(maps))
        self.findings = monitor.findings()
        warn(self.findings)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """Predictions of a batch."""
        return self.test_step(batch, *args, **kwargs)


def _weights(path: str | None, pre_trained: object) -> str | None:
    if not isinstance(pre_trained, bool):
        msg = f"pre_trained must be true or false, got {pre_trained!r} of type {type(pre_trained).__name__}"
        raise TypeError(msg)
    if path is not None and not pre_trained:
        msg = f"weights_path must be left out where pre_trained is False, got {str(path)!r}"
        raise ValueError(msg)
    return None if path is None else str(path)


def _size(image_size: object, pre_processor: PreProcessor | bool) -> tuple[int, int]:
    size, resized = size_for(image_size, pre_processor), size_of(pre_processor)
    if resized not in (None, size):
        msg = f"image_size must be left out or that of pre_processor, {resized}, got {size}"
        raise ValueError(msg)
    return size


def _layers(layers: Sequence[str]) -> list[str]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(x, str) for x in layers):
        msg = f"layers must be a sequence of names, got {layers!r}"
        raise TypeError(msg)
    if not layers:
        msg = "layers must name at least one layer, got none"
        raise ValueError(msg)
    if len(set(layers)) < len(layers):
        msg = f"layers must be named once each, got {', '.join(layers)}"
        raise ValueError(msg)
    return list(layers)


def _extractor(backbone: str, layers: list[str], seed: int | None) -> TimmFeatureExtractor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed or 0)
        try:
            extractor = TimmFeatureExtractor(backbone, list(layers), pre_trained=False)
        except RuntimeError as error:
            msg = f"backbone must be the name of a timm network, got {backbone!r}: {error}"
            raise ValueError(msg) from error
        except ValueError as error:
            msg = f"layers must be layers of {backbone}, got {', '.join(layers)}: {error}"
            raise ValueError(msg) from error
        if hasattr(extractor, "patch_size"):  # of a vision transformer anomalib does not check the layers
            blocks: Any = extractor.feature_extractor.blocks
            known = [f"blocks.{i}" for i in range(len(blocks))]
        elif extractor.layers != layers:
            import timm  # noqa: PLC0415  only for the message

            info: Any = timm.create_model(backbone, features_only=True)
            known = [layer["module"] for layer in info.feature_info.get_dicts()]
        else:
            return extractor
        if not set(layers) <= set(known):
            msg = f"layers must be among {', '.join(known)} for {backbone}, got {', '.join(layers)}"
            raise ValueError(msg)
    return extractor
