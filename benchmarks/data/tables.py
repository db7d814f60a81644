"""Tables: the files of ODDS and ADBench, files of one's own, and made ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toll_plugin.core.checks import check_integer, check_option

Table = tuple[np.ndarray, np.ndarray]

#: ODDS' tables that were not looked at while the defaults of this package were chosen.
CHECK = ("vertebral", "lympho", "ionosphere", "cardio", "shuttle", "pendigits", "musk", "mnist")

#: Those that defaults may be chosen by.
SEARCH = ("glass", "letter", "optdigits", "pima", "satellite", "satimage-2", "vowels", "wbc")

#: Rows up to which the common protocol draws from smaller tables.
FEW = 1000

#: Folders of tables, and where they come from.
COLLECTIONS = {
    "ODDS": "https://odds.cs.stonybrook.edu",
    "ADBench": "https://github.com/Minqi824/ADBench",
}


def halves(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half of the normal rows to train on; the others and all anomalies, shuffled, to test on; their labels."""
    draw = np.random.default_rng(seed)
    normal = draw.permutation(np.flatnonzero(y == 0))
    half = len(normal) // 2
    test = draw.permutation(np.concatenate([normal[half:], np.flatnonzero(y == 1)]))
    return x[normal[:half]], x[test], y[test]


def common(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The common split of papers on ADBench: half of the normal rows to train on, the rest to test on; its labels.

    A table of fewer than :data:`FEW` rows is first drawn from, with replacement, until it has so many. That is done
    before the split, so that most normal rows of the test part have copies among the training rows, which a
    detector that remembers rows scores as 0: this **leaks**. The split is in the order of the rows, which are not
    shuffled; the seed draws copies only. Source: ``data_generator.py`` of Livernoche et al., On Diffusion Modeling
    for Anomaly Detection (https://github.com/vicliv/DTE), which other papers took over.
    """
    if len(x) < FEW:
        drawn = np.random.default_rng(seed).integers(0, len(x), FEW)
        x, y = x[drawn], y[drawn]
    normal = np.flatnonzero(y == 0)
    train, rest = np.split(normal, [round(len(normal) / 2)])
    test = np.concatenate([rest, np.flatnonzero(y == 1)])
    return x[train], x[test], y[test]


def copied(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """``(n_test,)``, true where a row equals a training row bit for bit."""
    known = {row.tobytes() for row in train}
    return np.array([row.tobytes() in known for row in test], bool)


def at_most(x: np.ndarray, y: np.ndarray, max_rows: int) -> Table:
    """The table, or so many of its rows, always the same."""
    chosen = slice(None) if len(x) <= max_rows else np.random.default_rng(0).permutation(len(x))[:max_rows]
    return x[chosen], y[chosen]


def find_table(name: str, roots: Sequence[Path], address: str = COLLECTIONS["ODDS"]) -> Path:
    """``NAME.mat`` (ODDS) or ``NAME.npz`` (ADBench) in the first of ``roots`` that has it.

    Raises:
        FileNotFoundError: If none has it; the error names the ``address`` to download it from.
    """
    for root in roots:
        for path in (root / f"{name}.mat", root / f"{name}.npz"):
            if path.is_file():
                return path
    where = ", ".join(map(str, roots))
    msg = f"no {name}.mat or {name}.npz in {where}: download it from {address}, or name the folder that has it"
    raise FileNotFoundError(msg)


def read_table(path: Path) -> Table:
    """Rows in double precision, and labels, 1 for an anomaly, of a file with ``X`` and ``y``."""
    from scipy.io import loadmat

    table = loadmat(path) if path.suffix == ".mat" else np.load(path)
    return np.asarray(table["X"], dtype=float), np.asarray(table["y"]).ravel().astype(int)


def load(name: str, roots: Sequence[Path], max_rows: int = 10_000, address: str = COLLECTIONS["ODDS"]) -> Table:
    """A table of ODDS or ADBench by name, see :func:`find_table`."""
    return at_most(*read_table(find_table(name, roots, address)), max_rows)


def file_of(arguments: Mapping[str, Any]) -> Path:
    if "path" not in arguments:
        msg = "the data set file needs a path, as in {file: {path: sensors.csv, label: anomaly}}"
        raise ValueError(msg)
    return Path(arguments["path"]).expanduser()


def read_file(arguments: Mapping[str, Any], _: str) -> Table:
    import pandas as pd

    path, label = file_of(arguments), arguments.get("label", "label")
    check_option("the suffix of path", path.suffix.lower(), (".csv", ".parquet"))
    frame = pd.read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    frame = frame.drop(columns=arguments.get("drop", []))
    if label not in frame.columns:
        msg = f"label must name a column of {path}, {list(frame.columns)}, got {label!r}"
        raise ValueError(msg)
    values = frame.pop(label)
    if not values.isin([0, 1]).all():
        msg = f"column {label!r} of {path} must hold 1 for an anomaly and 0 for a normal row, got {values.unique()[:5]}"
        raise ValueError(msg)
    odd = [name for name, kind in frame.dtypes.items() if kind.kind not in "biuf"]
    if odd:
        msg = f"columns of {path} must be numbers, got {', '.join(map(repr, odd))}: encode or drop them"
        raise ValueError(msg)
    if index := [name for name in frame.columns if str(name).startswith("Unnamed: ")]:
        msg = f"{path} has columns without a name, {index}: a row number is no feature, name them in drop"
        raise ValueError(msg)
    table = frame.to_numpy(dtype=float)
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        msg = (
            f"{path} must hold finite numbers, got {table[row, column]} in column {frame.columns[column]!r}, row {row}"
        )
        raise ValueError(msg)
    return table, values.to_numpy(dtype=int)


def gaussian(arguments: Mapping[str, Any], part: str) -> Table:
    """Rows around a curved surface of ``factors`` dimensions; anomalies lie off it.

    Every informative column is a fixed mixture of the factors, their sines and their products, with noise.
    In an anomaly a quarter of the columns are another row's, so that each column alone looks normal.
    """
    if not re.fullmatch(r"\d+(\+\d+)?", part):
        msg = f"a part must be like 16 or 16+48, columns and columns of noise, got {part!r}"
        raise ValueError(msg)
    informative, _, added = part.partition("+")
    informative, noise = check_integer("columns", int(informative), minimum=2), int(added or 0)
    factors = check_integer("factors", arguments.get("factors", 4), minimum=1)
    rows = check_integer("rows", arguments.get("rows", 1000), minimum=10)
    draw = np.random.default_rng(0)
    code = draw.normal(size=(2 * rows + rows // 5, factors))
    curved = np.concatenate([code, np.sin(2 * code), code * code[:, ::-1]], axis=1)
    y = (np.arange(len(code)) >= 2 * rows).astype(int)
    mixing = draw.normal(size=(curved.shape[1], informative)) / np.sqrt(curved.shape[1])
    x = curved @ mixing
    # A quarter of an anomaly's columns belong to another row.
    donors = x[draw.integers(0, 2 * rows, int(y.sum()))]
    taken = draw.random((int(y.sum()), informative)) < 0.25
    x[y == 1] = np.where(taken, donors, x[y == 1])
    x += 0.3 * draw.normal(size=x.shape)
    return np.concatenate([x, draw.normal(size=(len(x), noise))], axis=1), y
