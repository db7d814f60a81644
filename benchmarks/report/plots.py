"""One function for each kind of figure: runs in, a matplotlib figure with its title and caption out.

Each returns ``None`` where the runs do not support it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import comparison
from benchmarks.report.comparison import BLOCK
from benchmarks.report.style import COLORS, DASHES, INK, MUTED, colors, curves, legend_below, new_figure, shorten, wrap
from benchmarks.report.variants import Family
from benchmarks.run.store import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What a figure is made of, with its title and caption.
Made = tuple["Figure", str, str] | None


def boxes(runs: Sequence[Run]) -> Made:
    """AUROC of every run, a box for each method."""
    import seaborn as sns

    table = comparison.frame(runs).dropna(subset="auroc")
    order = [label for label in comparison.ranking(runs) if label in set(table["label"])]
    if not order:
        return None
    failed = comparison.failures(runs).sum()
    names = [wrap(label) + "†" * bool(failed[label]) for label in order]
    figure, axes = new_figure(60 + 11 * sum(2 + name.count("\n") for name in names))
    values = [table["auroc"][table["label"] == label] for label in order]
    line = {"color": MUTED, "linewidth": 1.2}
    axes.boxplot(
        values,
        positions=range(len(order)),
        orientation="horizontal",
        widths=0.6,
        showfliers=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": INK, "linewidth": 2},
    )
    given = {"data": table, "x": "auroc", "y": "label", "order": order, "hue": "label", "palette": colors(runs)}
    sns.stripplot(**given, jitter=False, size=4, alpha=0.6, legend=False, ax=axes)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="AUROC", ylabel="")
    axes.grid(visible=False, axis="y")
    caption = (
        "A point is one run, a part with one split and one restart; box: quartiles and median; best mean rank on top."
    )
    return figure, "AUROC of every run", caption


def roc(runs: Sequence[Run]) -> Made:
    """Mean ROC curves."""
    from pandas import DataFrame

    grids = [(run["configuration"]["label"], np.asarray(run["roc"])) for run in runs if run.get("roc")]
    if not grids:
        return None
    rows = [(label, x, y) for label, curve in grids for x, y in zip(np.linspace(0, 1, len(curve)), curve, strict=True)]
    figure, axes = new_figure(330)
    axes.axline((0, 0), slope=1, color=MUTED, linewidth=0.8, linestyle=":")
    which = curves(axes, DataFrame(rows, columns=["method", "rate", "found"]), "rate", "found", runs)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    legend_below(figure, axes)
    return figure, "ROC curves", f"Mean over the runs of each method.{which}"


def norms(runs: Sequence[Run]) -> Made:
    """Latent norms of normal and anomalous test samples, a panel for each method with a latent."""
    found = _by_label(runs, "latent_norms")
    labels = sorted((label for label in colors(runs) if label in found), key=lambda label: "Toll" not in label)
    labels = labels[: len(COLORS)]
    if not labels:
        return None
    grid = np.linspace(0, 3, 61)
    figure, rows = new_figure(70 + 75 * len(labels), len(labels), sharex=True, squeeze=False)
    for axes, label in zip(rows[:, 0], labels, strict=True):
        density: dict[str, list[Any]] = {"normal": [], "anomalous": []}
        middles = []
        for run in found[label]:
            histogram = run["latent_norms"]
            edges = np.asarray(histogram["edges"], float)
            shares = {kind: np.append(0, np.cumsum(histogram[kind])) / max(sum(histogram[kind]), 1) for kind in density}
            medians = {kind: float(np.interp(0.5, shares[kind], edges)) for kind in density}
            middles.append([medians[kind] for kind in density])
            for kind, share in shares.items():
                density[kind].append(np.diff(np.interp(grid * max(medians["anomalous"], 1e-12), edges, share)))
        for kind, color in (("normal", COLORS[1]), ("anomalous", COLORS[0])):
            mean = np.mean(density[kind], axis=0)
            axes.stairs(mean, grid, fill=True, label=kind, color=color, alpha=0.35, linewidth=0)
            axes.stairs(mean, grid, color=color, linewidth=1.4)
        normal, anomalous = np.median(middles, axis=0)
        axes.set_title(f"{shorten(label)}: normal {normal:.2g}, anomalous {anomalous:.2g}")
        axes.set_yticks([])
        axes.grid(visible=False)
    rows[-1, 0].set(xlabel="norm, in medians of the anomalous ones", xlim=(0, 3))
    legend_below(figure, rows[0, 0])
    caption = (
        "Norms of test samples' latents; 0 is the centre, to which Toll's training draws normal samples. Each run in "
        "units of its anomalous samples' median, then the mean over runs. Numbers: medians of the norm itself."
    )
    caption += f" Of {len(found)} methods with a latent, {len(labels)}." * (len(found) > len(labels))
    return figure, "Latent norms", caption


def critical_difference(runs: Sequence[Run]) -> Made:
    """Mean ranks, and which of them cannot be told apart."""
    from scikit_posthocs import critical_difference_diagram

    found = comparison.nemenyi(runs)
    if found is None:
        return None
    figure, axes = new_figure(40 + 17 * len(found.ranks))
    axes.grid(visible=False)
    drawn = critical_difference_diagram(
        found.ranks,
        found.p,
        ax=axes,
        left_only=True,
        label_fmt_left="{label}  {rank:.2f}",
        text_h_margin=0.02 * float(np.ptp(found.ranks)),
        color_palette={label: color for label, color in colors(runs).items() if label in found.ranks},
        crossbar_props={"color": INK, "linewidth": 2.2},
        marker_props={"s": 14},
        elbow_props={"linewidth": 0.9},
        label_props={"fontsize": 10},
    )
    for text in drawn["labels"]:
        text.set_color(INK)
    left = f" Failed somewhere and not drawn: {', '.join(found.left_out)}." if found.left_out else ""
    caption = (
        f"Mean ranks over {found.blocks} parts, 1 is best. Methods under one bar cannot be told apart "
        f"(Nemenyi, p ≥ 0.05; Friedman's test of all: p = {found.friedman:.2g}).{left}"
    )
    return figure, "Critical differences", caption


def time(runs: Sequence[Run]) -> Made:
    """Mean AUROC against the time to fit, each point with its name in a column on the right."""
    from matplotlib.ticker import LogLocator, NullFormatter
    from scipy.optimize import isotonic_regression

    cost = comparison.frame(runs).groupby("label")["fit_seconds"].median().clip(lower=1e-4)
    found = cost.to_frame("x").assign(y=comparison.means(runs).mean()).dropna().sort_values("y")
    if len(found) < 2:
        return None
    failed, palette = comparison.failures(runs).sum(), colors(runs)
    figure, axes = new_figure(max(250, 60 + 13 * len(found)))
    axes.set(xscale="log", xlabel="seconds to fit (median)", ylabel="mean AUROC")
    if found["x"].max() < 50 * found["x"].min():
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = found["y"].iloc[0], found["y"].iloc[-1]
    pad = 0.06 * max(high - low, 1e-3)
    axes.set(ylim=(low - pad, high + pad), xlim=(found["x"].min() / 1.6, found["x"].max() * 1.6))
    # Names stand at the points' heights, moved apart where they would meet.
    wanted, step = (found["y"] - low + pad) / (high - low + 2 * pad), 1 / max(len(found) - 1, 15)
    ladder = step * np.arange(len(found))
    heights = np.clip(isotonic_regression(wanted - ladder).x, 0, 1 - ladder[-1]) + ladder
    for (label, (x, y)), height in zip(found.iterrows(), heights, strict=True):
        axes.scatter(x, y, s=14 if palette[label] == MUTED else 26, color=palette[label], zorder=3)
        axes.annotate(
            shorten(label) + "†" * bool(failed[label]),
            (x, y),
            (1.05, height),
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            arrowprops={"arrowstyle": "-", "color": palette[label], "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3},
        )
    return figure, "Accuracy and time", "Up and to the left is better. Times hold for the machine named above."


def rare(runs: Sequence[Run]) -> Made:
    """Metrics against the share of anomalies among the test samples."""
    from matplotlib.ticker import FuncFormatter, NullFormatter
    from pandas import DataFrame

    found = _by_label(runs, "rare")
    # Parts with few normal samples cannot reach the lowest rates: a curve must not change its parts on the way.
    every = [{draw["rate"] for draw in run["rare"]} for mine in found.values() for run in mine]
    shared = set.intersection(*every) if every else set()
    draws = [{"method": label, **draw} for label, mine in found.items() for run in mine for draw in run["rare"]]
    table = DataFrame([draw for draw in draws if draw["rate"] in shared]).dropna(axis="columns", how="all")
    names = {"average_precision": "average precision", "precision_at_top": "precision at the top", "auroc": "AUROC"}
    names = {key: name for key, name in names.items() if key in table}
    if len(shared) < 2 or not names:
        return None
    figure, rows = new_figure(90 + 130 * len(names), len(names), sharex=True, squeeze=False)
    for axes, (key, name) in zip(rows[:, 0], names.items(), strict=True):
        which = curves(axes, table, "rate", key, runs, markers=True)
        axes.set(title=name, ylabel="")
    axes.set(xscale="log", xlabel="share of anomalies among the test samples")
    axes.set_xticks(sorted(shared))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    legend_below(figure, axes)
    caption = f"Anomalies of the test part left out at random until so few remain; mean over draws and runs.{which}"
    return figure, "Rare anomalies", caption


def sweep(runs: Sequence[Run], family: Family) -> Made:
    """AUROC against the number in which the variants of a method differ."""
    import seaborn as sns
    from matplotlib.ticker import NullFormatter

    blocks = comparison.means(runs).reindex(columns=list(family.labels.values())).dropna(how="all")
    each = BLOCK[0] if len(set(blocks.index.get_level_values(0))) > 1 else BLOCK[1]
    thin = blocks.set_axis(list(family.labels), axis="columns").groupby(level=each, sort=False).mean()
    few = len(thin) <= len(COLORS) - 1
    table = (
        thin.rename(index=lambda name: wrap(str(name)))
        .rename_axis("part")
        .melt(var_name="x", value_name="auroc", ignore_index=False)
        .reset_index()
        .astype({"x": float})
    )
    figure, axes = new_figure(250)
    given = {"data": table, "x": "x", "y": "auroc", "errorbar": None, "ax": axes}
    if few:
        style = {"palette": COLORS[1 : 1 + len(thin)], "dashes": DASHES[1 : 1 + len(thin)]}
        sns.lineplot(**given, hue="part", style="part", linewidth=1.2, **style)
    else:
        sns.lineplot(**given, units="part", estimator=None, color=MUTED, linewidth=0.8, alpha=0.6)
    sns.lineplot(**given, color=COLORS[0], linewidth=2.6, marker="o", markersize=5, label="mean")
    x = np.array(list(family.labels))
    positive = x[x > 0]
    if x[0] >= 0 and len(positive) > 1 and positive[-1] / positive[0] >= 20:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5) if x[0] == 0 else axes.set_xscale("log")
    axes.set_xticks(x)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=family.argument, ylabel="AUROC")
    if few:
        legend_below(figure, axes)
    caption = f"Thick: mean of the thin lines, each of which is one {'data set' if each == 'dataset' else each}."
    return figure, f"{family.method}: AUROC against {family.argument}", caption


def _by_label(runs: Sequence[Run], what: str) -> dict[str, list[Run]]:
    """Runs that have ``what``."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.get(what):
            found[run["configuration"]["label"]].append(run)
    return found
