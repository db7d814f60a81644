"""Engines and trainers that show nothing and leave nothing behind."""

from __future__ import annotations

from typing import Any


def quiet_engine(folder: str, max_epochs: int) -> Any:
    """anomalib's Engine on one CPU device, writing below ``folder``."""
    from anomalib.engine import Engine

    return Engine(
        default_root_dir=folder,
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quiet_trainer(max_epochs: int) -> Any:
    """Lightning's Trainer on one CPU device, writing nothing: some models have checkpoints of gigabytes."""
    from lightning.pytorch import Trainer

    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
