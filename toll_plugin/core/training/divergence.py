"""Stop when training diverges, and keep the weights from before."""

from __future__ import annotations

import math
from typing import NoReturn

from torch import Tensor, nn

__all__ = ["DivergenceError", "DivergenceGuard", "snapshot"]


class DivergenceError(ArithmeticError):
    """The loss or the weights stopped being finite; the network holds its last good weights.

    Attributes:
        step: Step, counted from 0, at which the loss was not finite.
        last_finite: The last finite value of each that was watched (total, reconstruction and latent
            term, held-out loss), if any.
    """

    def __init__(self, step: int, last_finite: dict[str, float] | None) -> None:
        self.step = step
        self.last_finite = last_finite
        before = (
            "no step before it was finite"
            if last_finite is None
            else "the last finite values were " + ", ".join(f"{k} {v:.6g}" for k, v in last_finite.items())
        )
        super().__init__(
            f"training diverged: the loss or the weights were not finite at step {step}; {before}. "
            "The last good weights were kept; lower the learning rate or beta"
        )

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[int, dict[str, float] | None]]:
        return type(self), (self.step, self.last_finite)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state that later steps do not touch."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class DivergenceGuard:
    """Watch each step's loss and keep the last good weights of a network.

    Call :meth:`check` before the optimiser's step and :meth:`keep` now and then (an epoch).

    Args:
        network: Module whose weights are kept and put back.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1)
        >>> guard = DivergenceGuard(net)
        >>> guard.check(0, total=1.0, reconstruction=0.5, latent=0.5)
        >>> guard.check(1, total=float("nan"), reconstruction=0.5, latent=0.5)
        Traceback (most recent call last):
        toll_plugin.core.DivergenceError: training diverged: the loss or the weights were not finite ...
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._last: dict[str, float] | None = None
        self._good = snapshot(network)

    def keep(self, step: int) -> None:
        """Remember the weights after ``step`` as good.

        Raises:
            DivergenceError: If one of them is not finite; the earlier ones are put back.
        """
        state = snapshot(self._network)
        if not all(bool(value.isfinite().all()) for value in state.values()):
            self._give_up(step)
        self._good = state

    def check(self, step: int, **values: float) -> None:
        """Accept finite ``values``; otherwise restore the weights and raise.

        Raises:
            DivergenceError: If one of ``values`` is not finite.
        """
        if all(math.isfinite(value) for value in values.values()):
            self._last = (self._last or {}) | values
            return
        self._give_up(step)

    def _give_up(self, step: int) -> NoReturn:
        self._network.load_state_dict(self._good)
        raise DivergenceError(step, self._last)
