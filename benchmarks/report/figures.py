"""Figures of a report: inline SVG in the colours of the page, whose theme may change."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.report import comparison
from benchmarks.report.comparison import BLOCK, Run
from benchmarks.report.variants import families

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: matplotlib wants colours and the page has CSS variables: what is drawn in one becomes the other.
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_SERIES = [f"#0102{i:02x}" for i in range(16, 22)]
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"} | {c: f"--series-{i}" for i, c in enumerate(_SERIES)}

_DASHES = ["-", (0, (6, 1.6)), (0, (2, 1.2)), (0, (7, 1.5, 1.5, 1.5)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 1))]
_MARKERS = "osD^vP"

#: A phone's width in CSS pixels, so that text keeps its size there. Height is given per figure.
_WIDTH = 360

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "toll",
    "text.parse_math": False,  # labels are anybody's
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
}


class Drawing(NamedTuple):
    """What stands in a ``<figure>``: an SVG, or the maps of several methods; and what it shows."""

    title: str
    caption: str
    svg: str = ""
    samples: Sequence[dict[str, Any]] = ()
    labels: Sequence[str] = ()


class _Look(NamedTuple):
    color: str
    dash: Any
    marker: str
    shown: bool


def drawings(runs: Sequence[Run], name: str) -> list[Drawing]:
    """Every figure of one group that its runs support; ``name`` keeps ids apart within a page."""
    looks = _looks(runs)
    makers = (_boxes, _roc, _norms, _critical_difference, _time, _rare)
    return [*_drawn(makers, runs, looks, name), *_maps(runs, list(looks))]


def sweeps(runs: Sequence[Run], name: str) -> list[Drawing]:
    """AUROC against each numeric argument in which at least three variants of a method differ, and in nothing else."""
    makers = [
        lambda runs, _, family=family: _sweep(runs, family.method, family.argument, family.labels)
        for family in families(runs)
    ]
    return _drawn(makers, runs, {}, name)


def _drawn(makers: Sequence[Any], runs: Sequence[Run], looks: dict[str, _Look], name: str) -> list[Drawing]:
    from matplotlib import rc_context

    found = []
    for i, maker in enumerate(makers):
        with rc_context(_STYLE):
            if made := maker(runs, looks):
                figure, title, caption = made
                found.append(Drawing(title, caption, _svg(figure, f"{name}{i}-", title)))
    return found


def _svg(figure: Figure, name: str, title: str) -> str:
    from markupsafe import escape

    stream = StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r"<!--.*?-->", "", stream.getvalue()[stream.getvalue().index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box and box[0]} role="img" aria-label="{escape(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)


def _looks(runs: Sequence[Run]) -> dict[str, _Look]:
    """Toll first and the best of the others have colours of their own; the rest are grey."""
    order = comparison.ranking(runs)
    order = sorted(order, key=lambda label: label != comparison.first_toll(runs))
    own = [_Look(*look, shown=True) for look in zip(_SERIES, _DASHES, _MARKERS, strict=True)]
    return dict(itertools.zip_longest(order, own[: len(order)], fillvalue=_Look(_MUTED, "-", "o", shown=False)))


def _new(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH / 72, height / 72))
    return figure, figure.subplots(rows, **options)


def _wrap(label: str, width: int = 30) -> str:
    return "\n".join(textwrap.wrap(label, width)) or label


def _short(label: str) -> str:
    return label if len(label) <= 26 else label[:25] + "…"


def _legend(figure: Figure, lines: dict[str, Any]) -> None:
    columns = 2 if max(map(len, lines)) <= 20 else 1
    figure.legend(list(lines.values()), [_wrap(label) for label in lines], loc="outside lower center", ncols=columns)


def _by_label(runs: Sequence[Run], what: str) -> dict[str, list[Run]]:
    """Runs that have ``what``."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.get(what):
            found[run["configuration"]["label"]].append(run)
    return found


def _others(looks: dict[str, _Look]) -> str:
    return "" if all(look.shown for look in looks.values()) else " Grey: the other methods."


