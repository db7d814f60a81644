"""Other ideas on Toll's own network and in its own training loop, so that only the idea differs.

They are not their authors' models: network, optimiser, batches and early stopping are Toll's, and so
is the reconstruction error, a norm that is not squared. No default was chosen by test labels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.interfaces import Budget, Detector, Scored, Split
from benchmarks.methods.peer_networks import (
    LATENT_DIM,
    SCORING_BATCH,
    Classifier,
    Contractive,
    Memory,
    ObjectiveLoss,
    Penalised,
    PenaltyLoss,
    Sphere,
    Variational,
)
from toll_plugin.core import ConvAutoencoder, History, TollLoss, fit
from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.core.modes import evaluating
from toll_plugin.core.objective import ScoreTerm, norm_per_sample

_MAX_EPOCHS = 200


class Peer(Detector):
    """What all share: the start, which is the same for all autoencoders of a seed, the loop and the scoring.

    ``weight`` is the penalty's, in units of the reconstruction error; ``noise`` is on training inputs.
    """

    term: ScoreTerm = "reconstruction"
    loss: type[TollLoss] = PenaltyLoss
    kind: type[nn.Module] = Penalised

    def __init__(self, budget: Budget, seed: int, weight: float = 0.0, noise: float = 0.0) -> None:
        epochs = _MAX_EPOCHS if budget.max_epochs is None else budget.max_epochs
        self.max_epochs = check_integer("max_epochs", epochs, minimum=1)
        self.seed = check_integer("seed", seed, minimum=0)
        self.objective = self.loss(check_finite_float("weight", weight, minimum=0))
        self.noise = check_finite_float("noise", noise, minimum=0)

    def fit(self, split: Split) -> None:
        train = _floats("train", split.train)
        validation = _floats("validation", split.validation) if len(split.validation) else None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            body = ConvAutoencoder(tuple(train.shape[2:]), train.shape[1], LATENT_DIM)
            self.network = self.build(body)
        order = torch.Generator().manual_seed(self.seed)
        learn = partial(fit, x=train, validation=validation, noise=self.noise, generator=order)
        self.history = self.learn(body, train, learn)

    def build(self, body: ConvAutoencoder) -> nn.Module:
        """What is trained and scores; its outputs are what the loss's ``terms`` takes, the second is the latent."""
        return self.kind(body)

    def learn(self, body: ConvAutoencoder, train: Tensor, learn: Callable[..., History]) -> History:  # noqa: ARG002
        return learn(self.network, loss=self.objective, max_epochs=self.max_epochs)

    def score(self, samples: Tensor) -> Scored:
        with evaluating(self.network), torch.no_grad():
            parts = [self._scored(_floats("samples", part)) for part in torch.split(samples, SCORING_BATCH)]
        scores, reconstruction, latent = torch.cat(parts, dim=1).double().numpy()
        terms = {"reconstruction": reconstruction} if self.loss is PenaltyLoss else {}
        return Scored(scores, {**terms, "latent": latent})

    def _scored(self, x: Tensor) -> Tensor:
        outputs = self.outputs(x)
        terms = self.objective.terms(x, *outputs)
        score = self.objective.score(terms, self.term)
        return torch.stack([score, terms.reconstruction, norm_per_sample(outputs[1], 1)])

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.network(x)

    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.network.state_dict().values())

    def facts(self) -> dict[str, Any]:
        """Epochs run, the one, counted from 1, whose weights score, and the parameters of what scores."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return {"epochs": len(self.history.total), "best_epoch": self.history.best_epoch + 1, "parameters": parameters}


def _floats(name: str, images: Tensor) -> Tensor:
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        what = f"{images.dtype} of shape {tuple(images.shape)}"
        msg = f"{name} must be images (N, C, H, W), bytes or floats in [0, 1], got {what}"
        raise ValueError(msg)
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class TollAE(Peer):
    """Toll itself (arXiv 2306.12627); scores by the sum of its terms. ``beta`` is the plugin's default."""

    term = "total"

    def __init__(self, budget: Budget, seed: int, beta: float = 0.01) -> None:
        super().__init__(budget, seed, check_finite_float("beta", beta, minimum=0))


class AE(TollAE):
    """The plain autoencoder: Toll with a beta of 0."""

    def __init__(self, budget: Budget, seed: int) -> None:
        super().__init__(budget, seed, beta=0.0)


class MemAE(Peer):
    """MemAE-like: the memory of Gong et al. (arXiv 1904.02639) between Toll's encoder and decoder.

    The authors add 0.0002 times the entropy of the addressing to the squared error. Here it joins the
    error e itself, whose slope is smaller by 2 e, so that it pulls 2 e times as hard, and weakly even so.

    Args:
        n_slots: N, items of the latent's length; the authors take 100 for MNIST.
        threshold: Addressing weights below it are dropped, from 1/N to 3/N. At 1/N, the default,
            the largest weight always stays; above it a memory can fall silent.
        weight: Of the entropy.
    """

    def __init__(
        self, budget: Budget, seed: int, n_slots: int = 100, threshold: float | None = None, weight: float = 0.0002
    ) -> None:
        super().__init__(budget, seed, weight)
        self.n_slots = n = check_integer("n_slots", n_slots, minimum=2)
        self.threshold = 1 / n if threshold is None else check_finite_float("threshold", threshold)
        if not 1 / n <= self.threshold <= 3 / n:
            msg = f"threshold must be from 1 to 3 times 1/n_slots, {1 / n:g} to {3 / n:g}, got {threshold!r}"
            raise ValueError(msg)

    def build(self, body: ConvAutoencoder) -> nn.Module:
        return Memory(body, self.n_slots, self.threshold)


