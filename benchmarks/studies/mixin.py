"""Does targeted collapse improve other people's detectors? Each host with and without the term."""

from __future__ import annotations

import importlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.datasets import PROTOCOLS, Limits
from benchmarks.data.tables import SEARCH, halves, load
from benchmarks.interfaces import Budget, Split
from benchmarks.run.jobs import run_all
from benchmarks.run.store import RESULTS, finish, provenance
from benchmarks.run.tables import markdown
from benchmarks.studies.mixin_images import BUDGETS, Pictures, arms_of, calls_of, pairs_table, run_images, tested
from toll_plugin.core.checks import check_option

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


def make_table(runs: list[dict[str, Any]]) -> str:
    """What the term changes: lines of :func:`pairs_table`, and of :func:`_by_protocol` where runs have a protocol."""
    kinds = [(pairs_table, [run for run in runs if "protocol" not in run])]
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
                title: "" if weight == 0 and name == "auroc" else tested(_by_table(arm, bare, name))
                for name, title in names.items()
            }


def _by_table(arm: list[dict[str, Any]], bare: Mapping[tuple[str, int], dict[str, Any]], name: str) -> list[float]:
    """Of each table, the mean over its seeds of what the term adds to the bare host's AUROC."""
    gaps: dict[str, list[float]] = {}
    for run in arm:
        gaps.setdefault(run["data"], []).append(run[name] - bare[run["data"], run["seed"]]["auroc"])
    return [statistics.mean(found) for found in gaps.values()]


def mixin(
    mvtec: Path | None = None,
    categories: tuple[str, ...] = ("screw",),
    weights: Path | None = None,
    roots: list[Path] | None = None,
    names: tuple[str, ...] = TABLES,
    classes: tuple[int, ...] = (1, 8),
    mnist: tuple[int, ...] = (),
    mnist_root: Path | None = None,
    folders: list[Path] | None = None,
    contamination: float = 0.0,
    max_train: int | None = None,
    max_test: int | None = None,
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

    Hosts have the weights 0, multiples of one that makes the term a tenth of their loss (on tables the default) and
    ``"auto"``. Of one training all scores are made: the host's own, with the norm as it is, and with both in units of
    normal samples, which on the bare host is ``collapse_strength=0``.

    Args:
        mvtec: Folder of MVTec AD, of which ``categories`` are run; without it none is.
        categories: Of MVTec AD.
        weights: Local file of ImageNet weights of a ResNet-18, for machines that cannot download
            them; timm's by default.
        roots: Folders that hold ``NAME.mat`` or ``NAME.npz``; without them no table is run.
        names: Which tables; by default those that defaults may be chosen by.
        classes: Normal classes of the digits, of ten; by default two on which hosts are not perfect.
        mnist: Normal classes of MNIST; by default none.
        mnist_root: Folder that holds ``MNIST/raw``; by default where data are looked for.
        folders: Further folders in the layout of a category of MVTec AD.
        contamination: Share of the images to learn from that are replaced by anomalies, which leave the test part.
        max_train: Training images to draw, before the replacement.
        max_test: Test images to draw.
        hosts: By default all.
        strengths: Multiples of the weights, on images.
        protocols: On tables: ``"semi-supervised"`` trains on half of the normal rows, ``"unsupervised"`` on all
            rows, which are then ranked. Both by default.
        pressures: Strengths of ``collapse_weight="auto"``.
        seeds: Splits, each with its own initial weights.
        max_rows: Larger tables are drawn from.
        epochs: Of every image host; by default each has its own number.
        max_epochs: Of hosts on tables that train longer by themselves; by default each trains as long as it does.
        jobs: Processes, one thread each.
        output: Where the record goes.
    """
    _check_protocols(protocols)
    record = {"command": "mixin", **provenance(), "seeds": seeds, "max_rows": max_rows, "max_epochs": max_epochs}
    record |= {"contamination": contamination, "max_train": max_train, "max_test": max_test}
    pictures = [*map(Pictures.digits, classes), *(Pictures.mnist(one, mnist_root) for one in mnist)]
    pictures += map(Pictures.folder, [*([mvtec / name for name in categories] if mvtec else []), *(folders or [])])
    limits, arms = Limits(max_train, max_test), arms_of(strengths, pressures)
    images: list[tuple[Any, ...]] = []
    tables: list[tuple[Any, ...]] = []
    for host in hosts:
        for one in pictures if host in BUDGETS else ():
            images += calls_of(host, one, seeds, arms, limits, contamination, epochs, weights)
        for name in names if roots and host in DETECTORS else ():
            weighted = [(0.0, 1.0), (_default(host), 1.0), *(("auto", pressure) for pressure in pressures)]
            tables += [
                (host, name, protocol, seed, *arm, roots, max_rows, max_epochs)
                for protocol in protocols
                for seed in range(seeds)
                for arm in weighted
            ]
    runs = [
        run
        for function, calls in ((run_images, images), (_run_table, tables))
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
