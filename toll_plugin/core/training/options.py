"""How a network is trained: every number that a fit takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.core.training.optimizers import MakeOptimizer, optimizer_of

__all__ = ["Patience", "TrainingOptions"]

#: ``"auto"`` is 20 where samples are held out and ``None`` where there are none.
Patience = int | None | Literal["auto"]

_PATIENCE = 20


@dataclass(frozen=True)
class TrainingOptions:
    """What :func:`toll_plugin.core.fit` takes beside the network and the data; it explains each.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If it is out of range, or nothing would end the fit.

    Example:
        >>> TrainingOptions(batch_size=0)
        Traceback (most recent call last):
        ValueError: batch_size must be at least 1, got 0
    """

    optimizer: MakeOptimizer | str = "adam"
    lr: float = 1e-3
    batch_size: int = 32
    max_epochs: int | None = 200
    max_steps: int | None = None
    patience: Patience = "auto"
    noise: float = 0.0
    input_limit: float | None = None

    def __post_init__(self) -> None:
        self.make_optimizer()
        check_integer("batch_size", self.batch_size, minimum=1)
        for name in ("max_epochs", "max_steps", "patience"):
            value = getattr(self, name)
            if value is not None and not (name == "patience" and value == "auto"):
                check_integer(name, value, minimum=1)
        if self.max_epochs is None and self.max_steps is None:
            msg = "max_epochs and max_steps must not both be None: nothing would end the fit"
            raise ValueError(msg)
        check_finite_float("noise", self.noise, minimum=0)
        if self.input_limit is not None:
            check_finite_float("input_limit", self.input_limit, minimum=0)

    def make_optimizer(self) -> MakeOptimizer:
        """What makes the optimiser of a list of parameters."""
        return optimizer_of(self.optimizer, self.lr)

    def epochs_to_wait(self, *, held_out: bool) -> int | None:
        """Epochs without improvement after which training stops; ``None`` for never.

        Raises:
            ValueError: If a number was asked for and no samples are ``held_out`` to see improvement on.
        """
        if self.patience == "auto":
            return _PATIENCE if held_out else None
        if self.patience is not None and not held_out:
            msg = f"patience needs held-out samples: pass validation, or leave patience out, got {self.patience}"
            raise ValueError(msg)
        return self.patience

    def steps(self, samples: int) -> int:
        """How many steps a fit to so many samples takes at most."""
        # A last batch of one sample joins the batch before it.
        per_epoch = -(-samples // self.batch_size) - (samples % self.batch_size == 1 and 1 < self.batch_size < samples)
        limits = [self.max_steps, None if self.max_epochs is None else self.max_epochs * per_epoch]
        return min(limit for limit in limits if limit is not None)
