"""``rays``: points far outside the data that a network reconstructs, the case that a latent norm is made for.

A network of linear or ReLU units is affine far from the data, and what it has learnt along a line it repeats beyond
the line's end: the reconstruction error of such points stays small (Bouman and Heskes, Autoencoders for Anomaly
Detection are Unreliable, arXiv 2501.13864), while their latents grow with the distance. Normal rows lie along one
line through the origin of a plane, anomalies on the same line, further out than any normal row is likely to.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.style import COLORS
from benchmarks.run.store import RESULTS, finish, provenance, whole
from benchmarks.run.tables import markdown
from toll_plugin.core.checks import check_finite_float, check_integer, check_option

#: Of the line, in radians: no column of the table has it.
ANGLE = np.pi / 6

#: What tells one detector from another.
GIVEN = ("network", "residuals", "inputs", "weight")

TERMS = ("reconstruction", "latent", "score")

#: Weights of the latent norm: the detector's own, and none.
WEIGHTS: dict[str, Any] = {"default": {}, "beta=0": {"beta": 0.0}}


def rows(distances: np.ndarray, noise: float, draw: np.random.Generator) -> np.ndarray:
    """Points of the line at signed ``distances`` from the origin, off it by a normal deviate times ``noise``."""
    along, across = np.array([np.cos(ANGLE), np.sin(ANGLE)]), np.array([-np.sin(ANGLE), np.cos(ANGLE)])
    off = noise * draw.standard_normal(len(distances))
    return distances[:, None] * along + off[:, None] * across


def detector(network: str, metric: str, inputs: str, seed: int, **given: Any) -> Any:
    """TollDetector with one of :data:`NETWORKS`, on inputs ``"clipped"`` (its own scaling) or ``"unbounded"``.

    The metric is that of residuals. Unbounded columns are standardised by scikit-learn, and nothing is clipped.
    """
    from sklearn.preprocessing import StandardScaler

    from toll_plugin.pyod import TollDetector

    if inputs == "unbounded":
        given["preprocessing"] = StandardScaler()
    return TollDetector(metric=metric, random_state=seed, **NETWORKS[network](seed) | given)


def _linear(seed: int) -> dict[str, Any]:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        modules = {"encoder": nn.Linear(2, 1), "decoder": nn.Linear(1, 2)}
    # So small a network takes longer to train to its end.
    return {**modules, "n_members": 1, "max_steps": 3000}


#: What the detectors are beyond TollDetector's defaults, by the seed of the initial weights.
NETWORKS = {
    "linear, one latent": _linear,
    "ReLU, one latent": lambda _: {"latent_dim": 1, "batch_norm": False},
    "defaults": lambda _: {},
}


def measure(
    network: str,
    metric: str,
    inputs: str,
    weight: str,
    seed: int,
    noise: float,
    distances: Sequence[float],
    size: int,
    **given: Any,
) -> dict[str, Any]:
    """AUROC of the score and of each of its terms, for anomalies at each distance: one fit."""
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(seed)
    train, normal = (rows(draw.standard_normal(size), noise, draw) for _ in range(2))
    fitted = detector(network, metric, inputs, seed, **WEIGHTS[weight], **given).fit(train)
    known, labels = fitted.explain(normal), np.arange(2 * size) >= size
    found: dict[str, list[float]] = {term: [] for term in TERMS}
    for distance in distances:
        far = fitted.explain(rows(distance * draw.choice([-1.0, 1.0], size), noise, draw))
        for term, values in found.items():
            scores = np.concatenate([getattr(known, term), getattr(far, term)])
            values.append(float(roc_auc_score(labels, scores)))
    which = dict(zip(GIVEN, (network, metric, inputs, weight), strict=True))
    return {**which, "seed": seed, "auroc": found}


def table(runs: Sequence[dict[str, Any]], distances: Sequence[float]) -> str:
    """Mean AUROC over seeds and its standard error: a row for each detector, a column for each distance and term."""
    cells: dict[tuple[str, ...], list[dict[str, list[float]]]] = {}
    for run in runs:
        cells.setdefault(tuple(run[name] for name in GIVEN), []).append(run["auroc"])
    lines = []
    for given, found in cells.items():
        line = dict(zip(GIVEN, given, strict=True))
        for i, distance in enumerate(distances):
            for term in TERMS:
                values = [one[term][i] for one in found]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
                line[f"{term} at {distance:g}"] = f"{statistics.mean(values):.3f} ± {error:.3f}"
        lines.append(line)
    note = (
        "AUROC of the score and of its terms alone, mean over seeds ± standard error; anomalies lie on the line of the "
        "normal rows, so many of their standard deviations from its middle."
    )
    return f"{markdown(lines)}\n\n{note}"


def plot(path: Path, network: str, metric: str, noise: float, size: int, reach: float, **given: Any) -> None:
    """What the plane's points get from reconstruction, latent and score, in multiples of the normal rows' 95 %."""
    from matplotlib.figure import Figure

    draw = np.random.default_rng(0)
    train = rows(draw.standard_normal(size), noise, draw)
    grid = np.linspace(-reach, reach, 161)
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    figure = Figure(figsize=(9, 6), dpi=90, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for line, inputs in zip(panels, ("unbounded", "clipped"), strict=True):
        fitted = detector(network, metric, inputs, 0, **given).fit(train)
        plane, known = fitted.explain(points), fitted.explain(train)
        for axes, term in zip(line, TERMS, strict=True):
            unit = np.quantile(getattr(known, term), 0.95)
            height = np.log2(np.maximum(getattr(plane, term) / unit, 2.0**-4)).reshape(len(grid), len(grid))
            shown = axes.contourf(grid, grid, height, levels=np.arange(-4, 7), cmap="viridis", extend="both")
            axes.contour(grid, grid, height, levels=[0], colors="white", linewidths=1.5)
            axes.scatter(*train[:200].T, s=2, color=COLORS[0])
            axes.set_title(f"{'latent term' if term == 'latent' else term}, inputs {inputs}", fontsize=9)
            axes.set_aspect("equal")
    label = "log2 of the term over its 95 % quantile on the normal rows; white: equal to it"
    figure.colorbar(shown, ax=panels, shrink=0.8, label=label)
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:])


def rays(
    noise: float = 0.1,
    distances: tuple[float, ...] = (3.0, 10.0),
    size: int = 1000,
    seeds: int = 5,
    max_steps: int | None = None,
    output: Path = RESULTS / "rays.json",
    figure: Path = RESULTS / "rays.png",
) -> None:
    """Does the latent norm find what is far out on a line that the network reconstructs?

    Three networks, residuals in two metrics, with TollDetector's clipping of inputs and without, with the latent
    pressed and not.

    Args:
        noise: Standard deviation of normal rows across the line; along it, it is 1.
        distances: Of anomalies from the middle, in standard deviations of the normal rows along the line.
        size: Normal rows to train on, to test on, and anomalies at each distance.
        seeds: Data and initial weights.
        max_steps: Of training; by default each network has its own number.
        output: Where the record goes.
        figure: Where the picture goes, by its ending a PNG, SVG or PDF.
    """
    check_finite_float("noise", noise, minimum=0, exclusive=True)
    for i, distance in enumerate(distances):
        check_finite_float(f"distances[{i}]", distance, minimum=0, exclusive=True)
    if not distances:
        msg = f"distances must hold at least one distance, got {distances!r}"
        raise ValueError(msg)
    for name, value, minimum in (
        ("size", size, 10),
        ("seeds", seeds, 1),
        ("max_steps", 1 if max_steps is None else max_steps, 1),
    ):
        check_integer(name, value, minimum=minimum)
    check_option("figure's ending", figure.suffix, (".png", ".svg", ".pdf"))
    given = {} if max_steps is None else {"max_steps": max_steps}
    record = {"command": "rays", **provenance(), "noise": noise, "distances": list(distances), "size": size}
    runs = [
        measure(network, metric, inputs, weight, seed, noise, distances, size, **given)
        for network in NETWORKS
        for metric in ("mahalanobis", "euclidean")
        for inputs in ("clipped", "unbounded")
        for weight in WEIGHTS
        for seed in range(seeds)
    ]
    plot(figure, "ReLU, one latent", "euclidean", noise, size, reach=12.0, **given)
    finish(output, {**record, "table": table(runs, distances), "runs": runs})
