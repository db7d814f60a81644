"""PyOD's deep detectors with targeted collapse, ready to use.

Each says where its host's latent is; everything else is :class:`TargetedCollapseMixin` and the
host, whose arguments they take. The term weighs 0.1, as ``beta`` does in :class:`TollDetector`.
"""

from __future__ import annotations

from pyod.models.ae1svm import AE1SVM
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.deep_svdd import DeepSVDD
from pyod.models.vae import VAE

from toll_plugin.pyod.mixin import TargetedCollapseMixin

__all__ = ["CollapsedAE1SVM", "CollapsedAutoEncoder", "CollapsedDeepSVDD", "CollapsedVAE"]


class CollapsedAutoEncoder(TargetedCollapseMixin, AutoEncoder):
    """PyOD's autoencoder; the latent is its encoder's output."""

    collapse_layer = "model.encoder"


class CollapsedVAE(TargetedCollapseMixin, VAE):
    """PyOD's variational autoencoder; the latent is the mean of the code."""

    collapse_layer = "model.encoder_mu"


class CollapsedAE1SVM(TargetedCollapseMixin, AE1SVM):
    """PyOD's autoencoder with a one-class SVM on its code, which is the latent."""

    collapse_layer = "model.encoder"
    collapse_network = "model"


class CollapsedDeepSVDD(TargetedCollapseMixin, DeepSVDD):
    """PyOD's Deep SVDD; the latent is its code, before the last activation."""

    collapse_layer = "model_.model.net_output"
    collapse_network = "model_"
