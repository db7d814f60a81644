"""Does targeted collapse improve other people's detectors? Each host with and without the term."""

from __future__ import annotations

import importlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data.datasets import DATASETS, PROTOCOLS, Limits
from benchmarks.data.tables import SEARCH, halves, load
from benchmarks.interfaces import Budget, Split
from benchmarks.run.jobs import run_all
from benchmarks.run.store import RESULTS, finish, provenance
from benchmarks.run.tables import markdown, mean_and_error

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


def _images(part: str, seed: int, side: int, mvtec: Path | None) -> Split:
    name, arguments = ("digits", {}) if part.isdigit() else ("mvtec", {"root": mvtec, "image_size": side})
    return DATASETS[name].split(arguments, part, PROTOCOLS[0], seed, Limits())


def _rows(name: str, seed: int, roots: list[Path], max_rows: int) -> Split:
    import torch

    train, test, labels = halves(*load(name, roots, max_rows), seed)
    rows, tested = torch.from_numpy(train), torch.from_numpy(test)
    return Split(rows, rows[:0], tested, labels == 1)


def _run(
    kind: str,
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
    module = importlib.import_module("toll_plugin.anomalib" if kind == "image" else "toll_plugin.pyod")
    default = getattr(module, f"Collapsed{host}").collapse_weight
    # The score has the term with a weight of 1, so that the norm is known without a weight in the loss, too.
    given = {**arguments, "collapse_weight": strength * default, "collapse_score_weight": 1.0}
    with threadpool_limits(1):
        split = make()
        detector: Any = build("images" if kind == "image" else kind, f"Collapsed{host}", budget, seed, given)
        start = time.perf_counter()
        detector.fit(split)
        seconds = time.perf_counter() - start
        terms = detector.score(split.test).terms
    without, norms, weight = terms["host"], terms["latent"], default * detector.model.collapse_score_factor()
    return {
        "kind": kind,
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
    """A line per host, data and weight: what the term changes, paired by data and seed."""
    rows = []
    for host, group in dict.fromkeys((run["host"], _group(run)) for run in runs):
        mine = [run for run in runs if run["host"] == host and _group(run) == group]
        bare = {(run["data"], run["seed"]): run for run in mine if run["strength"] == 0}
        for strength in sorted({run["strength"] for run in mine} - {0.0}):
            arm = [run for run in mine if run["strength"] == strength]
            pairs = [(run, bare[run["data"], run["seed"]]) for run in arm]
            shrunk = statistics.median(run["norm_normal"] / twin["norm_normal"] for run, twin in pairs)
            rows.append(
                {
                    "host": host,
                    "data": group,
                    "pairs": str(len(pairs)),
                    "host's AUROC": f"{statistics.mean(twin['auroc'] for _, twin in pairs):.3f}",
                    "weight": f"x {strength:g}",
                    "term in the loss": _tested([run["auroc"] - twin["auroc"] for run, twin in pairs]),
                    "in loss and score": _tested([run["auroc_with_term"] - twin["auroc"] for run, twin in pairs]),
                    "normal norm": f"x {shrunk:.2g}",
                }
            )
    return markdown(rows)


def mixin(
    mvtec: Path | None = None,
    categories: tuple[str, ...] = ("screw",),
    weights: Path | None = None,
    roots: list[Path] | None = None,
    names: tuple[str, ...] = SEARCH,
    classes: tuple[int, ...] = (1, 8),
    hosts: tuple[str, ...] = (*BUDGETS, *DETECTORS),
    strengths: tuple[float, ...] = (1.0, 10.0),
    seeds: int = 3,
    max_rows: int = 2000,
    epochs: int | None = None,
    jobs: int = 2,
    output: Path = RESULTS / "mixin.json",
) -> None:
    """AUROC of each host without the term, with it in the loss, and with it in loss and score.

    Args:
        mvtec: Folder of MVTec AD; without it images are the digits only.
        categories: Of MVTec AD.
        weights: Local file of ImageNet weights of a ResNet-18, for machines that cannot download
            them; timm's by default.
        roots: Folders that hold ``NAME.mat`` or ``NAME.npz``; without them no table is run.
        names: Which tables; by default those of ODDS that defaults may be chosen by.
        classes: Normal classes of the digits; by default two on which hosts are not perfect.
        hosts: By default all.
        strengths: Multiples of the default weights.
        seeds: Splits, each with its own initial weights.
        max_rows: Larger tables are drawn from.
        epochs: Of every image host; by default each has its own number, and tables their host's.
        jobs: Processes, one thread each.
        output: Where the record goes.
    """
    record = {"command": "mixin", **provenance(), "seeds": seeds, "max_rows": max_rows}
    calls: list[tuple[Any, ...]] = []
    for host in hosts:
        for part in (*map(str, classes), *(categories if mvtec else ())) if host in BUDGETS else ():
            group = "digits" if part.isdigit() else "parts"
            if group not in BUDGETS[host]:
                continue
            side, usual = BUDGETS[host][group]
            budget, arguments = Budget(epochs or usual, weights=weights), {"image_size": side}
            calls += [
                ("image", host, part, seed, strength, partial(_images, part, seed, side, mvtec), budget, arguments)
                for seed in range(seeds)
                for strength in (0.0, *strengths)
            ]
        for name in names if roots and host in DETECTORS else ():
            calls += [
                ("table", host, name, seed, strength, partial(_rows, name, seed, roots, max_rows), Budget(), {})
                for seed in range(seeds)
                for strength in (0.0, *strengths)
            ]
    runs = run_all(_run, calls, jobs, "mixin")
    finish(output, {**record, "table": make_table(runs), "runs": runs})
