"""The passes of :class:`~toll_plugin.core.training.batch_norm.Norm`, compiled by numba where that pays.

NumPy reads and writes a layer once for each operation, compiled loops do so two or three times in all. They do the
same operations in the same order, so a fit gives the same weights to the last bit with them and without, and it does
not matter when they take over: a process begins with NumPy and changes to them once they would have saved it as much
time as it takes to load them, or, where no earlier process has left them in numba's cache, to compile them. So nobody
waits for a compiler before a small fit, and where numba is missing, cannot compile or finds no folder to write to, all
goes on with NumPy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kernels", "kernels"]

#: Seconds that the loops take to load and to compile, about, on one core.
_LOADING, _COMPILING = 0.3, 3.0
#: Seconds that they save for each call, and for each value in it.
_CALL, _VALUE = 2.5e-5, 2e-9


class Kernels(NamedTuple):
    """The compiled passes.

    Attributes:
        forward: See :func:`_forward`.
        backward: See :func:`_backward`.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


class _Tiers:
    """Which form is used, and the seconds that the compiled one would have saved so far."""

    def __init__(self) -> None:
        self.lost = 0.0
        self.next_look = _LOADING
        self.found: Kernels | None = None

    def look(self) -> None:
        """Load or compile the loops, if that pays."""
        enough = self.lost >= _COMPILING
        if not enough and "numba" not in sys.modules:  # to import it takes longer than to load the loops
            self.next_look = _COMPILING
            return
        self.next_look = math.inf  # whatever happens here, it does not happen twice
        try:
            import numba  # noqa: PLC0415  it may be missing

            if numba.config.DISABLE_JIT:
                return
            if not enough and not _cached(numba):
                self.next_look = _COMPILING
                return
            self.found = compile_kernels(numba)
        except Exception:  # noqa: BLE001  of many kinds, and NumPy does the same
            self.found = None


_tiers = _Tiers()


def kernels(values: NDArray[Any]) -> Kernels | None:
    """The compiled passes for ``values`` of shape ``(N, features)``, or ``None`` where NumPy is to do them."""
    # NumPy sums a single column in another order.
    if values.dtype != np.float32 or values.shape[1] == 1:
        return None
    if _tiers.found is None:
        _tiers.lost += _CALL + _VALUE * values.size
        if _tiers.lost >= _tiers.next_look:
            _tiers.look()
    return _tiers.found


def _cached(numba: Any) -> bool:
    """Whether an earlier process has left compiled loops."""
    folder = Path(numba.njit(cache=True)(_forward).stats.cache_path)
    return any(folder.glob(f"{Path(__file__).stem}._backward*.nbi"))


def compile_kernels(numba: Any) -> Kernels:
    """Compile the loops, or load them from numba's cache."""
    one, table, number = numba.float32[::1], numba.float32[:, ::1], numba.float32
    options = {"cache": True, "nogil": True, "error_model": "numpy"}
    drawn, below = numba.uint16[:, ::1], numba.uint16
    forward = numba.void(table, table, one, one, one, one, one, drawn, table, number, number, below, number)
    backward = numba.void(table, table, table, one, table, one, one, one)
    return Kernels(numba.njit([forward], **options)(_forward), numba.njit([backward], **options)(_backward))


# What follows is written for the compiler: every number is in single precision, as NumPy's are.


def _forward(  # noqa: C901  a loop for each pass
    x: Any,
    y: Any,
    scale: Any,
    shift: Any,
    mean: Any,
    variance: Any,
    inverse: Any,
    drawn: Any,
    mask: Any,
    momentum: Any,
    eps: Any,
    below: Any,
    factor: Any,
) -> None:
    """Normalise ``x`` by its own statistics in place, put its ReLU into ``y``, and drop units if there is a ``mask``.

    ``inverse``, the running ``mean`` and ``variance`` and ``mask`` are written as well.
    """
    samples, features = x.shape
    zero, one, count = np.float32(0), np.float32(1), np.float32(samples)
    middle, squares = np.zeros(features, np.float32), np.zeros(features, np.float32)
    for n in range(samples):
        for i in range(features):
            middle[i] += x[n, i]
    for i in range(features):
        middle[i] /= count
    for n in range(samples):
        for i in range(features):
            value = x[n, i] - middle[i]
            x[n, i] = value
            squares[i] += value * value
    unbiased = np.float32(samples / (samples - 1))
    for i in range(features):
        value = squares[i] / count
        mean[i] += momentum * (middle[i] - mean[i])
        variance[i] += momentum * (value * unbiased - variance[i])
        inverse[i] = one / np.sqrt(value + eps)
    for n in range(samples):
        for i in range(features):
            value = x[n, i] * inverse[i]
            x[n, i] = value
            value = value * scale[i] + shift[i]
            y[n, i] = zero if value < zero else value  # noqa: FURB136  what is no number stays so
        if len(mask):
            for i in range(features):
                kept = factor if drawn[n, i] >= below else zero
                mask[n, i] = kept
                y[n, i] *= kept


def _backward(
    d: Any, y: Any, normal: Any, inverse: Any, mask: Any, scale: Any, scale_gradient: Any, shift_gradient: Any
) -> None:
    """Make of ``d``, the gradient of ``y``, that of what :func:`_forward` normalised; set scale's and shift's."""
    samples, features = d.shape
    zero, one, count = np.float32(0), np.float32(1), np.float32(samples)
    scale_gradient[:] = zero
    shift_gradient[:] = zero
    for n in range(samples):
        if len(mask):
            for i in range(features):
                d[n, i] *= mask[n, i]
        for i in range(features):
            value = d[n, i] * (one if y[n, i] > zero else zero)
            d[n, i] = value
            shift_gradient[i] += value
            scale_gradient[i] += value * normal[n, i]
    along, middle, factor = scale_gradient / count, shift_gradient / count, scale * inverse
    for n in range(samples):
        for i in range(features):
            d[n, i] = (d[n, i] - normal[n, i] * along[i] - middle[i]) * factor[i]
