"""Choose the weights that every later step uses by a validation value, without labels."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

__all__ = ["RestoreBestWeights"]

#: Key of a checkpoint under which the last weights lie, where its ``state_dict`` holds the best ones.
_LAST_WEIGHTS = "toll_training_state_dict"


class RestoreBestWeights(Callback):
    """Keep the weights of the validation epoch with the lowest ``monitor``.

    After ``fit`` the model holds them. The ``state_dict`` of anomalib's default checkpoint holds
    them too, so that test, predict and export of it give what was shown after training; the
    weights of the last step lie beside them, and resuming continues from those. Checkpoints of a
    ``ModelCheckpoint`` that monitors a metric or keeps several files are left as they are (in a YAML it is
    ``anomalib.callbacks.ModelCheckpoint``, since the short name is ambiguous there).

    Both sets of weights are kept in the CPU's memory: the best until the end of the fit, the last until
    the next fit, for checkpoints that are saved in between.

    Args:
        monitor: Name of a logged value, lower is better. Where it is never logged (no
            validation split) the last weights stay. With ``None`` nothing is chosen, and all that is left
            is that resuming continues from a checkpoint's last weights. Default ``"val_loss"``.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[RestoreBestWeights("val_loss")])
    """

    def __init__(self, monitor: str | None = "val_loss") -> None:
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
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = float(trainer.callback_metrics.get(self.monitor, math.inf))
        if value < self._best_value:
            self._best_value, self._best = value, _on_cpu(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights into the model."""
        del trainer
        if self._best is not None:
            self._last = _on_cpu(pl_module)
            pl_module.load_state_dict(self._best)
            self._best = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the best weights as the checkpoint's, and the last ones beside them.

        Lightning does not call callbacks where only weights are saved, but does call the model. A model
        whose ``on_save_checkpoint`` calls this has the best weights in such files too; the second of two calls
        does nothing.
        """
        if _LAST_WEIGHTS in checkpoint:
            return
        if self._last is not None:  # the fit is over and the model holds what it should
            checkpoint[_LAST_WEIGHTS] = self._last
        elif self._best is not None and not _names_its_files(trainer):
            checkpoint[_LAST_WEIGHTS] = checkpoint["state_dict"]
            checkpoint["state_dict"] = self._best
            _overwrite_components(trainer, pl_module, checkpoint, self._best)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue from the last weights where fitting resumes; all other uses keep the best."""
        if _LAST_WEIGHTS in checkpoint and trainer.state.fn == TrainerFn.FITTING:
            if self.monitor is not None:
                self._best = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
            pl_module.load_state_dict(checkpoint[_LAST_WEIGHTS])

    def state_dict(self) -> dict[str, Any]:
        """The lowest value so far."""
        return {"best_value": self._best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it, where the weights it belongs to were restored."""
        if self._best is not None:
            self._best_value = state_dict["best_value"]


def _on_cpu(module: LightningModule) -> dict[str, Tensor]:
    """A copy of a model's weights, out of the way of training and of the device's memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}


def _names_its_files(trainer: Trainer) -> bool:
    """Whether checkpoints are named after an epoch or a metric, whose weights they then have to hold."""
    savers = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
    return any(c.monitor is not None or c.save_top_k != 1 for c in savers)


def _overwrite_components(
    trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    """Put ``weights`` into the callbacks' states too: anomalib's components are modules and callbacks at once."""
    keys = {id(callback): callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
    for name, module in pl_module.named_children():
        key = keys.get(id(module))
        if key in checkpoint.get("callbacks", {}):
            prefix = f"{name}."
            of_module = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            checkpoint["callbacks"][key] = of_module
