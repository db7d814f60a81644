"""Does targeted collapse improve other people's detectors? Each host with and without the term."""

from __future__ import annotations

import importlib
import inspect
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.datasets import DATASETS, PROTOCOLS, Limits
from benchmarks.data.tables import SEARCH, halves, load
from benchmarks.interfaces import Budget, Split
from benchmarks.run.jobs import run_all
from benchmarks.run.store import RESULTS, finish, provenance
from benchmarks.run.tables import markdown, mean_and_error
from toll_plugin.core.checks import check_option

#: Side of the images in pixels and epochs of each host among anomalib's models, on the digits and on parts.
BUDGETS: dict[str, dict[str, tuple[int, int]]] = {
    "Ganomaly": {"digits": (32, 20), "parts": (64, 6)},
    "ReverseDistillation": {"digits": (64, 10), "parts": (128, 3)},
    "Fre": {"digits": (64, 30), "parts": (128, 5)},
    "Supersimplenet": {"digits": (96, 2), "parts": (96, 1)},
    "Glass": {"digits": (64, 10), "parts": (128, 1)},
    # Not on parts: a step of 16 images of 128 pixels takes a minute on one core.
    "Draem": {"digits": (32, 2)},
}

#: Hosts among PyOD's detectors.
DETECTORS = ("AutoEncoder", "VAE", "AE1SVM", "DeepSVDD")

#: Rows per batch, of all of them by default.
BATCH = 32

#: The twenty tables that defaults may be chosen by, of ODDS and of ADBench.
TABLES = (
    *SEARCH,
    "2_annthyroid",
    "12_fault",
    "15_Hepatitis",
    "19_landsat",
    "23_mammography",
    "27_PageBlocks",
    "37_Stamps",
    "41_Waveform",
    "42_WBC",
    "44_Wilt",
    "45_wine",
    "47_yeast",
)

#: Ways to score of a run on a table, beside the host's own: their columns.
SCORES = {
    "sum": "norm added as it is",
    "plain": "plain norm, in units",
    "mahalanobis": "Mahalanobis norm, in units",
}


def _images(part: str, seed: int, side: int, mvtec: Path | None) -> Split:
    name, arguments = ("digits", {}) if part.isdigit() else ("mvtec", {"root": mvtec, "image_size": side})
    return DATASETS[name].split(arguments, part, PROTOCOLS[0], seed, Limits())


def _rows(name: str, protocol: str, seed: int, roots: list[Path], max_rows: int) -> Split:
    import torch

    x, y = load(name, roots, max_rows)
    train, test, labels = halves(x, y, seed) if protocol == "semi-supervised" else (x, x, y)
    train, test, labels = (part[: _without_last(len(part))] for part in (train, test, labels))
    rows, tested = torch.from_numpy(train), torch.from_numpy(test)
    return Split(rows, rows[:0], tested, labels == 1)


def _without_last(count: int) -> int:
    """How many of ``count`` rows to keep so that none is alone in a batch, which AE1SVM can neither train nor score."""
    return count - (count % BATCH == 1)


