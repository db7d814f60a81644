"""Several dense autoencoders trained at once, by a forward and a backward pass written out.

On tables the networks are so small that autograd's bookkeeping costs more than the arithmetic.
Here the weights of M equal networks lie in one buffer, so each layer of all of them is one
product and an optimiser steps on one tensor. Samples lie along the last axis,
``(M, features, N)``, where BatchNorm of all networks is one call over contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toll_plugin.core.networks import DenseAutoencoder

__all__ = ["DenseEnsemble", "blocks"]

_batch_norm = torch.native_batch_norm
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward
_relu_backward = torch.ops.aten.threshold_backward


class _Weights(NamedTuple):
    """One kind of weight of all members, ``(M, *)``, and its gradient; views into the buffers."""

    value: Tensor
    gradient: Tensor


class _Norm(NamedTuple):
    """A BatchNorm layer of all members."""

    scale: _Weights
    shift: _Weights
    mean: Tensor
    variance: Tensor
    momentum: float
    eps: float

    def forward(self, x: Tensor, *, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, and the batch's mean and inverse deviation for the way back."""
        scale, shift = self.scale.value.view(-1), self.shift.value.view(-1)
        running = (self.mean.view(-1), self.variance.view(-1))
        rows = x.view(1, -1, x.shape[2])
        y, mean, inverse = _batch_norm(rows, scale, shift, *running, training, self.momentum, self.eps)
        return y.view(x.shape), mean, inverse

    def backward(self, d: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, *, training: bool) -> Tensor:
        """Return the gradient of the input, and keep those of scale and shift."""
        rows = (d.view(1, -1, x.shape[2]), x.view(1, -1, x.shape[2]))
        scale, running = self.scale.value.view(-1), (self.mean.view(-1), self.variance.view(-1))
        dx, d_scale, d_shift = _batch_norm_backward(
            *rows, scale, *running, mean, inverse, training, self.eps, [True, True, True]
        )
        self.scale.gradient.view(-1).copy_(d_scale)
        self.shift.gradient.view(-1).copy_(d_shift)
        out: Tensor = dx.view(x.shape)
        return out


class _Layer(NamedTuple):
    """A linear layer of all members and what follows it; ``hidden`` means a ReLU does."""

    weight: _Weights
    bias: _Weights
    norm: _Norm | None
    hidden: bool
    dropout: float


class _Trace(NamedTuple):
    """What one layer's forward pass leaves for its backward pass."""

    inputs: Tensor
    linear: Tensor
    statistics: tuple[Tensor, ...]
    output: Tensor
    mask: Tensor | None
    training: bool


