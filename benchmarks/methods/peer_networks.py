"""Networks and losses of the peers: each puts its own idea beside Toll's encoder and decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from toll_plugin.core import ConvAutoencoder, TollLoss, TollTerms
from toll_plugin.core.modes import evaluating
from toll_plugin.core.objective import norm_per_sample

#: Of every network here.
LATENT_DIM = 32

#: Images that are scored at once.
SCORING_BATCH = 256


class PenaltyLoss(TollLoss):
    """Toll's loss with the penalty that the network returns in the place of the latent's norm."""

    def terms(self, x: Tensor, reconstruction: Tensor, latent: Tensor, penalty: Tensor) -> TollTerms:
        return super().terms(x, reconstruction, latent)._replace(latent=penalty)


class ObjectiveLoss(TollLoss):
    """What the network itself returns per sample, for networks that reconstruct nothing."""

    def terms(self, x: Tensor, objective: Tensor, latent: Tensor) -> TollTerms:  # noqa: ARG002  the loop passes x
        return TollTerms(objective, torch.zeros_like(objective))


class Penalised(nn.Module):
    """Toll's autoencoder, and a norm of its latent as the penalty."""

    def __init__(self, body: ConvAutoencoder, order: int = 2) -> None:
        super().__init__()
        self.encoder, self.decoder, self.input_shape = body.encoder, body.decoder, body.input_shape
        self._order = order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.encoder(x)
        return self.decoder(latent), latent, torch.linalg.vector_norm(latent, self._order, dim=1)


def _own_generator() -> torch.Generator:
    """For the draws of a network, seeded from the global generator, which :meth:`Peer.fit` forks and seeds."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


class Contractive(Penalised):
    """The squared norm of the encoder's Jacobian as the penalty, from one random projection."""

    def __init__(self, body: ConvAutoencoder) -> None:
        super().__init__(body)
        self._generator = _own_generator()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The same signs in every validation, so that epochs are compared on equal terms.
        generator = self._generator if self.training else torch.Generator().manual_seed(0)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            latent = self.encoder(x)
            signs = torch.randint(2, latent.shape, generator=generator) * 2.0 - 1.0
            (slope,) = torch.autograd.grad((signs * latent).sum(), x, create_graph=self.training)
        return self.decoder(latent), latent, norm_per_sample(slope, 2)


class Variational(Penalised):
    """A mean and a variance of the latent, drawn from in training only."""

    def __init__(self, body: ConvAutoencoder) -> None:
        super().__init__(body)
        self.log_variance = nn.Linear(body.encoder[-1].in_features, LATENT_DIM)
        self._generator = _own_generator()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.encoder[:-1](x)
        mean, log_variance = self.encoder[-1](features), self.log_variance(features)
        latent = mean
        if self.training:
            latent = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=self._generator)
        return self.decoder(latent), mean, standard_normal_divergence(mean, log_variance)


def standard_normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, variance) from N(0, 1), summed over each row."""
    return (log_variance.exp() + mean.square() - 1 - log_variance).sum(dim=1) / 2


class Memory(Penalised):
    """The decoder sees a mixture of remembered items, not the latent; the entropy of its weights is the penalty."""

    def __init__(self, body: ConvAutoencoder, n_slots: int, threshold: float) -> None:
        super().__init__(body)
        self.slots = nn.Parameter(torch.empty(n_slots, LATENT_DIM).uniform_(-1, 1) / LATENT_DIM**0.5)
        self._threshold = threshold

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.encoder(x)
        cosines = functional.normalize(latent, dim=1) @ functional.normalize(self.slots, dim=1).T
        weights = hard_shrinkage(cosines.softmax(dim=1), self._threshold)
        # The small number keeps the gradient finite where a weight is zero.
        entropy = -(weights * (weights + 1e-12).log()).sum(dim=1)
        return self.decoder(weights @ self.slots), latent, entropy


def hard_shrinkage(weights: Tensor, threshold: float) -> Tensor:
    """Rows of weights with those below ``threshold`` set to zero and the others divided by their sum."""
    return functional.normalize(weights * (weights >= threshold), p=1, dim=1)


class Sphere(nn.Module):
    """Toll's encoder without biases and BatchNorm's parameters; the squared distance of its latent to a centre."""

    def __init__(self, body: ConvAutoencoder) -> None:
        super().__init__()
        for layer in body.encoder:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight, layer.affine = None, False
            if isinstance(layer, nn.BatchNorm2d | nn.Linear):
                layer.bias = None
        self.encoder, self.input_shape = body.encoder, body.input_shape
        self.register_buffer("centre", torch.zeros(LATENT_DIM))

    @torch.no_grad()
    def place(self, train: Tensor) -> None:
        """Put the centre at the mean latent, away from 0 in each coordinate."""
        with evaluating(self):
            mean = torch.cat([self.encoder(part) for part in torch.split(train, SCORING_BATCH)]).mean(dim=0)
        self.centre.copy_(torch.where(mean.abs() < 0.1, torch.where(mean < 0, -0.1, 0.1), mean))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.encoder(x)
        return norm_per_sample(latent - self.centre, 2), latent


class Classifier(nn.Module):
    """Toll's encoder and a linear layer tell eight transformations apart; minus the true one's log-probability."""

    def __init__(self, body: ConvAutoencoder) -> None:
        super().__init__()
        if body.input_shape[1] != body.input_shape[2]:
            msg = f"images must be square to be turned by quarters, got {body.input_shape[1:]} (height, width)"
            raise ValueError(msg)
        self.encoder, self.input_shape = body.encoder, body.input_shape
        self.head = nn.Linear(LATENT_DIM, 8)
        self._generator = _own_generator()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            kinds = torch.randint(8, (len(x),), generator=self._generator)
            turned = [transformed(image, kind) for image, kind in zip(x, kinds.tolist(), strict=True)]
            return self._surprise(torch.stack(turned), kinds)
        all_ways = [self._surprise(transformed(x, kind), torch.full((len(x),), kind)) for kind in range(8)]
        return torch.stack([surprise for surprise, _ in all_ways]).mean(dim=0), all_ways[0][1]

    def _surprise(self, x: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.encoder(x)
        return functional.cross_entropy(self.head(latent), kinds, reduction="none"), latent


def transformed(x: Tensor, kind: int) -> Tensor:
    """Images turned by ``kind % 4`` quarters, from 4 on mirrored before."""
    return torch.rot90(x.flip(-1) if kind >= 4 else x, kind % 4, (-2, -1))