class SparseAE(Peer):
    """Autoencoder with the L1 norm of the latent as its penalty.

    The L1 norm of 32 Gaussian values is about 4.5 times their L2 norm, so 0.002 pulls about as hard
    as Toll's 0.01 does.
    """

    def __init__(self, budget: Budget, seed: int, weight: float = 0.002) -> None:
        super().__init__(budget, seed, weight)

    def build(self, body: ConvAutoencoder) -> nn.Module:
        return Penalised(body, order=1)


class ContractiveAE(Peer):
    r"""Contractive autoencoder (Rifai et al. 2011): :math:`\|J\|_F^2` of the encoder as the penalty.

    Each step estimates it without bias from one projection, :math:`E\|v^T J\|^2` with random signs v.
    BatchNorm couples the samples of a training batch, so there J holds the derivatives of the
    whole batch's latents by one image. The authors tie the decoder's weights to the encoder's; here the
    decoder can undo a small scale. Small noise of standard deviation s acts like a penalty of
    weight s² (Alain & Bengio, arXiv 1211.4246): 0.01 is that of :class:`DenoisingAE`'s 0.1.
    """

    kind = Contractive

    def __init__(self, budget: Budget, seed: int, weight: float = 0.01) -> None:
        super().__init__(budget, seed, weight)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return Penalised.forward(self.network, x)  # the score needs no Jacobian


class DenoisingAE(Peer):
    """Denoising autoencoder (Vincent et al. 2008): noisy inputs, clean targets; no noise in validation and scores.

    A standard deviation of 0.1 of the pixels' range is usual for images.
    """

    def __init__(self, budget: Budget, seed: int, noise: float = 0.1) -> None:
        super().__init__(budget, seed, noise=noise)


class VAE(Peer):
    """Variational autoencoder (Kingma & Welling, arXiv 1312.6114); validated and scored at the mean, without a draw.

    The one change to the network: a second linear layer beside the encoder's last gives the
    logarithm of the variance. With the decoder's best variance the likelihood of an error e on D pixels
    is D log e (Rybkin et al., arXiv 2006.13202), so e itself goes with a weight of e / D: 0.02
    for 1.3 on 64 pixels, 0.005 for 4 on 784. The default lies between.
    """

    term, kind = "total", Variational

    def __init__(self, budget: Budget, seed: int, weight: float = 0.01) -> None:
        super().__init__(budget, seed, weight)


class DeepSVDD(Peer):
    """One-class Deep SVDD (Ruff et al. 2018) with Toll's encoder: squared distance to a fixed centre.

    The encoder has no biases and its BatchNorm no parameters, the authors' condition against a
    collapse onto the centre. Their weight decay of 1e-6 is left out.

    Args:
        pretrain_epochs: Of an autoencoder with that encoder, taken from the budget. By default a fifth of it.
    """

    term, loss, kind = "total", ObjectiveLoss, Sphere

    def __init__(self, budget: Budget, seed: int, pretrain_epochs: int | None = None) -> None:
        super().__init__(budget, seed)
        epochs = self.max_epochs // 5 if pretrain_epochs is None else pretrain_epochs
        self.pretrain_epochs = check_integer("pretrain_epochs", epochs, minimum=0)
        if epochs >= self.max_epochs:
            msg = f"pretrain_epochs must be below the budget's max_epochs {self.max_epochs}, got {epochs}"
            raise ValueError(msg)

    def learn(self, body: ConvAutoencoder, train: Tensor, learn: Callable[..., History]) -> History:
        if self.pretrain_epochs:
            learn(body, loss=TollLoss(0.0), max_epochs=self.pretrain_epochs)
        self.network.place(train)
        return learn(self.network, loss=self.objective, max_epochs=self.max_epochs - self.pretrain_epochs)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "pretrain_epochs": self.pretrain_epochs}


class Rotations(Peer):
    """Which of 8 turns and mirrorings was applied (Golan & El-Yaniv, arXiv 1805.10917; Hendrycks et al. 2019).

    An epoch shows each image once, in one way that is drawn anew, so that a budget costs what it costs
    the others; validation and score are the mean negative log-probability over all 8.
    """

    term, loss, kind = "total", ObjectiveLoss, Classifier

    def __init__(self, budget: Budget, seed: int) -> None:
        super().__init__(budget, seed)


_ALL = (TollAE, AE, MemAE, SparseAE, ContractiveAE, DenoisingAE, VAE, DeepSVDD, Rotations)
PEERS: dict[str, type[Peer]] = {peer.__name__: peer for peer in _ALL}
