"""anomalib's models with and without targeted collapse, on images: what a run measures, and its table."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data.datasets import DATASETS, PROTOCOLS, Limits
from benchmarks.interfaces import Budget, Split
from benchmarks.run.tables import mean_and_error
from toll_plugin.core.checks import check_finite_float

__all__ = [
    "BUDGETS",
    "WEIGHTS",
    "Pictures",
    "arms_of",
    "calls_of",
    "contaminated",
    "pairs_table",
    "run_images",
    "tested",
]

#: Side of the images in pixels and epochs of each host among anomalib's models, on the digits, MNIST and parts.
BUDGETS: dict[str, dict[str, tuple[int, int]]] = {
    "Ganomaly": {"digits": (32, 20), "mnist": (32, 10), "parts": (64, 6)},
    "ReverseDistillation": {"digits": (64, 10), "mnist": (32, 5), "parts": (128, 3)},
    "Fre": {"digits": (64, 30), "mnist": (32, 15), "parts": (128, 5)},
    "Supersimplenet": {"digits": (96, 2), "mnist": (96, 1), "parts": (96, 1)},
    "Glass": {"digits": (64, 10), "mnist": (32, 5), "parts": (128, 1)},
    # Not on parts: a step of 16 images of 128 pixels takes a minute on one core.
    "Draem": {"digits": (32, 2), "mnist": (32, 1)},
}

#: Runs have multiples of these weights, which make the term about a tenth of a host's loss at the first step.
WEIGHTS = {
    "Ganomaly": 1.0,
    "ReverseDistillation": 0.01,
    "Fre": 0.002,
    "Supersimplenet": 0.05,
    "Glass": 0.05,
    "Draem": 0.01,
}

#: Ways to score of a run, beside the host's own: their columns.
SCORES = {"auroc_with_term": "in loss and score", "auroc_in_units": "and score, in units"}


class Pictures(NamedTuple):
    """Where images come from.

    Attributes:
        name: In the record: a digit's class alone, ``mnist`` and a class, or the folder's name.
        group: Key of :data:`BUDGETS`.
        dataset: Key of :data:`benchmarks.data.datasets.DATASETS`.
        part: Of the data set.
        root: Folder of the data, where the data set has one.
    """

    name: str
    group: str
    dataset: str
    part: str
    root: Path | None = None

    @classmethod
    def digits(cls, part: int) -> Pictures:
        """scikit-learn's digits with one class normal."""
        return cls(str(part), "digits", "digits", str(part))

    @classmethod
    def mnist(cls, part: int, root: Path | None) -> Pictures:
        """MNIST with one class normal; by default from where data are looked for."""
        return cls(f"mnist {part}", "mnist", "mnist", str(part), root)

    @classmethod
    def folder(cls, path: Path) -> Pictures:
        """A folder in MVTec AD's layout: ``train/good``, ``test/good``, ``test/KIND``."""
        return cls(path.resolve().name, "parts", "mvtec", path.resolve().name, path)

    def split(self, seed: int, side: int, limits: Limits, contamination: float) -> Split:
        """The images, of which a share ``contamination`` of those to learn from are anomalies."""
        arguments: dict[str, Any] = {} if self.root is None else {"root": str(self.root)}
        if self.group == "parts":
            arguments["image_size"] = side
        split = DATASETS[self.dataset].split(arguments, self.part, PROTOCOLS[0], seed, limits)
        return contaminated(split, contamination, seed)


def contaminated(split: Split, share: float, seed: int) -> Split:
    """A share of the training and of the validation images replaced by anomalies, which leave the test part.

    Nobody who does not know of the anomalies could keep them out of the validation images.

    Args:
        split: With normal images to train and to validate on.
        share: Of each of both parts, rounded to images, in [0, 1).
        seed: Draws the images.

    Raises:
        ValueError: If the share is out of range, or takes more than half of the anomalies.
    """
    import torch

    share = check_finite_float("contamination", share, minimum=0)
    counts = [round(share * len(images)) for images in (split.train, split.validation)]
    draw = np.random.default_rng(seed)
    anomalies = draw.permutation(np.flatnonzero(split.anomalous))
    if share >= 1 or 2 * sum(counts) > len(anomalies):
        msg = (
            f"contamination must be below 1 and leave half of the {len(anomalies)} anomalies to be found, "
            f"got {share:g}, which takes {sum(counts)}"
        )
        raise ValueError(msg)
    parts, taken = [], 0
    for images, count in zip((split.train, split.validation), counts, strict=True):
        kept = np.sort(draw.permutation(len(images))[count:])
        parts.append(torch.cat([images[kept], split.test[anomalies[taken : taken + count]]]))
        taken += count
    left = np.setdiff1d(np.arange(len(split.test)), anomalies[:taken])
    masks = None if split.masks is None else split.masks[left]
    return Split(parts[0], parts[1], split.test[left], split.anomalous[left], masks)


def arms_of(strengths: Sequence[float], pressures: Sequence[float]) -> list[tuple[bool, float]]:
    """Whether ``collapse_weight`` is ``"auto"``, and how strong it is: the bare host, multiples, pressures."""
    return [(False, 0.0), *((False, strength) for strength in strengths), *((True, one) for one in pressures)]


def calls_of(
    host: str,
    pictures: Pictures,
    seeds: int,
    arms: Sequence[tuple[bool, float]],
    limits: Limits,
    contamination: float,
    epochs: int | None,
    weights: Path | None,
) -> list[tuple[Any, ...]]:
    """Arguments of :func:`run_images` for a host on images; none where it has no budget for them."""
    if pictures.group not in BUDGETS[host]:
        return []
    side, usual = BUDGETS[host][pictures.group]
    budget, arguments = Budget(epochs or usual, weights=weights), {"image_size": side}
    return [
        (
            host,
            pictures.name,
            seed,
            *arm,
            contamination,
            partial(pictures.split, seed, side, limits, contamination),
            budget,
            arguments,
        )
        for seed in range(seeds)
        for arm in arms
    ]