class DenseEnsemble(nn.Module):
    """M dense autoencoders of one shape, as one module with one parameter.

    The networks' weights are copied; :meth:`write_back` copies them into the networks again. A
    linear bias in front of a BatchNorm has no effect on the output: its gradient is zero.

    Args:
        networks: The members, at least one, all of one shape and on one device.
        generator: Source of dropout masks, on that device; by default the global one.

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
        self._generator = generator
        self.members = len(networks)
        self.input_shape = networks[0].input_shape
        size = self.members * sum(math.prod(shape) for _, shape in shapes[0])
        like = next(networks[0].parameters())
        self.flat = nn.Parameter(torch.empty(size, dtype=like.dtype, device=like.device))
        self.flat.grad = self._gradient = torch.zeros_like(self.flat)
        self._used = 0
        members = [blocks(network.encoder) + blocks(network.decoder) for network in networks]
        self._layers = [self._join(layer) for layer in zip(*members, strict=True)]
        self._latent = len(blocks(networks[0].encoder)) - 1
        self._traces: list[_Trace] = []

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
                self.register_buffer(f"mean{len(list(self.buffers()))}", mean.sub_(bias.value))
                self.register_buffer(f"variance{len(list(self.buffers()))}", variance)
                scale, shift = (self._take([getattr(m, name) for m in modules]) for name in ("weight", "bias"))
                norm = _Norm(scale, shift, mean, variance, first.momentum or 0.1, first.eps)
            elif isinstance(first, nn.Dropout):
                dropout = first.p
        return _Layer(weight, bias, norm, bool(rest), dropout)

    def _take(self, members: Sequence[Tensor]) -> _Weights:
        values = torch.stack([value.detach() for value in members])
        part = slice(self._used, self._used + values.numel())
        self._used = part.stop
        view = self.flat.detach()[part].view(values.shape).copy_(values)
        return _Weights(view, self._gradient[part].view(values.shape))

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions and latents; in training mode, keep what :meth:`backward` needs."""
        self._traces.clear()
        a, latent = x.T, x
        for i, layer in enumerate(self._layers):
            inputs, mask = a, None
            statistics: tuple[Tensor, ...] = ()
            a = linear = torch.matmul(layer.weight.value, a)
            statistical = self.training and len(x) > 1
            if layer.norm is None:
                a = a.add_(layer.bias.value.unsqueeze(2))
            else:
                a, *found = layer.norm.forward(linear, training=statistical)
                statistics = tuple(found)
            if layer.hidden:
                a = a.relu_() if layer.norm is not None else a.relu()
            if layer.dropout and self.training:
                mask = torch.empty_like(a).bernoulli_(1 - layer.dropout, generator=self._generator)
                a = a.mul_(mask.div_(1 - layer.dropout))
            if i == self._latent:
                latent = a
            if self.training:
                self._traces.append(_Trace(inputs, linear, statistics, a, mask, statistical))
        return a.mT, latent.mT

    @torch.no_grad()
    def backward(self, d_reconstruction: Tensor, d_latent: Tensor) -> None:
        """Set ``flat.grad`` from the gradients of what the last :meth:`forward` in training mode returned."""
        d = d_reconstruction.mT
        for i, (layer, trace) in reversed(list(enumerate(zip(self._layers, self._traces, strict=True)))):
            if i == self._latent:
                d = d + d_latent.mT
            if trace.mask is not None:
                d = d * trace.mask
            if layer.hidden:
                # Where dropout made the output zero, the mask made the gradient zero as well.
                d = _relu_backward(d, trace.output, 0)
            if layer.norm is None:
                torch.sum(d, dim=2, out=layer.bias.gradient)
            else:
                d = layer.norm.backward(d.contiguous(), trace.linear, *trace.statistics, training=trace.training)
            torch.matmul(d, trace.inputs.mT, out=layer.weight.gradient)
            if i:
                d = torch.matmul(layer.weight.value.mT, d)

    def member_tensors(self) -> Iterator[Tensor]:
        """Every weight and statistic, each ``(M, *)``; writing to them changes the ensemble."""
        for layer in self._layers:
            yield layer.weight.value
            yield layer.bias.value
            if layer.norm is not None:
                yield from (layer.norm.scale.value, layer.norm.shift.value, layer.norm.mean, layer.norm.variance)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the weights and statistics into the networks that the ensemble was made from."""
        for m, network in enumerate(self.networks):
            modules = blocks(network.encoder) + blocks(network.decoder)
            for (linear, *rest), layer in zip(modules, self._layers, strict=True):
                _copy(linear, weight=layer.weight.value[m], bias=layer.bias.value[m])
                for norm in rest:
                    if isinstance(norm, nn.BatchNorm1d) and layer.norm is not None:
                        _copy(norm, weight=layer.norm.scale.value[m], bias=layer.norm.shift.value[m])
                        mean = layer.norm.mean[m] + layer.bias.value[m]
                        _copy(norm, running_mean=mean, running_var=layer.norm.variance[m])


def _copy(module: nn.Module, **values: Tensor) -> None:
    for name, value in values.items():
        getattr(module, name).copy_(value)


def blocks(stack: nn.Module) -> list[list[nn.Module]]:
    """The modules of a dense stack, cut before every linear layer."""
    cut: list[list[nn.Module]] = []
    for module in stack.children():
        if isinstance(module, nn.Linear):
            cut.append([])
        cut[-1].append(module)
    return cut
