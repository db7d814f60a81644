"""Label-free model selection for the weights that every verb of anomalib uses."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from toll_plugin.core.training.divergence import snapshot

__all__ = ["TRAINING_STATE", "RestoreBestWeights"]

TRAINING_STATE = "toll_training_state_dict"


class RestoreBestWeights(Callback):
    """Keep the weights of the validation epoch with the lowest ``monitor``.

    After ``fit`` the model holds them. The ``state_dict`` of anomalib's default checkpoint holds
    them too, so that test, predict and export of it give what was shown after training; the
    weights of the last step lie beside them, and resuming continues from those. Checkpoints of a
    ``ModelCheckpoint`` that monitors a metric or keeps several files are left as they are.

    Args:
        monitor: Name of a logged value, lower is better. Where it is never logged (no
            validation split) the last weights stay.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[RestoreBestWeights("val_loss")])
    """

    def __init__(self, monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self._best_value = math.inf
        self._best: dict[str, Tensor] | None = None
        self._last: dict[str, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A pickled model needs its weights once.
        return {"monitor": self.monitor, "_best_value": math.inf, "_best": None, "_last": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint to resume from is loaded after this."""
        del trainer, pl_module
        if stage == TrainerFn.FITTING:
            self._best_value, self._best, self._last = math.inf, None, None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the epoch's value, before a ModelCheckpoint saves."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = float(trainer.callback_metrics.get(self.monitor, math.inf))
        if value < self._best_value:
            self._best_value, self._best = value, snapshot(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights into the model."""
        del trainer
        if self._best is not None:
            self._last = snapshot(pl_module)
            pl_module.load_state_dict(self._best)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the best weights as the checkpoint's, and the last ones beside them.

        A module may call this from its own hook as well, which Lightning also calls where only
        weights are saved; the second call does nothing.
        """
        if self._best is None or TRAINING_STATE in checkpoint:
            return
        if self._last is not None:  # the fit is over and the module holds what it should
            checkpoint[TRAINING_STATE] = self._last
            return
        savers = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
        if any(c.monitor is not None or c.save_top_k != 1 for c in savers):
            return  # its files are named after an epoch or a metric, and hold what they are named after
        checkpoint[TRAINING_STATE] = checkpoint["state_dict"]
        checkpoint["state_dict"] = self._best
        # anomalib's components are modules and callbacks at once, and stored as both.
        keys = {id(callback): callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        for name, module in pl_module.named_children():
            key = keys.get(id(module))
            if key in checkpoint.get("callbacks", {}):
                prefix = f"{name}."
                checkpoint["callbacks"][key] = {
                    k.removeprefix(prefix): v for k, v in self._best.items() if k.startswith(prefix)
                }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue from the last weights where fitting resumes; all else keeps the best."""
        if TRAINING_STATE in checkpoint and trainer.state.fn == TrainerFn.FITTING:
            self._best = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
            pl_module.load_state_dict(checkpoint[TRAINING_STATE])

    def state_dict(self) -> dict[str, Any]:
        """The lowest value so far."""
        return {"best_value": self._best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it, where the weights it belongs to were restored."""
        if self._best is not None:
            self._best_value = state_dict["best_value"]