def _run_images(
    host: str,
    data: str,
    seed: int,
    strength: float,
    make: Callable[[], Split],
    budget: Budget,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """A host trained with ``strength`` times the default weight of the term."""
    import torch
    from sklearn.metrics import roc_auc_score
    from threadpoolctl import threadpool_limits

    from benchmarks.methods.registry import build

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    module = importlib.import_module("toll_plugin.anomalib")
    default = getattr(module, f"Collapsed{host}").collapse_weight
    # The score has the term with a weight of 1, so that the norm is known without a weight in the loss, too.
    given = {**arguments, "collapse_weight": strength * default, "collapse_score_weight": 1.0}
    with threadpool_limits(1):
        split = make()
        detector: Any = build("images", f"Collapsed{host}", budget, seed, given)
        start = time.perf_counter()
        detector.fit(split)
        seconds = time.perf_counter() - start
        terms = detector.score(split.test).terms
    without, norms, weight = terms["host"], terms["latent"], default * detector.model.collapse_score_factor()
    return {
        "kind": "image",
        "host": host,
        "data": data,
        "seed": seed,
        "strength": strength,
        "auroc": float(roc_auc_score(split.anomalous, without)),
        # Of the bare host too, so that what the score alone brings is known.
        "auroc_with_term": float(roc_auc_score(split.anomalous, without + max(strength, 1.0) * weight * norms)),
        "norm_normal": float(norms[~split.anomalous].mean()),
        "norm_anomalous": float(norms[split.anomalous].mean()),
        "fit_seconds": seconds,
    }


def _run_table(
    host: str,
    data: str,
    protocol: str,
    seed: int,
    weight: Any,
    strength: float,
    roots: list[Path],
    max_rows: int,
    max_epochs: int | None,
) -> dict[str, Any]:
    """A host trained with a weight of the term, and all scores that can be made of it, of one training."""
    import torch
    from sklearn.metrics import roc_auc_score
    from threadpoolctl import threadpool_limits

    from benchmarks.methods.registry import build

    torch.set_num_threads(1)
    module = importlib.import_module("toll_plugin.pyod")
    kind = getattr(module, f"Collapsed{host}")
    given = _shortened(kind, max_epochs) | {"collapse_weight": weight, "collapse_strength": strength}
    with threadpool_limits(1):
        split = _rows(data, protocol, seed, roots, max_rows)
        # Scored by the host alone: the score has no part in training.
        detector: Any = build("table", f"Collapsed{host}", Budget(), seed, given | {"collapse_score_weight": 0.0})
        start = time.perf_counter()
        detector.fit(split)
        seconds = time.perf_counter() - start
        (trained, known), (tested, new) = (_scored(detector, rows) for rows in (split.train, split.test))
    sums = scores_of(trained, known, tested, new, kind.collapse_weight)
    lengths = np.linalg.norm(new, axis=1)
    return {
        "kind": "table",
        "host": host,
        "data": data,
        "protocol": protocol,
        "seed": seed,
        "weight": weight,
        "strength": strength,
        "auroc": float(roc_auc_score(split.anomalous, tested)),
        **{f"auroc_{name}": float(roc_auc_score(split.anomalous, score)) for name, score in sums.items()},
        "norm_normal": float(lengths[~split.anomalous].mean()),
        "norm_anomalous": float(lengths[split.anomalous].mean()),
        "fit_seconds": seconds,
    }


def _shortened(kind: type, max_epochs: int | None) -> dict[str, int]:
    """The argument that makes a host of PyOD train at most so many epochs; none where it trains fewer by itself."""
    usual = inspect.signature(kind).parameters
    (name,) = {"epochs", "epoch_num"} & usual.keys()
    return {} if max_epochs is None or usual[name].default <= max_epochs else {name: max_epochs}


def _scored(detector: Any, samples: Any) -> tuple[np.ndarray, np.ndarray]:
    """The host's scores ``(N,)`` and latents ``(N, latent_dim)`` of rows."""
    with detector.model.collapse.watch(detector.model) as latent:
        scores = detector.score(samples).scores
    latents = np.concatenate([one.output.detach().double().numpy() for one in latent.passes])
    # The same rows are scored once more for the terms.
    return scores, latents[: len(scores)]


def scores_of(
    trained: np.ndarray, known: np.ndarray, tested: np.ndarray, new: np.ndarray, weight: float
) -> dict[str, np.ndarray]:
    """Scores of new rows, by the names of :data:`SCORES`.

    Args:
        trained: The host's scores of the training rows.
        known: Their latents.
        tested: The host's scores of the new rows.
        new: Their latents.
        weight: Of the norm where it is added as it is.
    """
    from toll_plugin.core import MahalanobisNorm, typical

    host = tested / typical(np.abs(trained))
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "plain": lambda rows: rows,
        "mahalanobis": MahalanobisNorm.of([known]),
    }
    found = {"sum": tested + weight * np.linalg.norm(new, axis=1)}
    for name, measure in measures.items():
        unit, norms = (np.linalg.norm(measure(rows), axis=1) for rows in (known, new))
        found[name] = host + 0.5 * norms / typical(unit)
    return found


