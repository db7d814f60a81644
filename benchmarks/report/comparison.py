"""What runs say of methods: means, ranks and paired differences over the parts of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.run.store import Run

if TYPE_CHECKING:
    from pandas import DataFrame, Series


#: What identifies a part of a data set; methods are compared on the same ones.
BLOCK = ["dataset", "part"]

#: Fewer blocks cannot reach p < 0.05 in a two-sided Wilcoxon signed-rank test, whatever their differences.
TESTABLE = 6

#: Of so many blocks all signs are gone through in Wilcoxon's test.
ENUMERATED = 13

#: What a critical-difference diagram needs at least.
METHODS, BLOCKS = 3, 5


class Group(NamedTuple):
    """Runs that are compared with one another."""

    kind: str
    dataset: str
    protocol: str


class Difference(NamedTuple):
    """A method's metric minus the reference's, on the same parts and splits.

    Attributes:
        mean: Over blocks, each averaged over its splits, each averaged over its restarts.
        error: Its standard error over blocks, or over splits where there is one block; NaN where there is one pair.
        pairs: Number of splits, over all blocks.
        p: Wilcoxon's signed-rank test over blocks, Holm-corrected over the methods that are compared with the same
            reference; ``None`` with fewer than :data:`TESTABLE` blocks.
    """

    label: str
    reference: str
    mean: float
    error: float
    pairs: int
    blocks: int
    p: float | None


class Nemenyi(NamedTuple):
    """Mean ranks of the methods that finished everywhere, and which of them cannot be told apart (Demsar 2006)."""

    ranks: Series
    p: DataFrame
    friedman: float
    blocks: int
    left_out: list[str]


def dataset_of(run: Run) -> str:
    """A data set's name, with the arguments that make it another one; where it lies does not."""
    configuration = run["configuration"]
    given = configuration.get("dataset_arguments", {}).items()
    shown = ", ".join(f"{name}={value}" for name, value in given if name not in {"root", "path", "label"})
    return f"{configuration['dataset']} ({shown})" if shown else str(configuration["dataset"])


def grouped(runs: Sequence[Run]) -> dict[Group, list[Run]]:
    """Runs by group, in their order."""
    groups: dict[Group, list[Run]] = {}
    for run in runs:
        key = Group(str(run["configuration"]["kind"]), dataset_of(run), str(run["configuration"]["protocol"]))
        groups.setdefault(key, []).append(run)
    return groups


def split_of(run: Run) -> int:
    """The split of a run: its seed, or 0 where all rows are trained on and a seed is initial weights only."""
    c = run["configuration"]
    return 0 if c["protocol"] == "unsupervised" and not c.get("validation_rows") else int(c["seed"])


def frame(runs: Sequence[Run]) -> DataFrame:
    """One row per run: what it was, whether it failed, and what it measured."""
    from pandas import DataFrame

    rows = []
    for run in runs:
        c = run["configuration"]
        costs = {name: run.get(name) for name in ("fit_seconds", "score_seconds", "model_mb")}
        found = {"auroc": None, **run.get("metrics", {})}
        rows.append({**_cell(run), "method": c["method"], "failed": "error" in run, **costs, **found})
    table = DataFrame(rows)
    numbers = table.columns.difference(["label", "method", *BLOCK, "split", "failed"])
    return table.astype(dict.fromkeys(numbers, float))


def means(runs: Sequence[Run], metric: str = "auroc") -> DataFrame:
    """Mean over splits of the mean over the restarts that finished: a row per block, a column per label.

    NaN where nothing finished.
    """
    return _by_block(frame(runs), metric, "mean")


def failures(runs: Sequence[Run]) -> DataFrame:
    """Number of failed runs, shaped like :func:`means`."""
    return _by_block(frame(runs), "failed", "sum").fillna(0).astype(int)


def ranks(runs: Sequence[Run], metric: str = "auroc") -> Series:
    """Mean rank of each label over the blocks that all methods were run on, 1 is best; ties share theirs.

    A method with a failed run on a block takes the last rank there.
    """
    from pandas import Series
    from scipy.stats import rankdata

    values, failed = means(runs, metric), failures(runs) > 0
    values = values.mask(failed, -np.inf)
    values = values[values.notna().all(axis=1)]
    mean = rankdata(-values.to_numpy().round(12), axis=1).mean(axis=0) if len(values) else np.nan
    return Series(mean, index=values.columns)


def ranking(runs: Sequence[Run], metric: str = "auroc") -> list[str]:
    """Labels, the lowest mean rank first, among equals the highest mean."""
    order = ranks(runs, metric).to_frame("rank").assign(mean=-means(runs, metric).mean())
    return list(order.sort_values(["rank", "mean"], kind="stable").index)


