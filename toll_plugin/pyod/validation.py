"""Checks of tables and parameters, with errors that name the column and the rule."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import validate_data

from toll_plugin.core.checks import check_finite_float

__all__ = [
    "as_frame",
    "check_cells",
    "check_columns",
    "check_contamination",
    "check_device",
    "check_finite",
    "check_table",
    "located",
    "seed_of",
]

#: Rows looked at in one go, so that the check needs little memory.
_CHUNK = 4096


def as_frame(x: Any) -> Any:
    """Arrow's tables and batches, and mappings of columns, as a DataFrame; anything else stays what it is."""
    if type(x).__module__.partition(".")[0] == "pyarrow":
        return x.to_pandas()
    if isinstance(x, Mapping) and not hasattr(x, "tocsr"):  # one of SciPy's sparse forms is a dictionary as well
        import pandas as pd  # noqa: PLC0415  whoever has arrays need not load it

        return pd.DataFrame(dict(x))
    return x


def check_table(estimator: Any, x: Any, *, reset: bool, minimum: int = 1, first: int = 0) -> NDArray[Any]:
    """``x`` as a two-dimensional array of single or double precision, not copied if it is one already.

    Args:
        estimator: Gets ``n_features_in_`` and ``feature_names_in_`` if ``reset``, else is compared.
        x: Array, memory map, DataFrame, Arrow table or nested list.
        reset: Whether the columns are met for the first time.
        minimum: Rows that are needed.
        first: Number of the first row in messages.

    Raises:
        TypeError: If ``x`` is sparse.
        ValueError: If ``x`` is empty, of the wrong shape, holds NaN, infinity or what is no number, or its columns
            are not those of the fit.
    """
    x = as_frame(x)
    check_cells(x, first, None if reset else getattr(estimator, "feature_names_in_", None))
    table = check_columns(estimator, x, reset=reset, minimum=minimum)
    check_finite(table, getattr(estimator, "feature_names_in_", None), first)
    return table


def check_columns(estimator: Any, x: Any, *, reset: bool = False, minimum: int = 1) -> NDArray[Any]:
    """What :func:`check_table` does, except that values may be missing."""
    table: NDArray[Any] = validate_data(
        estimator,
        x,
        reset=reset,
        dtype=[np.float64, np.float32],
        ensure_all_finite=False,
        ensure_min_samples=minimum,
    )
    return table


def check_finite(table: NDArray[Any], names: NDArray[Any] | None, first: int = 0) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: With the first such row, counted from ``first``, and its columns.
    """
    for start in range(0, len(table), _CHUNK):
        good = np.isfinite(table[start : start + _CHUNK])
        if good.all():
            continue
        row = int(np.argmin(good.all(axis=1)))
        columns = np.flatnonzero(~good[row])
        named = [f"{column} ({str(names[column])!r})" if names is not None else str(column) for column in columns[:5]]
        more = f" and {len(columns) - 5} more" if len(columns) > 5 else ""
        what = "NaN" if np.isnan(table[start + row]).any() else "infinity"
        msg = (
            f"Input X contains {what}: row {first + start + row}, column {', '.join(named)}{more}. "
            "Every value must be finite; impute or drop such rows first"
        )
        raise ValueError(msg)


def check_cells(x: Any, first: int = 0, names: NDArray[Any] | None = None) -> None:
    """Refuse columns of a DataFrame that hold something else than numbers; of those in ``names``, if they are known.

    Raises:
        ValueError: With the first such row, counted from ``first``, and its column.
    """
    if not hasattr(x, "dtypes") or not hasattr(x, "iloc") or getattr(x, "ndim", 0) != 2:
        return
    import pandas as pd  # noqa: PLC0415  whoever has arrays need not load it

    for i, (name, kind) in enumerate(zip(x.columns, x.dtypes, strict=True)):
        if pd.api.types.is_numeric_dtype(kind) or (names is not None and name not in names):
            continue
        cells = x.iloc[:, i].astype(object)
        numbers = pd.to_numeric(cells, errors="coerce")
        dates = pd.api.types.is_datetime64_any_dtype(kind) or pd.api.types.is_timedelta64_dtype(kind)
        bad = np.flatnonzero((numbers.isna() | dates) & cells.notna())
        if len(bad):
            msg = (
                f"Input X contains {cells.iloc[bad[0]]!r}: row {first + bad[0]}, column {i} ({str(name)!r}), of type "
                f"{kind}. Every value must be a number; encode or drop such columns first"
            )
            raise ValueError(msg)


@contextmanager
def located(place: str) -> Iterator[None]:
    """A block whose errors begin with the ``place`` that its rows come from, if it has a name."""
    if not place:
        yield
        return
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        msg = f"{place}: {error}"
        raise kind(msg) from error


def check_contamination(contamination: Any) -> Any:
    """A share as a plain float, or a fresh copy of a thresholder.

    Raises:
        TypeError: If it is neither a number nor an object with ``fit`` and ``predict``.
        ValueError: If it is a number outside (0, 0.5].
    """
    if callable(getattr(contamination, "fit", None)) and callable(getattr(contamination, "predict", None)):
        return copy.deepcopy(contamination)
    share = check_finite_float("contamination", contamination, minimum=0, exclusive=True)
    if share > 0.5:
        msg = f"contamination must be in (0, 0.5], got {contamination!r}"
        raise ValueError(msg)
    return share


def check_device(device: Any) -> torch.device:
    """``device`` as torch knows it.

    Raises:
        ValueError: If torch cannot put a tensor there.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        msg = f"device must be one that torch can use here, such as 'cpu', got {device!r}: {error}"
        raise ValueError(msg) from error
    return found


def seed_of(random_state: Any) -> int:
    """A seed for torch. A generator that is passed in is read from a copy, so it stays as it is.

    Raises:
        TypeError: If ``random_state`` is none of those named in the message.
        ValueError: If it is a negative integer.
    """
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0])  # the system's entropy, not NumPy's generator
    if isinstance(random_state, np.random.RandomState):
        return int(copy.deepcopy(random_state).randint(2**31))
    if isinstance(random_state, np.random.Generator):
        return int(copy.deepcopy(random_state).integers(2**31))
    if isinstance(random_state, (bool, np.bool_)) or not isinstance(random_state, (int, np.integer)):
        msg = f"random_state must be None, an integer, a RandomState or a Generator, got {random_state!r}"
        raise TypeError(msg)
    if random_state < 0:
        msg = f"random_state must be at least 0, got {random_state!r}"
        raise ValueError(msg)
    return int(random_state) % 2**63
