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
    """Which hidden units are dropped.

    Attributes:
        drawn: Uniform numbers of 16 bits, one for each unit of each sample.
        below: A unit is dropped where its number is less than this.
        mask: What the forward pass makes of the numbers: 0 for the units that are dropped, :attr:`factor` for others.
    """

    drawn: NDArray[np.uint16]
    below: int
    mask: Array

    @property
    def factor(self) -> float:
        """What units that are kept are multiplied by, so that the mean stays."""
        return _NUMBERS / (_NUMBERS - self.below)

    def apply(self, y: Array) -> None:
        """Make the mask and drop units of ``y`` in place."""
        np.multiply(self.drawn >= self.below, self.factor, out=self.mask, casting="same_kind")
        y *= self.mask

    @classmethod
    def draw(cls, share: float, mask: Array, bits: np.random.BitGenerator) -> Dropout:
        """A ``share`` of the units, to the nearest of 65 536 parts; more bits would take longer than a layer does."""
        words: NDArray[np.uint64] = bits.random_raw(-(-mask.size // 4))
        drawn = words.view(np.uint16)[: mask.size].reshape(mask.shape)
        return cls(drawn, min(round(share * _NUMBERS), _NUMBERS - 1), mask)


_NUMBERS = 1 << 16


_NONE = np.empty((0, 0), np.uint16)


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
            units = dropout or Dropout(_NONE, 0, x[:0])
            chances = (units.drawn, units.mask, self.momentum, self.eps, units.below, units.factor)
            own = (self.scale.value, self.shift.value, self.mean, self.variance)
            kernels.forward(x, y, *own, inverse, *chances)
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
