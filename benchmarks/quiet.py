"""Engines and blocks that show nothing and leave nothing behind."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock


def device() -> str:
    """Where anomalib's models train and score: the CPU, or what TOLL_BENCHMARKS_DEVICE says, such as cuda."""
    return os.environ.get("TOLL_BENCHMARKS_DEVICE", "cpu")


def quiet_engine(folder: str, max_epochs: int, **arguments: Any) -> Any:
    """anomalib's Engine on one :func:`device`, writing below ``folder``; other ``arguments`` are its trainer's."""
    from anomalib.engine import Engine

    return Engine(
        default_root_dir=folder,
        max_epochs=max_epochs,
        accelerator=device(),
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A block that shows nothing and leaves global generators, environment and log levels as they were."""
    import numpy as np
    import torch

    states, disabled = (random.getstate(), np.random.get_state()), logging.root.manager.disable  # noqa: NPY002
    logging.disable(logging.WARNING)
    try:
        with (
            mock.patch.dict(os.environ),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        logging.disable(disabled)