def _boxes(runs: Sequence[Run], looks: dict[str, _Look]) -> Any:
    table = comparison.frame(runs)
    found = {label: table["auroc"][table["label"] == label].dropna() for label in comparison.ranking(runs)}
    found = {label: values for label, values in found.items() if len(values)}
    if not found:
        return None
    failed = comparison.failures(runs).sum()
    rows = [_wrap(label) + "†" * bool(failed[label]) for label in found]
    figure, axes = _new(60 + 11 * sum(2 + row.count("\n") for row in rows))
    for i, (label, values) in enumerate(found.items()):
        color = looks[label].color
        line = {"color": color, "linewidth": 1.2}
        axes.boxplot(
            values,
            positions=[i],
            orientation="horizontal",
            widths=0.6,
            showfliers=False,
            boxprops=line,
            whiskerprops=line,
            capprops=line,
            medianprops=line | {"linewidth": 2.4},
        )
        offsets = np.random.default_rng(0).uniform(-0.22, 0.22, len(values))
        axes.scatter(values, i + offsets, s=6, color=color, alpha=0.45, linewidths=0, zorder=3)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="AUROC", ylim=(len(rows) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    caption = "A point is one run, a part with one seed; box: quartiles and median; best mean rank on top."
    return figure, "AUROC of every run", caption


def _roc(runs: Sequence[Run], looks: dict[str, _Look]) -> Any:
    found = _by_label(runs, "roc")
    if not found:
        return None
    figure, axes = _new(330)
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, linestyle=":")
    lines = {}
    for label, look in reversed(looks.items()):
        if label in found:
            curve = np.mean([run["roc"] for run in found[label]], axis=0)
            _line(axes, lines, label, look, np.linspace(0, 1, len(curve)), curve)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    _legend(figure, dict(reversed(lines.items())))
    return figure, "ROC curves", f"Mean over the runs of each method.{_others(looks)}"


def _line(axes: Axes, lines: dict[str, Any], label: str, look: _Look, x: Any, y: Any, marker: str = "") -> None:
    width, alpha = (1.8, 1.0) if look.shown else (0.8, 0.6)
    style = {"linestyle": look.dash, "linewidth": width, "alpha": alpha, "marker": marker, "markersize": 2 * width}
    (line,) = axes.plot(x, y, color=look.color, **style)
    if look.shown:
        lines[label] = line


def _norms(runs: Sequence[Run], looks: dict[str, _Look]) -> Any:
    found = _by_label(runs, "latent_norms")
    labels = [label for label in looks if label in found][: len(_SERIES)]
    if not labels:
        return None
    grid = np.linspace(0, 3, 61)
    figure, rows = _new(70 + 75 * len(labels), len(labels), sharex=True, squeeze=False)
    for axes, label in zip(rows[:, 0], labels, strict=True):
        density: dict[str, list[Any]] = {"normal": [], "anomalous": []}
        middles = []
        for run in found[label]:
            norms = run["latent_norms"]
            edges = np.asarray(norms["edges"], float)
            parts = {kind: np.append(0, np.cumsum(norms[kind])) / max(sum(norms[kind]), 1) for kind in density}
            medians = {kind: float(np.interp(0.5, parts[kind], edges)) for kind in density}
            middles.append([medians[kind] for kind in density])
            for kind, share in parts.items():
                below = np.interp(grid * max(medians["anomalous"], 1e-12), edges, share)
                density[kind].append(np.diff(below))
        for kind, color in (("anomalous", _SERIES[0]), ("normal", _SERIES[1])):
            style = {"color": color, "alpha": 0.35, "linewidth": 0}
            axes.stairs(np.mean(density[kind], axis=0), grid, fill=True, label=kind, **style)
            axes.stairs(np.mean(density[kind], axis=0), grid, color=color, linewidth=1.4)
        normal, anomalous = np.median(middles, axis=0)
        axes.set_title(f"{_short(label)}: normal {normal:.2g}, anomalous {anomalous:.2g}")
        axes.set_yticks([])
        axes.grid(visible=False)
    rows[-1, 0].set(xlabel="norm, in medians of the anomalous ones", xlim=(0, 3))
    handles, kinds = rows[0, 0].get_legend_handles_labels()
    _legend(figure, dict(zip(reversed(kinds), reversed(handles), strict=True)))
    caption = (
        "Norms of test samples' latents; 0 is the centre, to which Toll's training draws normal samples. Each run in "
        "units of its anomalous samples' median, then the mean over runs. Numbers: medians of the norm itself."
    )
    caption += f" Of {len(found)} methods with a latent, {len(labels)}." * (len(found) > len(labels))
    return figure, "Latent norms", caption


