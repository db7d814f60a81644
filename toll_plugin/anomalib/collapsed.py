"""anomalib's models with targeted collapse, ready to be named in a config.

Each says where its host's latent is; everything else is :class:`TargetedCollapseMixin` and the host, whose
arguments they take as keywords.

The term is there to be tried: ``collapse_weight`` is 0 by default, which is the bare host, but in SuperSimpleNet and
GLASS. Of six hosts measured these two gained, by the norm in the score; in the others the term gained nothing that
lasts, or cost (benchmarks/results/mixin.md). Four were not measured. Each docstring names a weight to begin
with, which makes the term about a tenth of the host's loss at the first step, to one digit; no label was used to choose
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from anomalib.models.image import (
    Dinomaly,
    Draem,
    EfficientAd,
    Fre,
    Ganomaly,
    Glass,
    InpFormer,
    ReverseDistillation,
    Supersimplenet,
    UniNet,
)
from torch import Tensor
from torch.nn import functional

from toll_plugin.anomalib.mixin import TargetedCollapseMixin
from toll_plugin.core.layers import LayerPass

__all__ = [
    "CollapsedDinomaly",
    "CollapsedDraem",
    "CollapsedEfficientAd",
    "CollapsedFre",
    "CollapsedGanomaly",
    "CollapsedGlass",
    "CollapsedInpFormer",
    "CollapsedReverseDistillation",
    "CollapsedSupersimplenet",
    "CollapsedUniNet",
]


class CollapsedGanomaly(TargetedCollapseMixin, Ganomaly):
    """GANomaly; the latent is the first encoder's, the term enters the generator's loss.

    A weight of 1 makes it a tenth of that loss, and a tenth of the score of training images. It gained nothing, and
    more likely cost.
    """

    collapse_layer = "model.generator.encoder1"
    collapse_weight = 0.0
    collapse_backward = 0

    def collapse_score_factor(self) -> float:
        """Its score, the mean square of two latents' difference, is that much smaller than its loss."""
        return 0.001


class CollapsedReverseDistillation(TargetedCollapseMixin, ReverseDistillation):
    """Reverse Distillation; the latent is the bottleneck between teacher and student.

    A weight of 0.01 makes the term a tenth of the loss. It gained nothing beyond its error, and its norm in the score
    cost.
    """

    collapse_layer = "model.bottleneck"
    collapse_weight = 0.0


class CollapsedUniNet(TargetedCollapseMixin, UniNet):
    """UniNet; the latent is the bottleneck, which sees each image twice, by both teachers.

    A weight of 0.01 makes the term a tenth of the loss. Not measured.
    """

    collapse_layer = "model.bottleneck"
    collapse_weight = 0.0

    def collapse_latent(self, passes: Sequence[LayerPass], batch_size: int) -> Tensor:
        """Both teachers' latents of an image, side by side."""
        latents = super().collapse_latent(passes, batch_size)
        return torch.cat(latents.chunk(2), dim=1)


class CollapsedDinomaly(TargetedCollapseMixin, Dinomaly):
    """Dinomaly; the latent is the noisy bottleneck's tokens.

    A weight of 0.5 makes the term a tenth of the loss. Not measured.
    """

    collapse_layer = "model.bottleneck.0"
    collapse_weight = 0.0


class CollapsedInpFormer(TargetedCollapseMixin, InpFormer):
    """INP-Former; the latent is the bottleneck's tokens.

    A weight of 0.5 makes the term a tenth of the loss. Not measured.
    """

    collapse_layer = "model.bottleneck.0"
    collapse_weight = 0.0


class CollapsedFre(TargetedCollapseMixin, Fre):
    """FRE; the latent is the code inside its tied autoencoder.

    A weight of 0.002 makes the term a tenth of the loss. It gained on a part that the host sees at chance, nothing on
    digits, and cost much on two other parts.
    """

    collapse_layer = "model.fre_model"
    collapse_weight = 0.0

    def collapse_score_factor(self) -> float:
        """The features' number, over which the loss takes the mean and the score the sum."""
        return float(self.model.fre_model.input_dim)

    def collapse_latent(self, passes: Sequence[LayerPass], batch_size: int) -> Tensor:
        """The code again, from the features: the autoencoder has no module that returns it."""
        super().collapse_latent(passes, batch_size)
        autoencoder, (features,), _ = passes[0]
        latent: Tensor = functional.linear(features, autoencoder.weight, autoencoder.encoder_bias)  # type: ignore[arg-type]
        return latent


class CollapsedEfficientAd(TargetedCollapseMixin, EfficientAd):
    """EfficientAD; the latent is that of its autoencoder, whose part of the score it joins.

    A weight of 1 makes the term a tenth of the loss. Not measured.
    """

    collapse_layer = "model.ae.encoder"
    collapse_weight = 0.0


class CollapsedSupersimplenet(TargetedCollapseMixin, Supersimplenet):
    """SuperSimpleNet; the latent is the adapted features, before synthetic anomalies are added.

    The default weight makes the term a tenth of the loss, which changed nothing; its norm in the score gained.
    """

    collapse_layer = "model.adaptor"
    collapse_weight = 0.05


class CollapsedDraem(TargetedCollapseMixin, Draem):
    """DRAEM; the latent is the reconstructive encoder's, of the images without synthetic anomaly.

    A weight of 0.01 makes the term a tenth of the loss. It gained nothing.
    """

    collapse_layer = "model.reconstructive_subnetwork.encoder"
    collapse_weight = 0.0
    collapse_synthetic = "augmenter"


class CollapsedGlass(TargetedCollapseMixin, Glass):
    """GLASS; the latent is the projected patches of the images as they are.

    The default weight makes the term a tenth of the loss, which changed nothing; its norm in the score gained.
    """

    collapse_layer = "model.projection"
    collapse_weight = 0.05
    collapse_backward = 0

    def collapse_latent(self, passes: Sequence[LayerPass], batch_size: int) -> Tensor:
        """The last pass's patches per image; in training a pass with synthetic anomalies comes first."""
        output = passes[-1].output
        patches = output[0] if isinstance(output, tuple | list) else output
        latent = super().collapse_latent([passes[-1]._replace(output=patches)], batch_size)
        return latent.reshape(batch_size, -1, latent.shape[-1])
