"""Bilinear resizing as a matrix, from operations that every exporter knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["resize_matrix"]


def resize_matrix(n_in: int, n_out: int, like: Tensor, *, antialias: bool) -> Tensor:
    r"""The matrix that resizes one axis from ``n_in`` to ``n_out`` cells by bilinear interpolation.

    In units of input cells, with :math:`r = n_\mathrm{in} / n_\mathrm{out}`, the centre of output cell i lies at
    :math:`c_i = (i + \frac12) r` and that of input cell j at :math:`j + \frac12`. The weight of j in i is
    :math:`\max(0, 1 - |j + \frac12 - c_i| / s)`, divided by the sum over all j. So ``rows @ images @ columns.T``
    resizes images ``(N, C, H, W)`` as torch's ``interpolate(mode="bilinear")`` does.

    Args:
        n_in: Cells before.
        n_out: Cells after.
        like: Whose device and precision the matrix gets.
        antialias: Where the axis shrinks, true averages all input cells that an output cell covers
            (:math:`s = \max(r, 1)`), false interpolates between the two nearest (:math:`s = 1`).

    Returns:
        Shape ``(n_out, n_in)``; each row adds up to 1.

    Example:
        >>> import torch
        >>> resize_matrix(2, 4, torch.empty(0), antialias=True)
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]])
    """
    ratio = n_in / n_out
    # A plain max would tie an export to the size of its example.
    reach: Any = torch.sym_max(ratio, 1.0) if antialias else 1.0
    centre = (torch.arange(n_out, device=like.device, dtype=like.dtype) + 0.5) * ratio
    position = torch.arange(n_in, device=like.device, dtype=like.dtype) + 0.5
    weights = (1 - torch.div((position - centre[:, None]).abs(), reach)).relu()
    return weights / weights.sum(dim=1, keepdim=True)
