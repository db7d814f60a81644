"""Toll as an anomalib model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch
from anomalib.data import Batch
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components.base import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from toll_plugin.anomalib.base import TollModuleMixin, is_normal, normal_terms, size_for, validation_batches
from toll_plugin.anomalib.callbacks import RestoreBestWeights
from toll_plugin.anomalib.metrics import updated_anywhere
from toll_plugin.anomalib.post_processor import TollPostProcessor
from toll_plugin.anomalib.pre_processor import TollPreProcessor
from toll_plugin.anomalib.toll.torch_model import NetworkName, TollModel, build_network, check_finite
from toll_plugin.core.checks import check_finite_float, check_integer, check_option
from toll_plugin.core.diagnostics import CollapseMonitor, Finding, warn
from toll_plugin.core.image_scaling import Statistics
from toll_plugin.core.modes import batch_norm_fits, evaluating
from toll_plugin.core.objective import (
    Beta,
    ScoreScale,
    ScoreTerm,
    TollLoss,
    TollTerms,
    check_beta,
    check_score_weight,
)
from toll_plugin.core.training.divergence import DivergenceError, DivergenceGuard
from toll_plugin.core.training.optimizers import cosine_rate

__all__ = ["Toll"]

_OWN_NETWORK = "toll_own_network"

#: How many times as large as the reconstruction term the latent term is kept, and its weight in the score.
_STRENGTH, _SCORE_WEIGHT = 3.0, 1.0

_TRAIN_LOGS = ("train_loss", "train_reconstruction", "train_latent")
_VALIDATION_LOGS = ("val_loss", "val_reconstruction", "val_latent")


class Toll(TollModuleMixin, AnomalibModule):
    r"""Targeted collapse regularised autoencoder for images.

    Trains :math:`\frac1N\sum_i \|x_i - \hat x_i\| + \beta\|z_i\|` on normal images and scores
    with the sum of the same terms per image; the anomaly map is the residual alone, see :class:`TollModel`.

    The defaults depart from the paper where its form is tied to one data set. ``beta="auto"`` is as strong on any
    data and does not fade, ``score_scale="median"`` puts both terms of the score on one scale, and
    ``scaling="standard"`` does so for pixels. Training has a fixed budget, ``max_steps``, along which the learning
    rate falls to zero: at a constant rate the noise of the steps hides what the norm of the latent says, and the
    held-out loss does not tell when detection is best. So no anomaly is needed, and no choice is left to labels.

    The paper's form is ``Toll(beta=1000, max_steps=None)`` with one of the authors' networks, their
    scaling and learning rate, see ``configs/paper``; what this class did before it had the present defaults is
    ``Toll(beta=0.01, latent_dim=32, scaling="unit", lr=1e-3, max_steps=None, restore_best_weights=True,
    patience=20)``.

    Args:
        image_size: ``(height, width)`` in pixels the image is resized to, or one integer.
            Default: that of a ``pre_processor`` you pass, else 256. ``network="conv"`` takes any
            size from 8; the authors' take theirs.
        in_channels: 3 (default), or 1 for grey images: the model averages the three channels
            that anomalib's batches always have.
        latent_dim: Length of the latent. Default 512.
        network: ``"conv"`` (default), or the authors' ``"paper28"`` (28x28, one channel) or
            ``"paper32"`` (32x32, three channels).
        encoder: A module of your own from ``(N, in_channels, H, W)`` to ``(N, *)``; needs a
            ``decoder`` and replaces ``network`` and ``latent_dim``. A checkpoint does not store
            it: pass both to ``load_from_checkpoint`` again.
        decoder: A module of your own from the latent back to ``(N, in_channels, H, W)``.
        beta: Weight of the latent norm in the loss. ``"auto"`` (default) takes in each batch the weight that keeps the
            latent term at ``strength`` times the reconstruction term, see :class:`toll_plugin.core.TollLoss`. A number
            of at least 0 is the paper's form, in input units per latent unit: it is tied to the scale of the data, and
            fades as training shrinks the latent. 0 is a plain autoencoder, which is scored by its residual.
        strength: Of ``beta="auto"``: how many times as large as the reconstruction term the latent term is kept, at
            least 0; 0 trains as beta 0 does. Default 3.
        exponent: Of both norms, 1 (default, the authors' code) or 2.
        score_scale: ``"median"`` (default, unless beta is a number): each term of the score is divided by its median
            over the normal validation images (the training images, where there are none). These units are kept in the
            model, in checkpoints and in exports, and the anomaly map is in that of its term. Then both terms are near 1
            on normal images, and the weight is not tied to the scale of the data. Each validation measures them, which
            needs one more pass over its images. ``"none"`` (default where beta is a number): the
            terms are added as they are, as in the paper.
        score_weight: Weight of the latent term in the score, at least 0. Default: with ``"median"`` 1, or 0 where
            training does not press the latent (a beta or a strength of 0), whose norm then says little; with
            ``"none"`` beta. ``beta="auto"`` with ``"none"`` needs one, for it leaves no number to weigh by.
        score_term: ``"total"`` (default), ``"reconstruction"`` or ``"latent"`` alone.
        lr: Learning rate of Adam, more than 0: the largest, where it falls. Default 5e-4.
        scaling: ``"standard"`` (default: pixels minus their mean, over their standard deviation, over all training
            images), ``"unit"`` (pixels in [0, 1]), ``"imagenet"``, or the authors' ``"paper_mnist"``,
            ``"paper_fashion_mnist"``, ``"paper_cifar"``, or a mean and a deviation of each channel.
        scaling_range: ``(a, b)``, the values that become 0 and 1, for ``"standard"`` (mean, and mean plus deviation)
            and ``"paper_cifar"`` (minimum and maximum, see :func:`toll_plugin.core.contrast_range`). Default: that of
            the training images as they are loaded, measured when the first fit begins, logged, stored in checkpoints
            and kept.
        max_steps: Steps of a fit, at least 1, along which the learning rate rises over a tenth and falls along half a
            cosine to zero; then training stops. Where the trainer's limits end the fit sooner, the rate falls along
            its steps. Default 600. ``None``: the rate is constant, and the trainer's limits and ``patience`` end the
            fit.
        restore_best_weights: Use the weights of the lowest ``val_loss``, the loss of the normal images of a validation
            split (of all its images, where it has no labels), see :class:`RestoreBestWeights`. Default false.
        patience: Validations (epochs, unless the trainer validates less often) without a lower
            ``val_loss`` before training stops, unless the trainer has an ``EarlyStopping`` of its
            own. Default ``None``, which never stops. Without a validation split there is no ``val_loss``.
        max_epochs: Overrides the trainer's, for callers without a trainer section such as
            ``anomalib benchmark``. Default ``None``.
        seed: Of the initial weights; the global generator is not used then. Default ``None``.
        pre_processor: True (default) resizes and scales as above. With one of your own, or
            ``False``, leave ``scaling`` alone.
        post_processor: True (default) is :class:`TollPostProcessor`.
        evaluator: True (default) tests image and pixel AUROC and F1.
        visualizer: True (default) writes heat maps in test and predict.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it is out of range, or network, size and channels do not fit together.

    Source:
        arXiv 2306.12627.

    Example:
        >>> import torch
        >>> model = Toll(image_size=28, in_channels=1, beta=1.0, seed=0).eval()
        >>> model(torch.rand(2, 3, 100, 80)).pred_score.shape
        torch.Size([2])
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        latent_dim: int = 512,
        network: NetworkName = "conv",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        beta: Beta = "auto",
        strength: float | None = None,
        exponent: int = 1,
        score_scale: ScoreScale | None = None,
        score_weight: float | None = None,
        score_term: ScoreTerm = "total",
        lr: float = 5e-4,
        scaling: str | Statistics = "standard",
        scaling_range: tuple[float, float] | None = None,
        max_steps: int | None = 600,
        restore_best_weights: bool = False,
        patience: int | None = None,
        max_epochs: int | None = None,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # The base class records these variables as hyperparameters, which must be plain data to
        # load under weights_only: numbers are made Python's own, and modules are taken out.
        beta = check_beta("beta", beta)
        exponent = check_integer("exponent", exponent, minimum=1)
        strength = None if strength is None else check_finite_float("strength", strength, minimum=0)
        score_weight = None if score_weight is None else check_finite_float("score_weight", score_weight, minimum=0)
        score_scale = score_scale or ("median" if beta == "auto" else "none")
        loss = TollLoss(beta, strength=_strength(beta, strength), exponent=exponent)
        weight = check_score_weight(
            score_weight, beta=beta, score_scale=score_scale, default=0.0 if loss.weight == 0 else _SCORE_WEIGHT
        )
        lr = check_finite_float("lr", lr, minimum=0, exclusive=True)
        latent_dim = check_integer("latent_dim", latent_dim, minimum=1)
        in_channels = check_integer("in_channels", in_channels, minimum=1)
        max_steps = None if max_steps is None else check_integer("max_steps", max_steps, minimum=1)
        patience = None if patience is None else check_integer("patience", patience, minimum=1)
        max_epochs = None if max_epochs is None else check_integer("max_epochs", max_epochs, minimum=1)
        seed = None if seed is None else check_integer("seed", seed, minimum=0)
        check_option("in_channels", in_channels, (1, 3))
        check_option("network", network, get_args(NetworkName))
        if isinstance(pre_processor, TollPreProcessor):
            scaling, scaling_range = pre_processor.scaling, pre_processor.scaling_range
        elif pre_processor is not True and (scaling not in ("standard", "unit") or scaling_range is not None):
            msg = f"scaling reaches the default pre_processor only, got scaling={scaling!r} and another pre_processor"
            raise ValueError(msg)
        image_size = size_for(image_size, pre_processor)
        if pre_processor is True:
            pre_processor = TollPreProcessor(image_size, scaling, scaling_range)
            scaling_range = pre_processor.scaling_range
        modules = (encoder, decoder)
        encoder = decoder = None
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.lr = lr
        self.max_steps = max_steps
        self.patience = patience
        self.max_epochs = max_epochs
        self.score_scale = score_scale
        self.findings: list[Finding] = []
        self.model: TollModel = TollModel(
            build_network(network, *modules, (in_channels, *image_size), latent_dim, seed),
            loss,
            score_term,
            weight,
        )
        self.val_loss, self.val_reconstruction, self.val_latent = MeanMetric(), MeanMetric(), MeanMetric()
        self._image_size = image_size
        self._own_network = modules != (None, None)
        self._best_weights = RestoreBestWeights("val_loss" if restore_best_weights else None)
        self._guard: DivergenceGuard | None = None
        self._train_sums, self._train_count = torch.zeros(3, dtype=torch.float64), 0

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No validation before training, which would set thresholds from untrained scores; ``max_epochs`` if given."""
        return {"num_sanity_val_steps": 0} | ({} if self.max_epochs is None else {"max_epochs": self.max_epochs})

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> TollPreProcessor:
        """The default pre-processor at the default scaling."""
        return TollPreProcessor(image_size or (256, 256))

    def configure_post_processor(self) -> TollPostProcessor:
        """The default post-processor."""
        return TollPostProcessor()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Those of anomalib, model selection, and early stopping where the trainer has none."""
        callbacks = [*super().configure_callbacks(), self._best_weights]
        stopping = [c for c in self.trainer.callbacks if isinstance(c, EarlyStopping)]
        if self.patience is not None and all(isinstance(c, _StopByValLoss) for c in stopping):
            # Not strict: without a validation split there is no val_loss, and nothing to stop by.
            callbacks.append(_StopByValLoss("val_loss", patience=self.patience, strict=False))
        return callbacks

    def configure_optimizers(self) -> Any:
        """Adam, as the authors; with ``max_steps`` at a rate that falls to zero."""
        # Fused, a step of the whole fit takes a fifth less time on a CPU. On a GPU torch's own choice is as fast,
        # and a fused optimiser there refuses to clip gradients under 16-bit mixed precision.
        fused = True if self.device.type == "cpu" else None
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=fused)
        if self.max_steps is None:
            return optimizer
        limit = self.trainer.estimated_stepping_batches  # negative or infinite where the trainer has no limit
        steps = min(self.max_steps, int(limit)) if 0 < limit < math.inf else self.max_steps
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine_rate, 1.0, steps=steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop where the steps are done. The epoch ends there, with the validation that sets the thresholds."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.max_steps is not None and self.global_step >= self.max_steps:
            self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        """Start watching for divergence."""
        super().on_fit_start()
        self._guard = DivergenceGuard(self.model)

    def on_train_epoch_start(self) -> None:
        """Remember the weights in case the epoch diverges."""
        super().on_train_epoch_start()
        self._train_sums, self._train_count = torch.zeros(3, dtype=torch.float64), 0
        if self._guard is not None:
            self._guard.keep(self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch of normal images.

        The step waits for the device once, to read its loss. Pixels are looked at only where the loss is not
        finite, which is what a pixel that is not finite makes it.

        Raises:
            ValueError: If an image does not fit the network or is not finite; it names the latter, and the
                weights of the epoch's start are put back.
            DivergenceError: If the loss is not finite though the images are; the weights of the epoch's
                start are put back.
        """
        del batch_idx
        with batch_norm_fits(self.model, len(batch.image)):
            terms = self.model.reconstruct(batch.image).terms
        loss: Tensor = self.model.loss.losses(terms).mean()
        means = torch.stack([loss, terms.reconstruction.mean(), terms.latent.mean()]).detach().tolist()
        if self._guard is not None:
            try:
                self._guard.check(self.global_step, **dict(zip(_TRAIN_LOGS, means, strict=True)))
            except DivergenceError:
                check_finite(batch.image, batch.image_path)
                raise
        self._train_sums += torch.tensor(means, dtype=torch.float64) * len(batch.image)
        self._train_count += len(batch.image)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means, and measure the units of the score where no validation does.

        At each step Lightning's logging would cost more than a small network's step.
        """
        super().on_train_epoch_end()
        if not any(self.trainer.num_val_batches):
            self._measure_units()
        means = (self._train_sums / self._train_count).float().to(self.device)
        self.log_dict(dict(zip(_TRAIN_LOGS, means, strict=True)), prog_bar=True, sync_dist=True)

    def on_validation_start(self) -> None:
        """Measure the units of the score, which the thresholds that the validation sets have to be in.

        Each validation of a fit does so, not the end of the fit alone, since its weights may turn out to be the best:
        they are kept, and saved in checkpoints, with the units and the thresholds that belong to them.
        """
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._measure_units()

    def _measure_units(self) -> None:
        if self.score_scale == "none":
            self.model.score.measure(None)
            return
        terms = normal_terms(self, lambda batch: self.model.reconstruct(batch.image, batch.image_path).terms)
        # A diverged network has no units. The validation that follows stops the fit.
        if terms is not None:
            self.model.score.measure(terms)

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Predictions of a batch, and the loss of its normal images."""
        del batch_idx
        found = self.model.reconstruct(batch.image, batch.image_path)
        normal = is_normal(batch)
        if normal.any():
            terms = TollTerms(*(term[normal] for term in found.terms))
            self.val_loss.update(self.model.loss.losses(terms))
            self.val_reconstruction.update(terms.reconstruction)
            self.val_latent.update(terms.latent)
        return batch.update(**self.model.predict(found)._asdict())

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` and its terms, where there was a normal image.

        Raises:
            DivergenceError: In a fit, if one is not finite; the weights of the epoch's start are put back.
        """
        super().on_validation_epoch_end()
        if not updated_anywhere(self.val_loss)[0]:
            return
        for name in _VALIDATION_LOGS:
            metric: MeanMetric = getattr(self, name)
            value = metric.compute()
            metric.reset()
            if self._guard is not None:
                self._guard.check(self.global_step, **{name: float(value)})
            self.log(name, value, prog_bar=name == "val_loss")

    def on_fit_end(self) -> None:
        """Warn where the chosen weights fail in one of the ways of :class:`toll_plugin.core.CollapseMonitor`."""
        super().on_fit_end()
        if self._guard is not None:
            self._guard.keep(self.global_step)
            self._guard = None
        if self.trainer.fast_dev_run:
            return
        self.findings = self._diagnose()
        if self.trainer.is_global_zero:
            warn(self.findings)

    def _diagnose(self) -> list[Finding]:
        monitor = CollapseMonitor()
        with evaluating(self.model), torch.no_grad():
            for batch in validation_batches(self):
                found = self.model.reconstruct(batch.image)
                monitor.update(found.x, found.terms, ~is_normal(batch), exponent=self.model.loss.exponent)
        # Where the score has no latent term it need not separate anything.
        scored = self.model.score.has_latent
        return [f for f in monitor.findings() if scored or f.signature != "latent_does_not_separate"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the best weights, and whether encoder and decoder were passed."""
        super().on_save_checkpoint(checkpoint)
        if self._trainer is not None:
            self._best_weights.on_save_checkpoint(self.trainer, self, checkpoint)
        checkpoint[_OWN_NETWORK] = self._own_network

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what the base classes store.

        Raises:
            ValueError: If the checkpoint was trained with modules that were not passed.
        """
        if checkpoint.get(_OWN_NETWORK, False) and not self._own_network:
            msg = (
                "the checkpoint was trained with an encoder and a decoder of your own, which it does not store: "
                "pass encoder and decoder to Toll, or to load_from_checkpoint"
            )
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)


def _strength(beta: Beta, strength: float | None) -> float:
    """The strength that belongs to ``beta``: a number takes none, and :class:`TollLoss` refuses another than 1."""
    if strength is not None:
        return strength
    return _STRENGTH if beta == "auto" else 1.0


class _StopByValLoss(EarlyStopping):
    """The model's own early stopping, told apart from a user's. Its name is a key in checkpoints."""
