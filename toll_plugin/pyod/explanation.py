"""What a score is made of, as numbers and as plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from toll_plugin.core.checks import check_integer
from toll_plugin.core.tables.model import TableParts
from toll_plugin.core.tables.scaling import Floats

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Explanation", "plot_history", "plot_latent"]


@dataclass(frozen=True, eq=False)
class Explanation:
    r"""What the scores of N rows are made of; means over the members.

    ``score = reconstruction + latent`` (unless the detector's ``score_term`` is one of them alone). With the default
    ``score_scale`` both are in the same unit: 1 is the median reconstruction term of the training rows. And
    the contributions of a row add up to its ``reconstruction``: feature j has the part
    :math:`r_j^2 / \|r\|^2` of it, with r the residual in the detector's metric.

    Attributes:
        score: ``decision_function`` of the rows, shape ``(N,)``.
        reconstruction: The reconstruction's share, shape ``(N,)``.
        latent: The latent's share, weighted as in the score, shape ``(N,)``.
        contributions: Each feature's part of ``reconstruction``, shape ``(N, n_inputs)``.
        names: The features' names; numbers as text where the data had none.

    Example:
        >>> import numpy as np
        >>> from toll_plugin.pyod import TollDetector
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> found = TollDetector(max_steps=20).fit(X).explain([[0.0, 50.0, 0.0]])
        >>> found.top(0, 1)[0][0]
        '1'
    """

    score: Floats
    reconstruction: Floats
    latent: Floats
    contributions: Floats
    names: tuple[str, ...]

    @classmethod
    def of(cls, parts: TableParts, score: Floats, weight: float, names: Sequence[str]) -> Explanation:
        """From a model's parts and scores, and the weight of its latent term."""
        return cls(score, parts.reconstruction, weight * parts.latent, parts.contributions, tuple(names))

    @classmethod
    def joined(cls, parts: Sequence[Explanation]) -> Explanation:
        """One explanation of the rows of several, one behind another."""
        found = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_ROW}
        return cls(**found, names=parts[0].names)

    def rows(self, which: slice) -> Explanation:
        """The explanation of some of the rows."""
        return Explanation(**{name: getattr(self, name)[which] for name in _PER_ROW}, names=self.names)

    def frame(self, index: Any = None) -> pd.DataFrame:
        """The same as a data frame, whose columns of contributions are called ``"contribution: NAME"``."""
        import pandas as pd  # noqa: PLC0415  whoever has arrays need not load it

        terms = {"score": self.score, "reconstruction": self.reconstruction, "latent": self.latent}
        parts = {f"contribution: {name}": self.contributions[:, i] for i, name in enumerate(self.names)}
        return pd.DataFrame(terms | parts, index=index)

    def top(self, row: int, count: int = 5) -> list[tuple[str, float]]:
        """The ``count`` features that contribute most to a row's score, largest first.

        Raises:
            IndexError: If there is no such row.
        """
        values = self.contributions[row]
        order = np.argsort(-values, kind="stable")[: check_integer("count", count, minimum=1)]
        return [(self.names[i], float(values[i])) for i in order]

    def plot(self, row: int, count: int = 10, ax: Axes | None = None) -> Axes:
        """Bars of a row's largest contributions and of its latent share.

        Args:
            row: Which row.
            count: How many features.
            ax: Where to draw; by default in a new figure.

        Returns:
            The axes.
        """
        ax = ax or _axes()
        bars = [*self.top(row, count), ("latent", float(self.latent[row]))]
        names, values = zip(*bars[::-1], strict=True)
        ax.barh(names, values, color=["tab:orange", *["tab:blue"] * (len(bars) - 1)])
        ax.set_xlabel("part of the score")
        ax.set_title(f"row {row}: score {self.score[row]:.3g}")
        return ax


_PER_ROW = ("score", "reconstruction", "latent", "contributions")


def plot_history(history: Mapping[str, Floats], ax: Axes | None = None) -> Axes:
    """Curves of a fit over its epochs."""
    ax = ax or _axes()
    for name, values in history.items():
        ax.plot(np.arange(1, len(values) + 1), values, label=name, marker="." if len(values) < 30 else None)
    ax.set_xlabel("epoch")
    ax.set_ylabel("mean per row")
    ax.legend()
    return ax


def plot_latent(latent: Floats, score: Floats, threshold: float, ax: Axes | None = None) -> Axes:
    """Rows by the two directions in which their latents reach furthest from the origin, coloured by score."""
    ax = ax or _axes()
    _, _, directions = np.linalg.svd(latent, full_matrices=False)
    plane = np.zeros((len(latent), 2))
    plane[:, : min(2, len(directions))] = latent @ directions[:2].T
    above = score > threshold
    drawn = ax.scatter(plane[:, 0], plane[:, 1], c=score, cmap="viridis", s=12)
    ax.scatter(
        plane[above, 0], plane[above, 1], facecolors="none", edgecolors="tab:red", s=40, label="above the threshold"
    )
    ax.plot(0, 0, "k+", markersize=12, label="centre")
    ax.figure.colorbar(drawn, ax=ax, label="score")
    ax.set_xlabel("latent, first direction")
    ax.set_ylabel("second direction")
    ax.legend()
    return ax


def _axes() -> Axes:
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415  needed by plots only
    except ImportError as error:
        msg = 'plots need matplotlib: pip install "toll-plugin[plot]"'
        raise ImportError(msg) from error

    axes: Axes = plt.subplots(layout="constrained")[1]
    return axes
