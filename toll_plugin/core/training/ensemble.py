"""Several dense autoencoders trained at once, by a forward and a backward pass written out in NumPy.

On tables the networks are so small that autograd's bookkeeping, and even torch's calls, cost
more than the arithmetic. Here the weights of M equal networks lie in one buffer, so an optimiser
steps on one tensor, and the features of all members lie side by side, ``(N, M * features)``, so that
what is done to each feature by itself is done to all members at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from toll_plugin.core.modes import evaluating
from toll_plugin.core.networks import DenseAutoencoder, blocks
from toll_plugin.core.objective import TollLoss, TollTerms, terms_of_residual
from toll_plugin.core.training.batch_norm import Array, Dropout, Norm, NormTrace, Weights
from toll_plugin.core.training.learners import Learner
from toll_plugin.core.training.optimizers import MakeOptimizer

__all__ = ["DenseEnsemble", "DenseLearner"]


class _Layer(NamedTuple):
    """A linear layer of all members and what follows it; ``hidden`` means a ReLU does."""

    weight: Weights
    bias: Weights
    norm: Norm | None
    hidden: bool
    dropout: float


class _Room(NamedTuple):
    """Arrays of one layer's passes, ``(N, M * outputs)``, and the same memory by member, ``(M, N, outputs)``.

    Steps use them again: to be given new ones by the system, and to look at them in another way, takes longer than
    to fill them.

    Attributes:
        product: The linear layer's output, which a BatchNorm normalises in place.
        output: What the next layer gets.
        slope: Gradient of ``output``.
        mask: Of a dropout; of no rows if there is none.
        by_member: The first three, by member.
    """

    product: Array
    output: Array
    slope: Array
    mask: Array
    by_member: tuple[Array, Array, Array]

    @classmethod
    def of(cls, layer: _Layer, count: int) -> _Room:
        members, outputs, _ = layer.weight.value.shape
        shape, dtype = (count, members * outputs), layer.weight.value.dtype
        product, slope = np.empty(shape, dtype), np.empty(shape, dtype)
        output = product if layer.norm is None else np.empty(shape, dtype)
        views = [array.reshape(count, members, outputs).swapaxes(0, 1) for array in (product, output, slope)]
        mask = np.empty(shape if layer.dropout else (0, shape[1]), dtype)
        return cls(product, output, slope, mask, (views[0], views[1], views[2]))


class _Trace(NamedTuple):
    """What one layer's forward pass leaves for its backward pass, beside what is in its room."""

    inputs: Array
    norm: NormTrace | None
    dropout: Dropout | None


