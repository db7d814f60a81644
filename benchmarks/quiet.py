"""An engine that shows nothing and leaves nothing behind."""

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