def _critical_difference(runs: Sequence[Run], looks: dict[str, _Look]) -> Any:
    from scikit_posthocs import critical_difference_diagram

    found = comparison.nemenyi(runs)
    if found is None:
        return None
    names = {label: _wrap(label) for label in found.ranks.index}
    figure, axes = _new(40 + 17 * len(names))
    axes.grid(visible=False)
    drawn = critical_difference_diagram(
        found.ranks,
        found.p,
        ax=axes,
        left_only=True,
        label_fmt_left="{label}  {rank:.2f}",
        text_h_margin=0.02 * float(np.ptp(found.ranks)),
        color_palette={label: looks[label].color for label in names},
        crossbar_props={"color": _INK, "linewidth": 2.2},
        marker_props={"s": 14},
        elbow_props={"linewidth": 0.9},
        label_props={"fontsize": 10},
    )
    for text in drawn["labels"]:
        text.set_color(_INK)
    left = f" Failed somewhere and not drawn: {', '.join(found.left_out)}." if found.left_out else ""
    caption = (
        f"Mean ranks over {found.blocks} parts, 1 is best. Methods under one bar cannot be told apart "
        f"(Nemenyi, p ≥ 0.05; Friedman's test of all: p = {found.friedman:.2g}).{left}"
    )
    return figure, "Critical differences", caption


def _time(runs: Sequence[Run], looks: dict[str, _Look]) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    from scipy.optimize import isotonic_regression

    table = comparison.frame(runs)
    cost = table.groupby("label")["fit_seconds"].median().clip(lower=1e-4)
    found = cost.to_frame("x").assign(y=comparison.means(runs).mean()).dropna().sort_values("y")
    if len(found) < 2:
        return None
    failed = comparison.failures(runs).sum()
    figure, axes = _new(max(250, 60 + 13 * len(found)))
    axes.set(xscale="log", xlabel="seconds to fit (median)", ylabel="mean AUROC")
    if found["x"].max() < 50 * found["x"].min():
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = found["y"].iloc[0], found["y"].iloc[-1]
    pad = 0.06 * max(high - low, 1e-3)
    axes.set(ylim=(low - pad, high + pad), xlim=(found["x"].min() / 1.6, found["x"].max() * 1.6))
    # Names in a column at the points' heights, moved apart where they would meet.
    wanted, step = (found["y"] - low + pad) / (high - low + 2 * pad), 1 / max(len(found) - 1, 15)
    ladder = step * np.arange(len(found))
    heights = np.clip(isotonic_regression(wanted - ladder).x, 0, 1 - ladder[-1]) + ladder
    for (label, (x, y)), height in zip(found.iterrows(), heights, strict=True):
        look = looks[label]
        axes.scatter(x, y, s=26 if look.shown else 14, color=look.color, marker=look.marker, zorder=3)
        axes.annotate(
            _short(label) + "†" * bool(failed[label]),
            (x, y),
            (1.05, height),
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            arrowprops={"arrowstyle": "-", "color": look.color, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3},
        )
    return figure, "Accuracy and time", "Up and to the left is better. Times hold for the machine named above."