def run_images(
    host: str,
    data: str,
    seed: int,
    automatic: bool,
    strength: float,
    contamination: float,
    make: Callable[[], Split],
    budget: Budget,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """A host trained with a weight of the term, and all scores that can be made of it, of one training.

    Args:
        host: Of :data:`BUDGETS`.
        data: Name in the record.
        seed: Of weights and batches.
        automatic: Whether the weight is ``"auto"``.
        strength: Of ``"auto"``, else how many times the weight of :data:`WEIGHTS`.
        contamination: For the record: of the images that ``make`` returns.
        make: The images.
        budget: Epochs and a backbone's weights.
        arguments: Of the host.
    """
    import torch
    from sklearn.metrics import roc_auc_score
    from threadpoolctl import threadpool_limits

    from benchmarks.methods.registry import build

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    weight: Any = "auto" if automatic else strength * WEIGHTS[host]
    given = {**arguments, "collapse_weight": weight, "collapse_score_weight": 0.0}
    if automatic:
        given["collapse_strength"] = strength
    with threadpool_limits(1):
        split = make()
        detector: Any = build("images", f"Collapsed{host}", budget, seed, given)
        start = time.perf_counter()
        detector.fit(split)
        seconds = time.perf_counter() - start
        # The score has no part in training. With these weights it has the norm as it is, so that both are known.
        detector.model.collapse_weight, detector.model.collapse_score_weight = 0.0, 1.0
        known, terms = (detector.score(images).terms for images in (split.validation, split.test))
    own = WEIGHTS[host] * detector.model.collapse_score_factor() * (1.0 if automatic else max(strength, 1.0))
    norms = terms["latent"]
    found = {"auroc": terms["host"], "auroc_with_term": terms["host"] + own * norms}
    found["auroc_in_units"] = in_units_of(known, terms)
    return {
        "kind": "image",
        "host": host,
        "data": data,
        "contamination": contamination,
        "seed": seed,
        "weight": weight,
        "strength": strength,
        **{name: float(roc_auc_score(split.anomalous, scores)) for name, scores in found.items()},
        "norm_normal": float(norms[~split.anomalous].mean()),
        "norm_anomalous": float(norms[split.anomalous].mean()),
        "fit_seconds": seconds,
    }


def in_units_of(known: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> np.ndarray:
    """The score of ``collapse_weight="auto"``: ``host`` and ``latent`` of new images in units of known ones."""
    from toll_plugin.core import TollTerms, in_units, toll_score, typical

    units = TollTerms(typical(np.abs(known["host"])), typical(known["latent"]))
    scores: np.ndarray = toll_score(in_units(TollTerms(new["host"], new["latent"]), units), beta=0.5)
    return scores


def tested(gaps: list[float]) -> str:
    """Mean, standard error and the p-value of a paired t-test; of a single pair the difference."""
    from scipy.stats import ttest_1samp

    if len(gaps) == 1:
        return f"{gaps[0]:+.4f}"
    p = float(ttest_1samp(gaps, 0.0).pvalue) if statistics.stdev(gaps) > 0 else float("nan")
    mark = "**" if p < 0.05 else ""
    return f"{mark}{mean_and_error(gaps)}{mark} (p {p:.2g})"


def _group(run: Mapping[str, Any]) -> str:
    name = "tables" if run["kind"] == "table" else str(run["data"])
    name = "digits" if name.isdigit() else "mnist" if name.startswith("mnist ") else name
    share = run.get("contamination", 0.0)
    return f"{name}, {100 * share:g} % anomalies" if share else name


def _arm(run: Mapping[str, Any]) -> str:
    """The bare host first, then multiples of the host's weight; older records have nothing else."""
    if run.get("weight") == "auto":
        return f"auto x {run['strength']:g}"
    return f"x {run['strength']:g}" if run["strength"] else "0"


def pairs_table(runs: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """A line per host, data and weight: differences to the bare host, paired by data and seed.

    In older records the bare host has no line: its score in units was not measured.
    """
    for host, group in dict.fromkeys((run["host"], _group(run)) for run in runs):
        mine = [run for run in runs if run["host"] == host and _group(run) == group]
        bare = {(run["data"], run["seed"]): run for run in mine if _arm(run) == "0"}
        names = {name: title for name, title in SCORES.items() if name in mine[0]}
        arms = dict.fromkeys(
            _arm(run) for run in sorted(mine, key=lambda run: (run.get("weight") == "auto", run["strength"]))
        )
        for arm in arms:
            if arm == "0" and "auroc_in_units" not in names:
                continue
            pairs = [(run, bare[run["data"], run["seed"]]) for run in mine if _arm(run) == arm]
            shrunk = statistics.median(run["norm_normal"] / twin["norm_normal"] for run, twin in pairs)
            yield {
                "host": host,
                "data": group,
                "pairs": str(len(pairs)),
                "host's AUROC": f"{statistics.mean(twin['auroc'] for _, twin in pairs):.3f}",
                "weight": arm,
                "term in the loss": "" if arm == "0" else tested([run["auroc"] - twin["auroc"] for run, twin in pairs]),
                **{title: tested([run[name] - twin["auroc"] for run, twin in pairs]) for name, title in names.items()},
                "normal norm": f"x {shrunk:.2g}",
            }
