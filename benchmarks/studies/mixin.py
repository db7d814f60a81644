"""Does targeted collapse improve other people's detectors? Each host with and without the term."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.data.tables import SEARCH, halves, load
from benchmarks.methods.hosts import HOSTS, run_image
from benchmarks.run.records import RESULTS, finish, mean_and_error, provenance, run_all

DETECTORS = {
    "AutoEncoder": {"verbose": 0},
    "VAE": {"verbose": 0},
    "AE1SVM": {},
    "DeepSVDD": {"verbose": 0},
}


def _run_table(
    name: str, table: str, seed: int, strength: float, roots: list[Path], max_rows: int
) -> tuple[Any, Any, Any, float, float]:
    """As :func:`run_image`, for a detector of PyOD."""
    import numpy as np
    import torch
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    import toll_plugin.pyod as collapsed

    torch.set_num_threads(1)
    train, test, labels = halves(*load(table, roots, max_rows), seed)
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    kind = getattr(collapsed, f"Collapsed{name}")
    arguments = DETECTORS[name] | ({"n_features": train.shape[1]} if name == "DeepSVDD" else {})
    default = kind.collapse_weight
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), threadpool_limits(1):
        warnings.simplefilter("ignore")
        detector = kind(collapse_weight=strength * default, **arguments)
        if "random_state" in detector.get_params():
            detector.set_params(random_state=seed)
        np.random.seed(seed)  # noqa: NPY002  the hosts draw from the global generators
        torch.manual_seed(seed)
        start = time.perf_counter()
        detector.fit(train)
        seconds = time.perf_counter() - start

        def scores(weight: float) -> Any:
            torch.manual_seed(seed)  # the VAE draws its code when it scores, too
            return detector.set_params(collapse_score_weight=weight).decision_function(test)

        without, unit = scores(0.0), scores(default)
    return without, (unit - without) / default, labels, default, seconds


def _run(kind: str, host: str, data: str, seed: int, strength: float, *arguments: Any) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    run = run_image if kind == "image" else _run_table
    without, norms, labels, weight, seconds = run(host, data, seed, strength, *arguments)
    return {
        "kind": kind,
        "host": host,
        "data": data,
        "seed": seed,
        "strength": strength,
        "auroc": float(roc_auc_score(labels, without)),
        # Of the bare host too, so that what the score alone brings is known.
        "auroc_with_term": float(roc_auc_score(labels, without + max(strength, 1.0) * weight * norms)),
        "norm_normal": float(norms[labels == 0].mean()),
        "norm_anomalous": float(norms[labels == 1].mean()),
        "fit_seconds": seconds,
    }


def _tested(gaps: list[float]) -> str:
    """Mean, standard error and the p-value of a paired t-test."""
    from scipy.stats import ttest_1samp

    p = float(ttest_1samp(gaps, 0.0).pvalue) if len(gaps) > 1 and statistics.stdev(gaps) > 0 else float("nan")
    mark = "**" if p < 0.05 else ""
    return f"{mark}{mean_and_error(gaps)}{mark} (p {p:.2g})"


def _group(run: dict[str, Any]) -> str:
    if run["kind"] == "table":
        return "tables"
    return "digits" if run["data"].isdigit() else str(run["data"])


def _table(runs: list[dict[str, Any]]) -> str:
    head = "| host | data | pairs | host's AUROC | weight | term in the loss | in loss and score | normal norm |"
    lines = [head, "|---" * 8 + "|"]
    for host, group in dict.fromkeys((run["host"], _group(run)) for run in runs):
        mine = [run for run in runs if run["host"] == host and _group(run) == group]
        bare = {(run["data"], run["seed"]): run for run in mine if run["strength"] == 0}
        for strength in sorted({run["strength"] for run in mine} - {0.0}):
            arm = [run for run in mine if run["strength"] == strength]
            pairs = [(run, bare[run["data"], run["seed"]]) for run in arm]
            loss = _tested([run["auroc"] - twin["auroc"] for run, twin in pairs])
            both = _tested([run["auroc_with_term"] - twin["auroc"] for run, twin in pairs])
            shrunk = statistics.median(run["norm_normal"] / twin["norm_normal"] for run, twin in pairs)
            mean = statistics.mean(twin["auroc"] for _, twin in pairs)
            cells = [host, group, str(len(pairs)), f"{mean:.3f}", f"x {strength:g}", loss, both, f"x {shrunk:.2g}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mixin(
    mvtec: Path | None = None,
    categories: tuple[str, ...] = ("screw",),
    weights: Path | None = None,
    roots: list[Path] | None = None,
    names: tuple[str, ...] = SEARCH,
    classes: tuple[int, ...] = (1, 8),
    hosts: tuple[str, ...] = (*HOSTS, *DETECTORS),
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
    arms = (0.0, *strengths)
    parts = [*map(str, classes), *(categories if mvtec else ())]
    images = [
        ("image", host, part, seed, strength, mvtec, weights, epochs)
        for host in hosts
        if host in HOSTS
        for part in parts
        if HOSTS[host].sizes[not part.isdigit()]
        for seed in range(seeds)
        for strength in arms
    ]
    tables = [
        ("table", host, name, seed, strength, roots, max_rows)
        for host in hosts
        if host in DETECTORS
        for name in (names if roots else ())
        for seed in range(seeds)
        for strength in arms
    ]
    runs = run_all(_run, images + tables, jobs, "mixin", "run")
    finish(output, {**record, "table": _table(runs), "runs": runs})