def _rare(runs: Sequence[Run], looks: dict[str, _Look]) -> Any:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    found = _by_label(runs, "rare")
    names = {"average_precision": "average precision", "precision_at_top": "precision at the top", "auroc": "AUROC"}
    # Parts with few normal samples cannot reach the lowest rates: a curve must not change its parts on the way.
    every = [{draw["rate"] for draw in run["rare"]} for mine in found.values() for run in mine]
    shared = set.intersection(*every) if every else set()
    draws = [draw for mine in found.values() for run in mine for draw in run["rare"] if draw["rate"] in shared]
    names = {key: name for key, name in names.items() if any(draw.get(key) is not None for draw in draws)}
    if len({draw["rate"] for draw in draws}) < 2 or not names:
        return None
    figure, rows = _new(90 + 130 * len(names), len(names), sharex=True, squeeze=False)
    lines: dict[str, Any] = {}
    for axes, (key, name) in zip(rows[:, 0], names.items(), strict=True):
        axes.set_title(name)
        for label in (label for label in looks if label in found):
            values = defaultdict(list)
            for draw in (draw for run in found[label] for draw in run["rare"]):
                if draw.get(key) is not None and draw["rate"] in shared:
                    values[draw["rate"]].append(draw[key])
            y = [np.mean(values[rate]) for rate in sorted(values)]
            _line(axes, lines, label, looks[label], sorted(values), y, looks[label].marker)
    axes = rows[-1, 0]
    axes.set(xscale="log", xlabel="share of anomalies among the test samples")
    axes.set_xticks(sorted({draw["rate"] for draw in draws}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, lines)
    caption = (
        f"Anomalies of the test part left out at random until so few remain; mean over draws and runs.{_others(looks)}"
    )
    return figure, "Rare anomalies", caption


def _sweep(runs: Sequence[Run], method: str, key: str, labels: dict[float, str]) -> Any:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    blocks = comparison.means(runs).reindex(columns=[labels[x] for x in sorted(labels)]).dropna(how="all")
    x = np.array(sorted(labels))
    level = BLOCK[0] if blocks.index.get_level_values(0).nunique() > 1 else BLOCK[1]
    thin = blocks.groupby(level=level, sort=False).mean()
    figure, axes = _new(250)
    colors = itertools.cycle(_SERIES[1:]) if len(thin) <= 6 else itertools.repeat(_MUTED)
    for (name, values), color, dash in zip(thin.iterrows(), colors, itertools.cycle(_DASHES[1:])):
        style = {"linestyle": dash, "linewidth": 1.2} if len(thin) <= 6 else {"linewidth": 0.8, "alpha": 0.6}
        axes.plot(x, values, color=color, label=_wrap(str(name)), **style)
    axes.plot(x, thin.mean(), color=_SERIES[0], linewidth=2.6, marker="o", markersize=5, label="mean")
    positive = x[x > 0]
    if x[0] >= 0 and len(positive) > 1 and positive[-1] / positive[0] >= 20:
        if x[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    axes.set_xticks(x)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=key, ylabel="AUROC")
    if len(thin) <= 6:
        figure.legend(loc="outside lower center", ncols=3)
    each = "data set" if level == "dataset" else "part"
    return figure, f"{method}: AUROC against {key}", f"Thick: mean of the thin lines, each of which is one {each}."


def _maps(runs: Sequence[Run], order: Sequence[str]) -> list[Drawing]:
    """A row for each test sample that was kept, a column for each method that makes maps."""
    samples: dict[tuple[Any, ...], dict[str, Any]] = {}
    for label, mine in _by_label(runs, "examples").items():
        first = min(run["configuration"]["seed"] for run in mine)
        each = [run for run in mine if run["configuration"]["seed"] == first]
        parts = ([(run["configuration"]["part"], one) for one in run["examples"]] for run in each)
        for part, one in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*parts))):
            if one.get("map"):
                row = {name: one.get(name) for name in ("image", "mask", "anomalous")}
                sample = samples.setdefault((part, one["image"], one["anomalous"]), {**row, "found": {}})
                sample["found"][label] = {"map": one["map"], "score": one["score"]}
    if not samples:
        return []
    bad, good = ([one for one in samples.values() if one["anomalous"] is kind] for kind in (True, False))
    shown = [*bad[:8], *good[:2]]
    labels = [label for label in order if any(label in one["found"] for one in shown)]
    caption = "Each map is on the scale of all maps of its method on the test set; below it, the image's score."
    return [Drawing("Anomaly maps side by side", caption, samples=shown, labels=labels)]
