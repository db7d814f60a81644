"""Toll on scikit-learn's digits through anomalib's Engine, its beta = 0 twin, and KNN on pixels."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.quiet import quiet_engine
from benchmarks.records import RESULTS, finish, mean_and_error, provenance, run_all


def _toll(normal_class: int, seed: int, beta: float, max_epochs: int) -> dict[str, Any]:
    import logging
    import warnings

    import torch

    from toll_plugin.anomalib import DigitsOneVsRest, Toll

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = DigitsOneVsRest(normal_class, seed=seed)
        model = Toll(image_size=8, in_channels=1, beta=beta, seed=seed, visualizer=False)
        engine = quiet_engine(folder, max_epochs)
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
        auroc = engine.test(model, datamodule=data, verbose=False)[0]["image_AUROC"]
    return {"auroc": auroc, "fit_seconds": seconds, "epochs": engine.trainer.current_epoch}


def _knn(normal_class: int, seed: int) -> dict[str, Any]:
    import torch
    from pyod.models.knn import KNN
    from sklearn.metrics import roc_auc_score

    from toll_plugin.anomalib import DigitsOneVsRest

    data = DigitsOneVsRest(normal_class, seed=seed)
    data.setup()

    def table(part: Any) -> tuple[Any, Any]:
        batch = part.__getitems__(range(len(part)))
        return batch.image.as_subclass(torch.Tensor)[:, 0].flatten(1).numpy(), batch.gt_label.numpy()

    start = time.perf_counter()
    detector = KNN().fit(table(data.train_data)[0])
    seconds = time.perf_counter() - start
    x, y = table(data.test_data)
    return {"auroc": float(roc_auc_score(y, detector.decision_function(x))), "fit_seconds": seconds}


def _run(method: str, beta: float, normal_class: int, seed: int, max_epochs: int) -> dict[str, Any]:
    result = _knn(normal_class, seed) if method == "KNN" else _toll(normal_class, seed, beta, max_epochs)
    return {"method": method, "class": normal_class, "seed": seed, **result}


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def _table(runs: list[dict[str, Any]]) -> str:
    methods = list(dict.fromkeys(run["method"] for run in runs))
    classes = sorted({run["class"] for run in runs})
    lines = ["| method | " + " | ".join(map(str, classes)) + " | mean ± sd over seeds |"]
    lines.append("|---" * (len(classes) + 2) + "|")
    for method in methods:
        mine = [run for run in runs if run["method"] == method]
        cells = [f"{statistics.mean(r['auroc'] for r in mine if r['class'] == c):.3f}" for c in classes]
        seeds = sorted({run["seed"] for run in mine})
        means = [statistics.mean(r["auroc"] for r in mine if r["seed"] == s) for s in seeds]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {_mean(means)} |")
    return "\n".join(lines)


def _paired(runs: list[dict[str, Any]], first: str, second: str) -> str:
    by = {(r["method"], r["class"], r["seed"]): r["auroc"] for r in runs}
    keys = [(c, s) for m, c, s in by if m == first]
    gaps = [by[first, c, s] - by[second, c, s] for c, s in keys]
    return f"{first} minus {second}: {mean_and_error(gaps)} (standard error, {len(gaps)} pairs)"


def digits(
    seeds: int = 5,
    classes: list[int] | None = None,
    betas: list[float] | None = None,
    max_epochs: int = 200,
    jobs: int = 2,
    output: Path = RESULTS / "digits.json",
) -> None:
    """AUROC on the digits, each class normal once.

    Args:
        seeds: Number of splits, each with its own initial weights.
        classes: Normal classes; all ten by default.
        betas: Weights of the latent norm; by default the model's default, and 0 and 1.
        max_epochs: As in configs/digits.yaml.
        jobs: Processes, one thread each.
        output: Where the record goes.
    """
    record = {"command": "digits", **provenance(), "max_epochs": max_epochs}
    methods = [("KNN", 0.0)] + [(f"Toll, beta {beta:g}", beta) for beta in betas or (0.01, 0.0, 1.0)]
    runs = [(m, b, c, s, max_epochs) for m, b in methods for s in range(seeds) for c in classes or range(10)]
    results = run_all(_run, runs, jobs, "digits", "run")
    table = _table(results)
    twin = "Toll, beta 0"
    if any(beta == 0 for _, beta in methods[1:]):
        table += "\n\n" + "; ".join(_paired(results, name, twin) for name, _ in methods[1:] if name != twin) + "."
    finish(output, {**record, "table": table, "runs": results})
