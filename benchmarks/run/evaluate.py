"""One fit of one method, timed, weighed and measured by every metric."""

from __future__ import annotations

import base64
import gc
import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from benchmarks.interfaces import Detector, Scored, Split
from benchmarks.studies.protocol import f1_at_known_rate, splice

#: Draws of anomalies for each rate of rare ones.
DRAWS = 20


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
    scores = _ranked(found.scores)
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
        },
        "roc": _roc(split.anomalous, scores),
        "latent_norms": _histogram(split.anomalous, found.terms.get("latent")),
        "examples": _examples(split, found, examples),
        "facts": detector.facts(),
    }


def _ranked(scores: np.ndarray) -> np.ndarray:
    """Scores that can be ranked: infinite ones become the largest numbers there are."""
    missing = int(np.isnan(scores).sum())
    if missing:
        msg = f"{missing} of {len(scores)} scores are not a number"
        raise FloatingPointError(msg)
    return np.nan_to_num(scores, posinf=np.finfo(float).max, neginf=np.finfo(float).min)


def image_metrics(anomalous: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """AUROC, average precision, and F1 of flagging as many samples as there are anomalies."""
    return {
        "auroc": float(roc_auc_score(anomalous, scores)),
        "average_precision": float(average_precision_score(anomalous, scores)),
        "f1": f1_at_known_rate(anomalous, scores),
    }


def pixel_metrics(masks: np.ndarray, maps: np.ndarray) -> dict[str, float]:
    """AUROC over all pixels, and the area under the per-region overlap up to 30 % false positives, by anomalib.

    Maps of another size than the masks are resized to theirs.
    """
    from anomalib.metrics.aupro import _AUPRO

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(maps, dtype=np.float32))[:, None], masks.shape[1:], mode="bilinear"
    )[:, 0]
    low, high = resized.min(), resized.max()
    pro = _AUPRO(fpr_limit=0.3)
    # torchmetrics takes what lies outside [0, 1] for logits.
    pro.update((resized - low) / (high - low).clamp_min(1e-30), torch.from_numpy(masks).int())
    return {"pixel_auroc": float(roc_auc_score(masks.ravel(), resized.numpy().ravel())), "pro": float(pro.compute())}


def rare(anomalous: np.ndarray, scores: np.ndarray, rate: float, seed: int) -> dict[str, float] | None:
    """Means over draws of so few anomalies that they are ``rate`` of the test part; ``None`` if that is impossible.

    The precision at the top is the share of anomalies among as many highest scores as there are
    anomalies; of equal scores, normal samples come first.
    """
    normal, anomalies = np.flatnonzero(~anomalous), np.flatnonzero(anomalous)
    count = round(rate / (1 - rate) * len(normal))
    if not 1 <= count <= len(anomalies):
        return None
    draw, found = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        kept = np.concatenate([normal, draw.choice(anomalies, count, replace=False)])
        measured = image_metrics(anomalous[kept], scores[kept])
        found.append([measured[name] for name in ("auroc", "average_precision", "f1")])
    auroc, precision, top = np.mean(found, axis=0)
    return {
        "rate": rate,
        "auroc": float(auroc),
        "average_precision": float(precision),
        "precision_at_top": float(top),
        "draws": DRAWS,
    }


def spliced(detector: Detector, validation: Tensor) -> float | None:
    """AUROC of held-out normal samples against splices of two of them: what can be known without anomalies."""
    if len(validation) < 2:
        return None
    made = splice(validation, np.random.default_rng(0))
    scores = _ranked(detector.score(torch.cat([validation, made])).scores)
    return float(roc_auc_score(np.arange(len(scores)) >= len(validation), scores))


def _roc(anomalous: np.ndarray, scores: np.ndarray) -> list[float]:
    false, true, _ = roc_curve(anomalous, scores)
    return [round(float(rate), 4) for rate in np.interp(np.linspace(0, 1, 51), false, true)]


def _histogram(anomalous: np.ndarray, norms: np.ndarray | None, bins: int = 40) -> dict[str, list[float]] | None:
    if norms is None:
        return None
    edges = np.linspace(0, max(float(np.quantile(norms, 0.999)), 1e-12), bins + 1)
    normal, bad = (np.histogram(np.minimum(norms[anomalous == kind], edges[-1]), edges)[0] for kind in (False, True))
    return {"edges": [float(f"{e:.4g}") for e in edges], "normal": normal.tolist(), "anomalous": bad.tolist()}


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


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The first entry becomes the largest resident memory of the block over that at its start, in MB.

    A lower bound: memory that the process had freed but not given back is used first.
    """
    import psutil

    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    found, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            found[0] = max(found[0], (process.memory_info().rss - before) / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found[0] = max(found[0], (process.memory_info().rss - before) / 1e6)