class DenseEnsemble(nn.Module):
    """M dense autoencoders of one shape, as one module with one parameter, on the CPU.

    The networks' weights are copied; :meth:`write_back` copies them into the networks again. A
    linear bias in front of a BatchNorm has no effect on a batch of two and more: it is not trained.

    Args:
        networks: The members, at least one, all of one shape.
        generator: Source of dropout masks; by default the global one.

    Shape:
        ``x`` is ``(N, n_features)``, the same for every member; out come reconstructions
        ``(M, N, n_features)`` and latents ``(M, N, latent_dim)``. A batch of one sample is
        normalised by the running statistics.

    Raises:
        ValueError: If there is no network, or their shapes differ.

    Example:
        >>> import torch
        >>> from toll_plugin.core import DenseAutoencoder
        >>> ensemble = DenseEnsemble([DenseAutoencoder(6, (8,), 2) for _ in range(3)])
        >>> [tuple(t.shape) for t in ensemble(torch.zeros(5, 6))]
        [(3, 5, 6), (3, 5, 2)]
    """

    def __init__(self, networks: Sequence[DenseAutoencoder], *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        shapes = [[(name, tuple(value.shape)) for name, value in network.named_parameters()] for network in networks]
        if not networks or any(shape != shapes[0] for shape in shapes):
            msg = f"networks must be at least one, all of one shape, got {len(networks)} with the parameters {shapes}"
            raise ValueError(msg)
        self.networks = list(networks)  # a list, so that their parameters are not this module's
        # NumPy draws masks much faster than torch does.
        seed = torch.randint(2**62, (), generator=generator) if any(_dropout(networks[0])) else torch.zeros(())
        self._random = np.random.SFC64(int(seed))
        self.members = len(networks)
        self.input_shape = networks[0].input_shape
        size = self.members * sum(math.prod(shape) for _, shape in shapes[0])
        self.flat = nn.Parameter(torch.empty(size, dtype=next(networks[0].parameters()).dtype))
        self.flat.grad = self.gradient = torch.zeros_like(self.flat)
        # NumPy's views of the same memory: what an optimiser does to the parameter is seen here.
        self._values, self._gradients, self._used = self.flat.detach().numpy(), self.gradient.numpy(), 0
        members = [blocks(network.encoder) + blocks(network.decoder) for network in networks]
        self._layers = [self._join(layer) for layer in zip(*members, strict=True)]
        self._latent = len(blocks(networks[0].encoder)) - 1
        self._traces: list[_Trace] = []
        self._rooms: dict[int, list[_Room]] = {}

    def _join(self, members: Sequence[list[nn.Module]]) -> _Layer:
        """One layer from the members' modules, ``members[m] = [linear, norm?, relu?, dropout?]``."""
        linear, *rest = zip(*members, strict=True)
        weight, bias = (self._take([getattr(m, name) for m in linear]) for name in ("weight", "bias"))
        norm, dropout = None, 0.0
        for modules in rest:
            first = modules[0]
            if isinstance(first, nn.BatchNorm1d):
                mean, variance = (torch.stack([getattr(m, f"running_{s}") for m in modules]) for s in ("mean", "var"))
                # What is normalised here lacks the bias, so its mean does too.
                mean -= torch.from_numpy(bias.value)
                self.register_buffer(f"mean{len(list(self.buffers()))}", mean)
                self.register_buffer(f"variance{len(list(self.buffers()))}", variance)
                scale, shift = (self._take([getattr(m, name) for m in modules]) for name in ("weight", "bias"))
                statistics = (mean.numpy().reshape(-1), variance.numpy().reshape(-1))
                norm = Norm(scale.flat(), shift.flat(), *statistics, first.momentum or 0.1, first.eps)
            elif isinstance(first, nn.Dropout):
                dropout = first.p
        return _Layer(weight, bias, norm, bool(rest), dropout)

    def _take(self, members: Sequence[Tensor]) -> Weights:
        values = torch.stack([value.detach().cpu() for value in members]).numpy()
        part = slice(self._used, self._used + values.size)
        self._used = part.stop
        view = self._values[part].reshape(values.shape)
        view[...] = values
        return Weights(view, self._gradients[part].reshape(values.shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions and latents, without gradients."""
        reconstruction, latent = (torch.from_numpy(array.copy()).transpose(0, 1) for array in self.run(x.numpy()))
        return reconstruction, latent

    def run(self, x: Array) -> tuple[Array, Array]:
        """Reconstructions ``(N, M, n_features)`` and latents ``(N, M, latent_dim)`` of rows ``(N, n_features)``.

        In training mode, what :meth:`backward` needs is kept. The next call overwrites what is returned.
        """
        self._traces.clear()
        rooms, inputs = self._rooms_of(len(x)), x
        for i, (layer, room) in enumerate(zip(self._layers, rooms, strict=True)):
            if i == 0:  # one product for all members, which share their input
                np.matmul(x, layer.weight.value.reshape(-1, x.shape[1]).T, out=room.product)
            else:
                inputs = rooms[i - 1].by_member[1]
                np.matmul(inputs, layer.weight.value.swapaxes(1, 2), out=room.by_member[0])
            self._traces.append(_Trace(inputs, *self._activate(layer, room)))
        shape = (len(x), self.members, -1)
        return rooms[-1].output.reshape(shape), rooms[self._latent].output.reshape(shape)

    def _rooms_of(self, count: int) -> list[_Room]:
        if count not in self._rooms:
            while len(self._rooms) >= _SIZES:
                del self._rooms[next(iter(self._rooms))]
            self._rooms[count] = [_Room.of(layer, count) for layer in self._layers]
        return self._rooms[count]

    def _activate(self, layer: _Layer, room: _Room) -> tuple[NormTrace | None, Dropout | None]:
        """From a layer's product to its output."""
        dropout, norm = None, None
        if layer.dropout and self.training:
            dropout = Dropout.draw(layer.dropout, room.mask, self._random)
        if layer.norm is not None:
            own = self.training and len(room.product) > 1
            norm = layer.norm.forward(room.product, room.output, training=own, dropout=dropout)
        else:
            room.output[...] += layer.bias.value.reshape(-1)
            if layer.hidden:
                np.maximum(room.output, 0, out=room.output)
            if dropout is not None:
                dropout.apply(room.output)
        return norm, dropout

    def backward(self, d_reconstruction: Array, d_latent: Array) -> None:
        """Set ``flat.grad`` from the gradients of what the last :meth:`run` in training mode returned."""
        count = len(d_reconstruction)
        rooms = self._rooms[count]
        rooms[-1].slope[...] = d_reconstruction.reshape(count, -1)
        for i in reversed(range(len(self._layers))):
            layer, room, trace = self._layers[i], rooms[i], self._traces[i]
            d = room.slope
            if i == self._latent:
                d += d_latent.reshape(count, -1)
            if layer.norm is not None and trace.norm is not None:
                layer.norm.backward(d, trace.norm)
            else:
                if trace.dropout is not None:
                    d *= trace.dropout.mask
                if layer.hidden:
                    d *= room.output > 0
                np.add.reduce(d, axis=0, out=layer.bias.gradient.reshape(-1))
            if i == 0:
                np.matmul(d.T, trace.inputs, out=layer.weight.gradient.reshape(d.shape[1], -1))
            else:
                members = room.by_member[2]
                np.matmul(members.swapaxes(1, 2), trace.inputs, out=layer.weight.gradient)
                np.matmul(members, layer.weight.value, out=rooms[i - 1].by_member[2])

    def member_tensors(self) -> Iterator[Tensor]:
        """Every weight and statistic, each ``(M, *)``; writing to them changes the ensemble."""
        for layer in self._layers:
            arrays = [layer.weight.value, layer.bias.value]
            if layer.norm is not None:
                norm = layer.norm
                arrays += [a.reshape(self.members, -1) for a in (norm.scale.value, norm.shift.value, *norm[2:4])]
            yield from map(torch.from_numpy, arrays)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the weights and statistics into the networks that the ensemble was made from."""
        for m, network in enumerate(self.networks):
            modules = blocks(network.encoder) + blocks(network.decoder)
            for (linear, *rest), layer in zip(modules, self._layers, strict=True):
                _copy(linear, weight=layer.weight.value[m], bias=layer.bias.value[m])
                for norm in rest:
                    if isinstance(norm, nn.BatchNorm1d) and layer.norm is not None:
                        scale, shift, mean, variance = (
                            array.reshape(self.members, -1)[m]
                            for array in (layer.norm.scale.value, layer.norm.shift.value, *layer.norm[2:4])
                        )
                        _copy(norm, weight=scale, bias=shift)
                        _copy(norm, running_mean=mean + layer.bias.value[m], running_var=variance)


#: For so many numbers of samples arrays are kept: a batch and the last one of an epoch, in training and evaluation.
_SIZES = 4


def _dropout(network: nn.Module) -> Iterator[float]:
    return (module.p for module in network.modules() if isinstance(module, nn.Dropout))


def _copy(module: nn.Module, **values: Array) -> None:
    for name, value in values.items():
        getattr(module, name).copy_(torch.from_numpy(value))


class DenseLearner(Learner):
    """Several dense autoencoders on the CPU at once, by the step that :class:`DenseEnsemble` writes out.

    Args:
        networks: The members.
        losses: One per member, all of one exponent.
        make: Makes the optimiser of all weights, as one parameter.
        generator: Source of dropout masks.
    """

    def __init__(
        self,
        networks: Sequence[DenseAutoencoder],
        losses: Sequence[TollLoss],
        make: MakeOptimizer,
        generator: torch.Generator,
    ) -> None:
        self.module = self.ensemble = DenseEnsemble(networks, generator=generator)
        self.members = self.ensemble.members
        self.losses = []
        for loss, group in itertools.groupby(losses):
            start = self.losses[-1][0].stop if self.losses else 0
            self.losses.append((slice(start, start + len(list(group))), loss))
        self.optimizer = make([self.ensemble.flat])

    def _terms(self, residual: Array, latent: Array) -> TollTerms[Array]:
        """The terms of all members' samples, ``(M, N)``."""
        rows = (array.reshape(-1, array.shape[2]) for array in (residual, latent))
        terms = terms_of_residual(*rows, exponent=self.losses[0][1].exponent)
        return TollTerms(*(np.ascontiguousarray(term.reshape(-1, self.members).T) for term in terms))

    def _slopes(self, terms: TollTerms[Array]) -> tuple[Array, Array]:
        found = [loss.slopes(TollTerms(*(term[which] for term in terms))) for which, loss in self.losses]
        a, b = (np.concatenate(slopes) if len(slopes) > 1 else slopes[0] for slopes in zip(*found, strict=True))
        return a, b

    @override
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        residual, latent = self.ensemble.run(inputs.numpy())
        x: Array = targets.numpy()
        residual -= x[:, None]
        terms = self._terms(residual, latent)
        # Divided by the samples of one member: each has its own weights, so their gradients do not mix.
        a, b = ((slope / len(x)).T[:, :, None] for slope in self._slopes(terms))
        residual *= a
        self.ensemble.backward(residual, latent * b)
        means = np.empty((len(terms), self.members), x.dtype)
        for mean, term in zip(means, terms, strict=True):
            np.add.reduce(term, axis=1, out=mean)
        means /= len(x)
        return torch.from_numpy(means)

    @override
    def update(self) -> None:
        self.ensemble.flat.grad = self.ensemble.gradient  # an optimiser may have let it go
        self.optimizer.step()

    @override
    @contextmanager
    def training(self) -> Iterator[None]:
        try:
            with np.errstate(all="ignore"):  # what diverges is reported by the loop
                yield
        finally:
            self.ensemble.write_back()

    @override
    @torch.no_grad()
    def terms(self, inputs: Tensor, targets: Tensor) -> TollTerms[Tensor]:
        with evaluating(self.ensemble):
            reconstruction, latent = self.ensemble.run(inputs.numpy())
            terms = self._terms(reconstruction - targets.numpy()[:, None], latent)
        return TollTerms(*(torch.from_numpy(term) for term in terms))

    @override
    def tensors(self) -> Iterator[Tensor]:
        yield from self.ensemble.member_tensors()
