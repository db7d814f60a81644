"""BatchNorm of several networks at once, its forward and backward pass written out in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Norm", "NormTrace", "Weights"]

Array = NDArray[Any]


class Weights(NamedTuple):
    """One kind of weight of all members, ``(M, *)``, and its gradient; views into the buffers."""

    value: Array
    gradient: Array


class NormTrace(NamedTuple):
    """What a BatchNorm's forward pass leaves: normalised values, inverse deviation, whose statistics."""

    normal: Array
    inverse: Array
    training: bool


class Norm(NamedTuple):
    """A BatchNorm layer of all members; everything of it is ``(M, features)``."""

    scale: Weights
    shift: Weights
    mean: Array
    variance: Array
    momentum: float
    eps: float

    def forward(self, x: Array, *, training: bool) -> tuple[Array, NormTrace]:
        """Normalise ``x``, which is overwritten."""
        count = x.shape[2]
        if training:
            mean = np.add.reduce(x, axis=2) / count
            x -= mean[:, :, None]
            variance = np.einsum("mhn,mhn->mh", x, x) / count
            self.mean[...] += self.momentum * (mean - self.mean)
            # The running variance is the unbiased one.
            self.variance[...] += self.momentum * (variance * (count / (count - 1)) - self.variance)
        else:
            x -= self.mean[:, :, None]
            variance = self.variance
        inverse = 1 / np.sqrt(variance + self.eps)
        x *= inverse[:, :, None]
        y = x * self.scale.value[:, :, None]
        y += self.shift.value[:, :, None]
        return y, NormTrace(x, inverse, training)

    def backward(self, d: Array, trace: NormTrace) -> Array:
        """Gradient of the input from that of the output, which is overwritten; keep scale's and shift's."""
        np.add.reduce(d, axis=2, out=self.shift.gradient)
        np.einsum("mhn,mhn->mh", d, trace.normal, out=self.scale.gradient)
        if trace.training:
            # The batch's mean and deviation depend on every sample, so part of the gradient cancels.
            count = d.shape[2]
            d -= trace.normal * (self.scale.gradient / count)[:, :, None]
            d -= (self.shift.gradient / count)[:, :, None]
        d *= (self.scale.value * trace.inverse)[:, :, None]
        return d
