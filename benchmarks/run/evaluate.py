"""One fit of one method, timed, weighed and measured by every metric."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.data.tables import copied
from benchmarks.interfaces import Detector, Scored, Split
from benchmarks.run.measure import peak_memory
from benchmarks.run.metrics import histogram, image_metrics, pixel_metrics, ranked, rare, roc, spliced


def evaluate(
    detector: Detector, split: Split, seed: int, rates: Sequence[float] = (), examples: int = 0
) -> dict[str, Any]:
    """Fit, score and measure; what is not finite is an error, with its count.

    Args:
        detector: Not fitted yet.
        split: The data.
        seed: Of the anomalies that are drawn for ``rates``.
        rates: Shares of anomalies in the test part to draw down to, besides its own.
        examples: Heat maps to keep, of anomalies evenly from first to last of the test part.

    Raises:
        FloatingPointError: If a score is not a number.
        ValueError: If the test part lacks a kind.
    """
    if not 0 < split.anomalous.sum() < len(split.anomalous):
        msg = f"the test part must hold normal and anomalous samples, got {split.anomalous.sum()} anomalies"
        msg += f" of {len(split.anomalous)}"
        raise ValueError(msg)
    with peak_memory() as memory:
        start = time.perf_counter()
        detector.fit(split)
        fitted = time.perf_counter()
        found = detector.score(split.test)
        scored = time.perf_counter()
    scores = ranked(found.scores)
    metrics = image_metrics(split.anomalous, scores)
    if found.maps is not None and split.masks is not None and split.masks.any():
        metrics |= pixel_metrics(split.masks, found.maps)
    return {
        "metrics": metrics,
        "term_auroc": {name: float(roc_auc_score(split.anomalous, term)) for name, term in found.terms.items()},
        "rare": [entry for rate in rates if (entry := rare(split.anomalous, scores, rate, seed))],
        "spliced_auroc": spliced(detector, split.validation),
        "fit_seconds": fitted - start,
        "score_seconds": scored - fitted,
        "peak_memory_mb": memory[0],
        "model_mb": detector.size() / 1e6,
        "samples": {
            "train": len(split.train),
            "validation": len(split.validation),
            "test": len(split.test),
            "anomalies": int(split.anomalous.sum()),
            **_copies(split),
        },
        "roc": roc(split.anomalous, scores),
        "latent_norms": histogram(split.anomalous, found.terms.get("latent")),
        "examples": _examples(split, found, examples),
        "facts": detector.facts(),
    }


def _copies(split: Split) -> dict[str, int]:
    """Normal rows of a table's test part that equal a training row: they tell memory, not detection."""
    if split.train.ndim != 2:
        return {}
    return {"copied": int(copied(split.train.numpy(), split.test.numpy()[~split.anomalous]).sum())}


def _examples(split: Split, found: Scored, count: int, side: int = 96) -> list[dict[str, Any]]:
    """Anomalies from the whole test set, and one normal image: image, map on the scale of all maps, mask."""
    if not count or found.maps is None:
        return []
    # Test sets are sorted by the kind of anomaly: the first ones would be of one kind.
    anomalous = np.flatnonzero(split.anomalous)
    spread = np.unique(np.linspace(0, len(anomalous) - 1, count).round().astype(int))
    chosen = [*anomalous[spread], np.flatnonzero(~split.anomalous)[0]]
    images = split.test[chosen]
    images = images if images.is_floating_point() else images / 255
    low, high = (float(np.quantile(found.maps, q)) for q in (0.01, 0.999))
    maps = np.clip((found.maps[chosen] - low) / max(high - low, 1e-30), 0, 1)
    return [
        {
            "image": _png(np.moveaxis(image.numpy(), 0, -1).squeeze(), side),
            "map": _png(heat, side),
            "mask": None if split.masks is None else _png(split.masks[i].astype(float), side),
            "score": float(np.nan_to_num(found.scores[i])),
            "anomalous": bool(split.anomalous[i]),
        }
        for i, image, heat in zip(chosen, images, maps, strict=True)
    ]


def _png(pixels: np.ndarray, side: int) -> str:
    from PIL import Image

    image = Image.fromarray((255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
