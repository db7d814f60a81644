"""BatchNorm, ReLU and dropout of several networks at once, forward and backward pass written out in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toll_plugin.core.training import compiled

__all__ = ["Array", "Dropout", "Norm", "NormTrace", "Weights"]

Array = NDArray[Any]


class Weights(NamedTuple):
    """One kind of weight of all members, ``(M, *)``, and its gradient; views into the buffers."""

    value: Array
    gradient: Array

    def flat(self) -> Weights:
        """The same of shape ``(M * size,)``, as the features of all members stand side by side."""
        return Weights(self.value.reshape(-1), self.gradient.reshape(-1))


class Dropout(NamedTuple):
    """Which hidden units are dropped, with which chance.

    Attributes:
        share: The chance.
        mask: Uniform numbers in [0, 1) that were drawn, one for each unit of each sample; the forward pass
            makes factors of them, 0 for the units that are dropped.
    """

    share: float
    mask: Array

    def apply(self, y: Array) -> None:
        """Make the mask and drop units of ``y`` in place."""
        np.multiply(self.mask >= self.share, 1 / (1 - self.share), out=self.mask, casting="same_kind")
        y *= self.mask


class NormTrace(NamedTuple):
    """What the forward pass leaves; ``training`` says that it normalised by the samples' own statistics."""

    normal: Array
    inverse: Array
    output: Array
    training: bool
    dropout: Dropout | None


class Norm(NamedTuple):
    """A BatchNorm layer of all members with the ReLU and the dropout behind it.

    Everything of it has the shape ``(features,)``, and what goes through it ``(N, features)``, with the features of all
    members side by side. Each pass exists twice: here, and in :mod:`toll_plugin.core.training.compiled`, whose
    results are equal to the last bit. That is why sums over samples are taken sample by sample.
    """

    scale: Weights
    shift: Weights
    mean: Array
    variance: Array
    momentum: float
    eps: float

    def forward(self, x: Array, y: Array, *, training: bool, dropout: Dropout | None = None) -> NormTrace:
        """Normalise ``x`` in place, in ``training`` by its own statistics; put into ``y`` what comes out."""
        kernels = compiled.kernels(x) if training else None
        if kernels is not None:
            inverse = np.empty_like(self.mean)
            drawn = x[:0] if dropout is None else dropout.mask
            share = 0.0 if dropout is None else dropout.share
            factors = (self.momentum, self.eps, share, 1 / (1 - share))
            kernels.forward(
                x, y, self.scale.value, self.shift.value, self.mean, self.variance, inverse, drawn, *factors
            )
            return NormTrace(x, inverse, y, training, dropout)
        count = len(x)
        if training:
            mean = np.add.reduce(x, axis=0) / count
            x -= mean
            variance = np.add.reduce(x * x, axis=0) / count
            self.mean[...] += self.momentum * (mean - self.mean)
            # The running variance is the unbiased one.
            self.variance[...] += self.momentum * (variance * (count / (count - 1)) - self.variance)
        else:
            x -= self.mean
            variance = self.variance
        inverse = 1 / np.sqrt(variance + self.eps)
        x *= inverse
        np.multiply(x, self.scale.value, out=y)
        y += self.shift.value
        np.maximum(y, 0, out=y)
        if dropout is not None:
            dropout.apply(y)
        return NormTrace(x, inverse, y, training, dropout)

    def backward(self, d: Array, trace: NormTrace) -> None:
        """Make of ``d``, the gradient of the output, that of the input; set scale's and shift's."""
        kernels = compiled.kernels(d) if trace.training else None
        if kernels is not None:
            mask = d[:0] if trace.dropout is None else trace.dropout.mask
            scale = (self.scale.value, self.scale.gradient, self.shift.gradient)
            kernels.backward(d, trace.output, trace.normal, trace.inverse, mask, *scale)
            return
        if trace.dropout is not None:
            d *= trace.dropout.mask
        # Where dropout made the output zero, the mask made the gradient zero as well.
        d *= trace.output > 0
        np.add.reduce(d, axis=0, out=self.shift.gradient)
        np.add.reduce(d * trace.normal, axis=0, out=self.scale.gradient)
        if trace.training:
            # The batch's mean and deviation depend on every sample, so part of the gradient cancels.
            count = len(d)
            d -= trace.normal * (self.scale.gradient / count)
            d -= self.shift.gradient / count
        d *= self.scale.value * trace.inverse
