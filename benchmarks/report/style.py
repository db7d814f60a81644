"""How figures look: colours, one for each method, lines and legends."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.report import comparison
from benchmarks.run.store import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

COLORS = ["#c94f00", "#0068a8", "#008060", "#a83279", "#8a6a00", "#5b3fb0"]
INK, MUTED, _GRID = "#1a1f27", "#5a6472", "#dde1e7"
DASHES = ["", (6, 1.6), (2, 1.2), (7, 1.5, 1.5, 1.5), (4, 1, 1, 1, 1, 1), (1, 1)]
_MARKERS = list("osD^vP")

#: A phone's width in CSS pixels, so that text keeps its size there. Height is given per figure.
_WIDTH = 360

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "toll",
    "text.parse_math": False,  # labels are anybody's
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
}


def colors(runs: Sequence[Run]) -> dict[str, str]:
    """Colours of all methods: the first Toll and the five best others have their own; the rest are grey."""
    order = sorted(comparison.ranking(runs), key=lambda label: label != comparison.first_toll(runs))
    return {label: COLORS[i] if i < len(COLORS) else MUTED for i, label in enumerate(order)}


def curves(axes: Axes, table: DataFrame, x: str, y: str, runs: Sequence[Run], *, markers: bool = False) -> str:
    """Mean curves of the methods with a colour of their own; what to say of the others."""
    import seaborn as sns

    there = [label for label in colors(runs) if label in set(table["method"])]
    shown, n = there[: len(COLORS)], min(len(there), len(COLORS))
    sns.lineplot(
        table,
        x=x,
        y=y,
        hue="method",
        style="method",
        hue_order=shown,
        style_order=shown,
        palette=COLORS[:n],
        dashes=DASHES[:n],
        markers=_MARKERS[:n] if markers else False,
        errorbar=None,
        linewidth=1.8,
        ax=axes,
    )
    return f" Of {len(there)} methods, the first Toll and the best others." * (len(there) > n)


def new_figure(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of a height in CSS pixels, and what its ``subplots`` returns."""
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH / 72, height / 72))
    return figure, figure.subplots(rows, **options)


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend below the figure instead of those in its panels."""
    handles, labels = axes.get_legend_handles_labels()
    for each in figure.axes:
        if each.get_legend():
            each.get_legend().remove()
    columns = 2 if max(map(len, labels)) <= 20 else 1
    figure.legend(handles, [wrap(label) for label in labels], loc="outside lower center", ncols=columns)


def wrap(label: str, width: int = 30) -> str:
    """A label on several lines."""
    return "\n".join(textwrap.wrap(label, width)) or label


def shorten(label: str) -> str:
    """A label on one line, cut where it is long."""
    return label if len(label) <= 26 else label[:25] + "…"
