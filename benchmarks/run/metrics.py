"""What scores are measured by, with labels and without."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from benchmarks.interfaces import Detector

#: Draws of anomalies for each rate of rare ones.
DRAWS = 20


def ranked(scores: np.ndarray) -> np.ndarray:
    """Scores that can be ranked: infinite ones become the largest numbers there are.

    Raises:
        FloatingPointError: If a score is not a number.
    """
    missing = int(np.isnan(scores).sum())
    if missing:
        msg = f"{missing} of {len(scores)} scores are not a number"
        raise FloatingPointError(msg)
    return np.nan_to_num(scores, posinf=np.finfo(float).max, neginf=np.finfo(float).min)


def f1_at_known_rate(anomalous: np.ndarray, scores: np.ndarray) -> float:
    """F1 of flagging as many samples as there are anomalies; of equal scores, normal samples are flagged first."""
    order = np.lexsort((anomalous, -scores))
    return float(anomalous[order[: anomalous.sum()]].mean())


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


def splice(samples: Tensor, generator: np.random.Generator) -> Tensor:
    """Stand-ins for anomalies: each sample with a part of another one, from elsewhere in an image, in a third of a row.

    After CutPaste (arXiv 2104.04015), with another image as the source.
    """
    made, others = samples.clone(), samples[generator.permutation(len(samples))]
    for sample, other in zip(made, others, strict=True):
        if samples.ndim == 2:
            columns = generator.permutation(samples.shape[1])[: max(1, samples.shape[1] // 3)]
            sample[columns] = other[columns]
            continue
        height, width = sample.shape[1:]
        h, w = (int(generator.integers(max(1, side // 4), side // 2 + 1)) for side in (height, width))
        (top, to), (left, at) = (generator.integers(0, side - cut + 1, 2) for side, cut in ((height, h), (width, w)))
        sample[:, top : top + h, left : left + w] = other[:, to : to + h, at : at + w]
    return made


def spliced(detector: Detector, validation: Tensor) -> float | None:
    """AUROC of held-out normal samples against splices of two of them: what can be known without anomalies."""
    if len(validation) < 2:
        return None
    made = splice(validation, np.random.default_rng(0))
    scores = ranked(detector.score(torch.cat([validation, made])).scores)
    return float(roc_auc_score(np.arange(len(scores)) >= len(validation), scores))


def roc(anomalous: np.ndarray, scores: np.ndarray) -> list[float]:
    """True positive rates at false positive rates of 0, 0.02, ..., 1."""
    false, true, _ = roc_curve(anomalous, scores)
    return [round(float(rate), 4) for rate in np.interp(np.linspace(0, 1, 51), false, true)]


def histogram(anomalous: np.ndarray, norms: np.ndarray | None, bins: int = 40) -> dict[str, list[float]] | None:
    """Counts of latent norms of normal and of anomalous samples, from 0; the last bin has all that is larger."""
    if norms is None:
        return None
    edges = np.linspace(0, max(float(np.quantile(norms, 0.999)), 1e-12), bins + 1)
    normal, bad = (np.histogram(np.minimum(norms[anomalous == kind], edges[-1]), edges)[0] for kind in (False, True))
    return {"edges": [float(f"{e:.4g}") for e in edges], "normal": normal.tolist(), "anomalous": bad.tolist()}
