"""A dense autoencoder in evaluation mode as a few matrix products in double precision.

The last bits of a matrix product depend on how many rows it has, because the libraries choose
another kernel for another size. Rows therefore go through in blocks of :data:`BLOCK`, the
last filled up with zeros, so that a row's result does not depend on the rows beside it. Larger blocks are
faster, and on one thread most libraries sum in the same order in both: that is tried, see :func:`in_order`.

Single precision would take half of the time. What a network reconstructs well is a small difference of larger
numbers, so its scores are then off by up to a hundred thousandth (on tables of ODDS).
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from toll_plugin.core.networks import DenseAutoencoder, blocks
from toll_plugin.core.tables.scaling import Floats

__all__ = [
    "BLOCK",
    "MANY",
    "FoldedAutoencoder",
    "ModuleAutoencoder",
    "Rooms",
    "in_blocks",
    "in_order",
    "product",
]

BLOCK = 8
#: Rows of a larger block, a multiple of :data:`BLOCK`. A caller that has so many sees to it that BLAS has one thread.
MANY = 64


class Rooms:
    """Memory for what is read before the next rows come, the same again and again.

    A process that gives back to the system at once what it frees, as Dask's workers do, would get new pages
    for every piece of rows, which takes as long as the scores.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], Floats] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Floats:
        """An array of this name, rows and columns; what was written there is lost."""
        held = self._held.get((name, columns))
        if held is None or len(held) < rows:
            held = self._held[name, columns] = np.empty((rows, columns))
        return held[:rows]

    def product(self, name: str, x: Floats, weight: Floats) -> Floats:
        """:func:`product`, written to the array of this name."""
        return product(x, weight, self(name, len(x), weight.shape[1]))


def in_blocks(x: Floats) -> Floats:
    """``x``, shape ``(N, n_features)``, with rows of zeros added up to a multiple of :data:`BLOCK`."""
    count = len(x)
    if count % BLOCK == 0:
        return x
    whole = np.zeros((count + -count % BLOCK, x.shape[1]))
    whole[:count] = x
    return whole


def product(x: Floats, weight: Floats, found: Floats | None = None) -> Floats:
    """``x @ weight`` of N rows, a multiple of :data:`BLOCK` on which the bits of none depend; written to ``found``."""
    if len(x) == BLOCK:
        one: Floats = np.matmul(x, weight) if found is None else np.matmul(x, weight, out=found)
        return one
    inputs, outputs = weight.shape
    many = len(x) // MANY * MANY
    if many and not in_order(inputs, outputs, weight.flags.c_contiguous):
        many = 0
    found = np.empty((len(x), outputs)) if found is None else found
    for rows, block in ((slice(many), MANY), (slice(many, len(x)), BLOCK)):
        blocks = (rows.stop - (rows.start or 0)) // block
        out = found[rows].reshape(blocks, block, outputs)
        np.matmul(x[rows].reshape(blocks, block, inputs), weight, out=out)
    return found


@functools.cache
def in_order(inputs: int, outputs: int, contiguous: bool) -> bool:
    """Whether a product of this shape has the same last bits in blocks of :data:`MANY` as in such of :data:`BLOCK`.

    In which order a product sums depends on its shape, not on its values, so it shows on any rows. Asked
    on one thread.
    """
    draw = np.random.default_rng(0)
    x, weight = draw.normal(size=(MANY, inputs)), draw.normal(size=(inputs, outputs))
    weight = weight if contiguous else np.asfortranarray(weight)
    large, small = (np.matmul(x.reshape(-1, rows, inputs), weight) for rows in (MANY, BLOCK))
    return bool(np.array_equal(large.ravel(), small.ravel()))


class FoldedAutoencoder:
    """BatchNorm folded into the linear layers, in NumPy and double precision.

    Args:
        network: Whose weights and running statistics are copied.

    Attributes:
        largest: Weights of the largest layer.

    Shape:
        ``(N, n_features)``, N a multiple of :data:`BLOCK` (see :func:`in_blocks`), to
        reconstructions ``(N, n_features)`` and latents ``(N, latent_dim)``.

    Example:
        >>> network = DenseAutoencoder(6, (8,), 2)
        >>> reconstruction, latent = FoldedAutoencoder(network)(np.zeros((8, 6)))
        >>> reconstruction.shape, latent.shape
        ((8, 6), (8, 2))
    """

    def __init__(self, network: DenseAutoencoder) -> None:
        self._encoder, self._decoder = _fold(network.encoder, "encoder"), _fold(network.decoder, "decoder")
        self.largest = max(weight.size for _, weight, *_ in (*self._encoder, *self._decoder))

    def __call__(self, x: Floats, *, decode: bool = True, room: Rooms | None = None) -> tuple[Floats | None, Floats]:
        """Return reconstructions, unless they are not to be decoded, and latents."""
        latent = _run(self._encoder, x, room)
        return _run(self._decoder, latent, room) if decode else None, latent


#: Of each layer the name of its room, which is not that of the layer before, weights, bias, and whether it rectifies.
_Stack = list[tuple[str, Floats, Floats, bool]]


def _run(stack: _Stack, x: Floats, room: Rooms | None) -> Floats:
    for name, weight, bias, rectify in stack:
        x = product(x, weight) if room is None else room.product(name, x, weight)
        x += bias
        if rectify:
            np.maximum(x, 0, out=x)
    return x


def _fold(stack: nn.Module, name: str) -> _Stack:
    folded: _Stack = []
    for linear, *rest in blocks(stack):
        weight, bias = _numpy(linear.weight), _numpy(linear.bias)
        for module in rest:
            if isinstance(module, nn.BatchNorm1d):
                gain = _numpy(module.weight) / np.sqrt(_numpy(module.running_var) + module.eps)
                weight = weight * gain[:, None]
                bias = (bias - _numpy(module.running_mean)) * gain + _numpy(module.bias)
        folded.append((f"{name} {len(folded) % 2}", np.ascontiguousarray(weight.T), bias, bool(rest)))
    return folded


def _numpy(tensor: Any) -> Floats:
    array: Floats = tensor.detach().cpu().double().numpy()
    return array


class ModuleAutoencoder:
    """Modules of a user's own in evaluation mode and double precision, called block by block.

    Args:
        network: A copy in double precision is kept, on the CPU.
        block: Rows per call; fixed for the same reason as :data:`BLOCK`, and a multiple of it.

    Attributes:
        largest: Without bound, since what the modules compute is not known.
    """

    largest = sys.maxsize

    def __init__(self, network: nn.Module, block: int = 128) -> None:
        # Evaluation mode once and for all: threads that score at once share it.
        self._network, self._block = copy.deepcopy(network).cpu().double().eval(), block

    def __call__(self, x: Floats, *, decode: bool = True, room: Rooms | None = None) -> tuple[Floats | None, Floats]:
        """Return reconstructions and latents; what they are not to be ``decode``d for costs nothing to give."""
        del decode, room
        parts = []
        with torch.no_grad():
            for start in range(0, len(x), self._block):
                rows = x[start : start + self._block]
                whole = np.zeros((self._block, *x.shape[1:]))
                whole[: len(rows)] = rows
                outputs = self._network(torch.from_numpy(whole))
                parts.append([output[: len(rows)].numpy() for output in outputs])
        reconstruction, latent = (np.concatenate(part) for part in zip(*parts, strict=True))
        return reconstruction, latent