def _tested(gaps: list[float]) -> str:
    """Mean, standard error and the p-value of a paired t-test."""
    from scipy.stats import ttest_1samp

    p = float(ttest_1samp(gaps, 0.0).pvalue) if len(gaps) > 1 and statistics.stdev(gaps) > 0 else float("nan")
    mark = "**" if p < 0.05 else ""
    return f"{mark}{mean_and_error(gaps)}{mark} (p {p:.2g})"


def _group(run: Mapping[str, Any]) -> str:
    if run["kind"] == "table":
        return "tables"
    return "digits" if run["data"].isdigit() else str(run["data"])


def make_table(runs: list[dict[str, Any]]) -> str:
    """What the term changes: lines of :func:`_pairs`, and of :func:`_by_protocol` where runs have a protocol."""
    kinds = [(_pairs, [run for run in runs if "protocol" not in run])]
    kinds.append((_by_protocol, [run for run in runs if "protocol" in run]))
    return "\n\n".join(markdown(list(make(mine))) for make, mine in kinds if mine)


def _by_protocol(runs: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """A line per host, protocol and weight: differences to the bare host, paired by table, seeds averaged first."""
    for host, protocol in dict.fromkeys((run["host"], run["protocol"]) for run in runs):
        mine = [run for run in runs if (run["host"], run["protocol"]) == (host, protocol)]
        bare = {(run["data"], run["seed"]): run for run in mine if run["weight"] == 0}
        for weight, strength in dict.fromkeys((run["weight"], run["strength"]) for run in mine):
            arm = [run for run in mine if (run["weight"], run["strength"]) == (weight, strength)]
            names = {"auroc": "term in the loss"}
            names |= {f"auroc_{name}": f"and {title}" for name, title in SCORES.items()}
            yield {
                "host": host,
                "protocol": protocol,
                "tables": str(len({run["data"] for run in arm})),
                "host's AUROC": f"{statistics.mean(run['auroc'] for run in bare.values()):.3f}",
                "weight": f"auto x {strength:g}" if weight == "auto" else f"{weight:g}",
            } | {
                title: "" if weight == 0 and name == "auroc" else _tested(_by_table(arm, bare, name))
                for name, title in names.items()
            }


def _by_table(arm: list[dict[str, Any]], bare: Mapping[tuple[str, int], dict[str, Any]], name: str) -> list[float]:
    """Of each table, the mean over its seeds of what the term adds to the bare host's AUROC."""
    gaps: dict[str, list[float]] = {}
    for run in arm:
        gaps.setdefault(run["data"], []).append(run[name] - bare[run["data"], run["seed"]]["auroc"])
    return [statistics.mean(found) for found in gaps.values()]


def _pairs(runs: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """A line per host, data and weight: differences to the bare host, paired by data and seed."""
    for host, group in dict.fromkeys((run["host"], _group(run)) for run in runs):
        mine = [run for run in runs if run["host"] == host and _group(run) == group]
        bare = {(run["data"], run["seed"]): run for run in mine if run["strength"] == 0}
        for strength in sorted({run["strength"] for run in mine} - {0.0}):
            arm = [run for run in mine if run["strength"] == strength]
            pairs = [(run, bare[run["data"], run["seed"]]) for run in arm]
            shrunk = statistics.median(run["norm_normal"] / twin["norm_normal"] for run, twin in pairs)
            yield {
                "host": host,
                "data": group,
                "pairs": str(len(pairs)),
                "host's AUROC": f"{statistics.mean(twin['auroc'] for _, twin in pairs):.3f}",
                "weight": f"x {strength:g}",
                "term in the loss": _tested([run["auroc"] - twin["auroc"] for run, twin in pairs]),
                "in loss and score": _tested([run["auroc_with_term"] - twin["auroc"] for run, twin in pairs]),
                "normal norm": f"x {shrunk:.2g}",
            }


def mixin(
    mvtec: Path | None = None,
    categories: tuple[str, ...] = ("screw",),
    weights: Path | None = None,
    roots: list[Path] | None = None,
    names: tuple[str, ...] = TABLES,
    classes: tuple[int, ...] = (1, 8),
    hosts: tuple[str, ...] = (*BUDGETS, *DETECTORS),
    strengths: tuple[float, ...] = (1.0, 10.0),
    protocols: tuple[str, ...] = PROTOCOLS[:2],
    pressures: tuple[float, ...] = (0.3, 1.0),
    seeds: int = 3,
    max_rows: int = 2000,
    epochs: int | None = None,
    max_epochs: int | None = None,
    jobs: int = 2,
    output: Path = RESULTS / "mixin.json",
) -> None:
    """AUROC of each host without the term, with it in the loss, and with it in loss and score.

    Hosts on images have multiples of their default weights. Hosts on tables have the weights 0, their default and
    ``"auto"``; of one training all of :data:`SCORES` are made.

    Args:
        mvtec: Folder of MVTec AD; without it images are the digits only.
        categories: Of MVTec AD.
        weights: Local file of ImageNet weights of a ResNet-18, for machines that cannot download
            them; timm's by default.
        roots: Folders that hold ``NAME.mat`` or ``NAME.npz``; without them no table is run.
        names: Which tables; by default those that defaults may be chosen by.
        classes: Normal classes of the digits; by default two on which hosts are not perfect.
        hosts: By default all.
        strengths: Multiples of the default weights, on images.
        protocols: On tables: ``"semi-supervised"`` trains on half of the normal rows, ``"unsupervised"`` on all
            rows, which are then ranked. Both by default.
        pressures: Strengths of ``collapse_weight="auto"``, on tables.
        seeds: Splits, each with its own initial weights.
        max_rows: Larger tables are drawn from.
        epochs: Of every image host; by default each has its own number.
        max_epochs: Of hosts on tables that train longer by themselves; by default each trains as long as it does.
        jobs: Processes, one thread each.
        output: Where the record goes.
    """
    _check_protocols(protocols)
    record = {"command": "mixin", **provenance(), "seeds": seeds, "max_rows": max_rows, "max_epochs": max_epochs}
    images: list[tuple[Any, ...]] = []
    tables: list[tuple[Any, ...]] = []
    for host in hosts:
        for part in (*map(str, classes), *(categories if mvtec else ())) if host in BUDGETS else ():
            group = "digits" if part.isdigit() else "parts"
            if group not in BUDGETS[host]:
                continue
            side, usual = BUDGETS[host][group]
            budget, arguments = Budget(epochs or usual, weights=weights), {"image_size": side}
            images += [
                (host, part, seed, strength, partial(_images, part, seed, side, mvtec), budget, arguments)
                for seed in range(seeds)
                for strength in (0.0, *strengths)
            ]
        for name in names if roots and host in DETECTORS else ():
            arms = [(0.0, 1.0), (_default(host), 1.0), *(("auto", pressure) for pressure in pressures)]
            tables += [
                (host, name, protocol, seed, *arm, roots, max_rows, max_epochs)
                for protocol in protocols
                for seed in range(seeds)
                for arm in arms
            ]
    runs = [
        run
        for function, calls in ((_run_images, images), (_run_table, tables))
        if calls
        for run in run_all(function, calls, jobs, "mixin")
    ]
    finish(output, {**record, "table": make_table(runs), "runs": runs})


def _default(host: str) -> float:
    return float(getattr(importlib.import_module("toll_plugin.pyod"), f"Collapsed{host}").collapse_weight)


def _check_protocols(protocols: tuple[str, ...]) -> None:
    """Refuse protocols that this study does not have.

    Raises:
        ValueError: If one is neither ``"semi-supervised"`` nor ``"unsupervised"``.
    """
    for protocol in protocols:
        check_option("protocols", protocol, PROTOCOLS[:2])
