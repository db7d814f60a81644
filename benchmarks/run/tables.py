"""Markdown tables of what commands print and keep, and the statistics in their cells."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table with a line per row; its columns are the rows' keys, and what a row lacks is empty."""
    from pandas import DataFrame

    # Numbers in cells stay as they are written: 0.50 is not 0.5.
    return str(DataFrame(rows).fillna("").to_markdown(index=False, tablefmt="github", disable_numparse=True))


def mean_and_error(gaps: Sequence[float]) -> str:
    """Mean of paired differences and its standard error."""
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return f"{statistics.mean(gaps):+.4f} ± {error:.4f}"