def first_toll(runs: Sequence[Run]) -> str | None:
    """Label of the first of this package's methods, whose names have Toll in them."""
    configurations = (run["configuration"] for run in runs)
    return next((str(c["label"]) for c in configurations if "Toll" in str(c["method"])), None)


def differences(runs: Sequence[Run], reference: str, metric: str = "auroc") -> list[Difference]:
    """Of every other label that has a pair with ``reference``, in the order of :func:`ranking`."""
    pairs = frame(runs).pivot_table(index=[*BLOCK, "split"], columns="label", values=metric)
    found = []
    for label in ranking(runs, metric):
        if label == reference or not {label, reference} <= set(pairs):
            continue
        gaps = (pairs[label] - pairs[reference]).dropna().round(12)  # so that equal scores are ties
        blocks = gaps.groupby(level=BLOCK).mean()
        if gaps.empty:
            continue
        error = float((blocks if len(blocks) > 1 else gaps).sem())
        found.append(
            Difference(label, reference, float(blocks.mean()), error, len(gaps), len(blocks), signed_rank(blocks))
        )
    tested = [i for i, difference in enumerate(found) if difference.p is not None]
    for i, p in zip(tested, holm([found[i].p for i in tested]), strict=True):
        found[i] = found[i]._replace(p=float(p))
    return found


def holm(values: Sequence[float | None]) -> np.ndarray:
    """Holm's correction of p-values: the smallest times their number, and so on, none below one before it."""
    p = np.asarray(values, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected


def nemenyi(runs: Sequence[Run], metric: str = "auroc") -> Nemenyi | None:
    """Friedman's test and Nemenyi's of all pairs; ``None`` below :data:`METHODS` methods or :data:`BLOCKS` blocks."""
    from pandas import DataFrame
    from scikit_posthocs import posthoc_nemenyi_friedman
    from scipy.stats import friedmanchisquare

    every = means(runs, metric).mask(failures(runs) > 0)
    values = every.dropna(axis=1)
    if values.shape[1] < METHODS or len(values) < BLOCKS:
        return None
    kept = [run for run in runs if str(run["configuration"]["label"]) in values]
    friedman = float(friedmanchisquare(*values.to_numpy().round(12).T).pvalue)
    if np.isnan(friedman):  # all methods alike on every block
        return None
    p = posthoc_nemenyi_friedman(DataFrame(values.to_numpy().round(12), columns=list(values)))
    return Nemenyi(ranks(kept, metric), p, friedman, len(values), [label for label in every if label not in values])


def terms(runs: Sequence[Run]) -> DataFrame:
    """Mean AUROC over parts of Toll's score and of each of its terms alone; others' scores are other sums.

    Each part is averaged over its splits, and each split over its restarts.
    """
    from pandas import DataFrame

    rows = [
        {**_cell(run), "score": run["metrics"]["auroc"], **run["term_auroc"]}
        for run in runs
        if len(run.get("term_auroc", {})) > 1 and "Toll" in str(run["configuration"]["method"])
    ]
    if not rows:
        return DataFrame()
    by_split = DataFrame(rows).groupby(["label", *BLOCK, "split"], sort=False).mean()
    by_part = by_split.groupby(level=["label", *BLOCK], sort=False).mean()
    return by_part.groupby(level="label", sort=False).mean()


def signed_rank(gaps: Series) -> float | None:
    """p-value of Wilcoxon's test of differences by block; ``None`` with fewer than :data:`TESTABLE`.

    Blocks without a difference are left out. Up to :data:`ENUMERATED` blocks it is exact, with ties too.
    """
    from scipy.stats import rankdata, wilcoxon

    if len(gaps) < TESTABLE:
        return None
    if len(gaps) > ENUMERATED:
        return float(wilcoxon(gaps).pvalue) if gaps.any() else 1.0
    moved = gaps[gaps != 0].to_numpy()
    ranks = rankdata(np.abs(moved))
    # SciPy goes through the same signs one by one where there are ties, which takes seconds.
    sums = np.array(list(product((0, 1), repeat=len(moved)))) @ ranks
    found = ranks[moved > 0].sum()
    return float(min(1.0, 2 * min((sums <= found).mean(), (sums >= found).mean())))


def _cell(run: Run) -> dict[str, Any]:
    c = run["configuration"]
    return {"label": c["label"], "dataset": dataset_of(run), "part": str(c["part"]), "split": split_of(run)}


def _by_block(table: DataFrame, column: str, how: str) -> DataFrame:
    from pandas import MultiIndex

    if column not in table:
        table = table.assign(**{column: np.nan})
    blocks = MultiIndex.from_frame(table[BLOCK].drop_duplicates())
    by_split = table.groupby([*BLOCK, "label", "split"], sort=False)[column].agg(how)
    wide = by_split.groupby(level=[*BLOCK, "label"], sort=False).agg(how).unstack("label")  # noqa: PD010
    return wide.reindex(index=blocks, columns=table["label"].drop_duplicates())
