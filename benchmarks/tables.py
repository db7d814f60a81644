"""TollDetector beside PyOD's detectors on tables of the ODDS and ADBench collections."""

from __future__ import annotations

import contextlib
import importlib
import io
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, finish, mean_and_error, provenance, run_all

#: The tables that were not looked at while the defaults were chosen.
CHECK = ("vertebral", "lympho", "ionosphere", "cardio", "shuttle", "pendigits", "musk", "mnist")

#: The tables that defaults may be chosen by.
SEARCH = (
    "glass",
    "letter",
    "optdigits",
    "pima",
    "satellite",
    "satimage-2",
    "vowels",
    "wbc",
)

#: PyOD's detectors, each at its defaults.
PYOD = {
    "KNN": "knn",
    "LOF": "lof",
    "IForest": "iforest",
    "OCSVM": "ocsvm",
    "PCA": "pca",
    "ECOD": "ecod",
    "COPOD": "copod",
    "HBOS": "hbos",
    "GMM": "gmm",
    "KDE": "kde",
    "MCD": "mcd",
    "CBLOF": "cblof",
    "INNE": "inne",
    "LODA": "loda",
    "LUNAR": "lunar",
    "DIF": "dif",
    "AutoEncoder": "auto_encoder",
    "VAE": "vae",
    "DeepSVDD": "deep_svdd",
    "ALAD": "alad",
}
TOLL = {"TollDetector": {}, "TollDetector, beta 0": {"beta": 0.0}, "TollDetector, euclidean": {"metric": "euclidean"}}


def load(name: str, roots: list[Path], max_rows: int = 10_000) -> tuple[Any, Any]:
    """Rows and labels (1 for an anomaly) of ``NAME.mat`` or ``NAME.npz``; more than ``max_rows`` are drawn from."""
    import numpy as np
    from scipy.io import loadmat

    paths = [path for root in roots for path in (root / f"{name}.mat", root / f"{name}.npz") if path.exists()]
    if not paths:
        msg = f"no {name}.mat or {name}.npz in {', '.join(map(str, roots))}: see https://odds.cs.stonybrook.edu"
        raise FileNotFoundError(msg)
    table = loadmat(paths[0]) if paths[0].suffix == ".mat" else np.load(paths[0])
    x, y = np.asarray(table["X"], dtype=float), np.asarray(table["y"]).ravel().astype(int)
    if len(x) > max_rows:
        chosen = np.random.default_rng(0).permutation(len(x))[:max_rows]
        x, y = x[chosen], y[chosen]
    return x, y


def halves(x: Any, y: Any, seed: int) -> tuple[Any, Any, Any]:
    """Half of the normal rows to train on; the others and all anomalies, shuffled, to test on; their labels."""
    import numpy as np

    draw = np.random.default_rng(seed)
    normal = draw.permutation(np.flatnonzero(y == 0))
    half = len(normal) // 2
    test = draw.permutation(np.concatenate([normal[half:], np.flatnonzero(y == 1)]))
    return x[normal[:half]], x[test], y[test]


def _make(method: str, features: int, seed: int) -> Any:
    from toll_plugin.pyod import TollDetector

    if method in TOLL:
        return TollDetector(random_state=seed, **TOLL[method])
    made = getattr(importlib.import_module(f"pyod.models.{PYOD[method]}"), method)
    detector = made(n_features=features) if method == "DeepSVDD" else made()
    if "random_state" in detector.get_params() and method != "DIF":
        detector.set_params(random_state=seed)
    return detector


def _run(method: str, name: str, seed: int, protocol: str, roots: list[Path]) -> dict[str, Any]:
    import numpy as np
    import torch
    from sklearn.metrics import average_precision_score, roc_auc_score
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    x, y = load(name, roots)
    train, test, y = halves(x, y, seed) if protocol == "semi-supervised" else (x, x, y)
    if method not in TOLL:  # which scales by itself
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    result = {"method": method, "table": name, "seed": seed, "protocol": protocol}
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        threadpool_limits(1),
    ):
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        try:
            detector = _make(method, train.shape[1], seed)
            detector.fit(train)
            taken = time.perf_counter() - start
            scores = np.nan_to_num(np.asarray(detector.decision_function(test), dtype=float), posinf=1e300, nan=-1e300)
        except Exception as error:  # noqa: BLE001  a detector that fails is a result too
            return result | {"error": repr(error)[:200], "auroc": 0.5, "ap": float(np.mean(y)), "fit_seconds": 0.0}
    auroc, ap = roc_auc_score(y, scores), average_precision_score(y, scores)
    return result | {"auroc": float(auroc), "ap": float(ap), "fit_seconds": taken}


def _ranks(runs: list[dict[str, Any]], metric: str) -> dict[str, float]:
    """Mean rank over tables of each method's mean over seeds; ties share their ranks."""
    from scipy.stats import rankdata

    methods = list(dict.fromkeys(run["method"] for run in runs))
    found: dict[str, list[float]] = {method: [] for method in methods}
    for table in dict.fromkeys(run["table"] for run in runs):
        means = [_mean(runs, metric, method, table) for method in methods]
        for method, rank in zip(methods, rankdata([-mean for mean in means]), strict=True):
            found[method].append(float(rank))
    return {method: statistics.mean(ranks) for method, ranks in found.items()}


def _mean(runs: list[dict[str, Any]], metric: str, method: str, table: str | None = None) -> float:
    return statistics.mean(r[metric] for r in runs if r["method"] == method and table in (None, r["table"]))


def _table(runs: list[dict[str, Any]], protocol: str) -> str:
    """One line per method, best mean rank first; variants of Toll are not ranked against each other."""
    mine = [run for run in runs if run["protocol"] == protocol]
    tables = list(dict.fromkeys(run["table"] for run in mine))
    methods = list(dict.fromkeys(run["method"] for run in mine))
    variants = [method for method in methods if method in TOLL and method != "TollDetector"]
    ranked = [run for run in mine if run["method"] not in variants]
    ranks, precision_ranks = _ranks(ranked, "auroc"), _ranks(ranked, "ap")
    lines = [f"| {protocol}: AUROC | " + " | ".join(tables) + " | mean | mean rank | mean AP | AP rank | fit, s |"]
    lines.append("|---" * (len(tables) + 6) + "|")
    for method in [*sorted(ranks, key=lambda m: ranks[m]), *variants]:
        cells = [f"{_mean(mine, 'auroc', method, table):.3f}" for table in tables]
        rank = (
            f"{ranks[method]:.2f} | {_mean(mine, 'ap', method):.3f} | {precision_ranks[method]:.2f}"
            if method in ranks
            else f"| {_mean(mine, 'ap', method):.3f} |"
        )
        seconds = statistics.median(r["fit_seconds"] for r in mine if r["method"] == method)
        lines.append(
            f"| {method} | " + " | ".join(cells) + f" | {_mean(mine, 'auroc', method):.4f} | {rank} | {seconds:.2g} |"
        )
    return "\n".join(lines)


def _paired(runs: list[dict[str, Any]], protocol: str, twin: str, metric: str) -> str:
    by = {(r["method"], r["table"], r["seed"]): r[metric] for r in runs if r["protocol"] == protocol}
    gaps = [value - by[twin, table, seed] for (m, table, seed), value in by.items() if m == "TollDetector"]
    return mean_and_error(gaps)


def tables(
    roots: list[Path],
    names: list[str] | None = None,
    seeds: int = 3,
    methods: list[str] | None = None,
    protocols: tuple[str, ...] = ("semi-supervised", "contaminated"),
    jobs: int = 2,
    output: Path = RESULTS / "tables.json",
) -> None:
    """AUROC and average precision of TollDetector and PyOD's detectors, all at their defaults.

    Semi-supervised: train on half of the normal rows, test on the others and all anomalies.
    Contaminated: train on all rows, and score those. PyOD's detectors get standardised columns.

    Args:
        roots: Folders that hold ``NAME.mat`` (ODDS) or ``NAME.npz`` (ADBench) with ``X`` and ``y``.
        names: Which tables; by default the eight that were kept apart while the defaults were chosen.
        seeds: Splits, each with its own initial weights.
        methods: By default all.
        protocols: Which of the two.
        jobs: Processes, one thread each.
        output: Where the record goes.
    """
    record = {"command": "tables", **provenance(), "seeds": seeds}
    chosen = [
        (method, name, seed, protocol, roots)
        for protocol in protocols
        for name in names or CHECK
        for seed in range(seeds)
        for method in methods or (*TOLL, *PYOD)
    ]
    runs = run_all(_run, chosen, jobs, "tables", "run")
    parts = []
    for protocol in protocols:
        parts.append(_table(runs, protocol))
        for twin in TOLL:
            if twin != "TollDetector" and any(run["method"] == twin for run in runs):
                gaps = ", ".join(
                    f"{_paired(runs, protocol, twin, metric)} {name}"
                    for metric, name in (("auroc", "AUROC"), ("ap", "AP"))
                )
                parts.append(f"TollDetector minus {twin}: {gaps} (mean, standard error over tables and seeds).")
    failed = sorted({f"{run['method']} on {run['table']}" for run in runs if "error" in run})
    if failed:
        parts.append(f"Counted as chance because they failed: {', '.join(failed)}.")
    finish(output, {**record, "table": "\n\n".join(parts), "runs": runs})
