"""One batch of rows of any engine, and the function that scores it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from toll_plugin.core.checks import check_option
from toll_plugin.core.tables.scaling import Floats
from toll_plugin.core.threads import one_thread
from toll_plugin.pyod.base import CarefulDetector
from toll_plugin.pyod.validation import as_frame, check_columns, located

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BatchScorer", "Errors", "lean"]

Errors = Literal["raise", "flag"]


class BatchScorer:
    """Scores one batch of rows and gives back a data frame: a function to hand to an engine.

    It holds no more than scoring needs, can be pickled, and gives each row the score that
    :meth:`TollDetector.decision_function` gives it, to the last bit, however the rows are cut into batches
    (on processors of one kind, for which the libraries choose the same instructions).

    Args:
        detector: Fitted.
        keys: Columns that go over to the result as they are, such as an identifier.
        errors: ``"raise"`` (default), or ``"flag"``: rows with a value that is missing, infinite or no number
            get the score NaN. Missing and unknown columns are always an error.

    Raises:
        NotFittedError: If the detector is not fitted.
        ValueError: If a key is called ``"score"``, or ``errors`` is unknown; when called, as
            ``decision_function`` does.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> from toll_plugin.pyod import TollDetector
        >>> frame = pd.DataFrame(np.random.default_rng(0).normal(size=(100, 2)), columns=["a", "b"])
        >>> scorer = BatchScorer(TollDetector(max_steps=5).fit(frame), keys=["id"], errors="flag")
        >>> batch = pd.DataFrame({"id": ["x", "y"], "a": [0.0, np.nan], "b": [0.0, 0.0]})
        >>> scored = scorer(batch)
        >>> list(scored.columns), scored["id"].tolist(), scored["score"].isna().tolist()
        (['id', 'score'], ['x', 'y'], [False, True])
    """

    def __init__(self, detector: CarefulDetector, *, keys: Sequence[str] = (), errors: Errors = "raise") -> None:
        detector._check_fitted()
        check_option("errors", errors, get_args(Errors))
        if isinstance(keys, str) or "score" in keys:
            msg = f"keys must be a list of columns, none of them 'score', got {keys!r}"
            raise ValueError(msg)
        self.detector, self.keys, self.errors = lean(detector), list(keys), errors

    def __call__(self, batch: Any) -> pd.DataFrame:
        """The keys of a batch and its ``score``, in the batch's order and with its index.

        Args:
            batch: DataFrame, Arrow table or batch, mapping of columns; without keys also an array ``(N, n_features)``.
        """
        import pandas as pd  # noqa: PLC0415  whoever has arrays need not load it

        frame = as_frame(batch)
        if not isinstance(frame, pd.DataFrame):
            return pd.DataFrame({"score": self.scores(frame)})
        lost = [key for key in self.keys if key not in frame.columns]
        if lost:
            msg = f"keys must be columns of the batch, which has no {lost}, only {list(frame.columns)[:20]}"
            raise ValueError(msg)
        scores = self.scores(frame[self.features(frame.columns)])
        return frame[self.keys].assign(score=scores)

    def features(self, columns: Iterable[Any]) -> list[Any]:
        """The columns that are features: all but the keys, and those keys that the detector was fitted on."""
        names = getattr(self.detector, "feature_names_in_", ())
        return [column for column in columns if column not in self.keys or column in names]

    def each(self, batches: Iterable[Any]) -> Iterator[pd.DataFrame]:
        """The result of each batch, one after another, as Spark's ``mapInPandas`` wants it."""
        return map(self, batches)

    def scores(self, features: Any, place: str = "", first: int = 0) -> Floats:
        """Scores ``(N,)`` of a batch without its keys.

        Args:
            features: DataFrame or array; no row is none to score.
            place: Where the rows come from, for messages.
            first: Number of the first row there.
        """
        if len(features) == 0:
            return np.empty(0)
        with located(place), one_thread():
            if self.errors == "raise":
                return self.detector._model.score(self.detector._table(features, first))
            table = check_columns(self.detector, _numbers(features))
            good = np.isfinite(table).all(axis=1)
            scores = np.full(len(table), np.nan)
            if good.any():
                scores[good] = self.detector._model.score(table[good])
            return scores


def _numbers(features: Any) -> Any:
    """Features of which cells that are no numbers are NaN."""
    if not hasattr(features, "dtypes"):
        return features
    import pandas as pd  # noqa: PLC0415

    def of(column: Any) -> Any:
        numeric = pd.api.types.is_numeric_dtype(column.dtype)
        return column if numeric else pd.to_numeric(column.astype(object), errors="coerce").astype(float)

    return features.apply(of)


def lean(detector: CarefulDetector, *, scores: bool = False) -> CarefulDetector:
    """A copy to be sent to others, without what only ``partial_fit`` needs and, but for ``scores``, training scores."""
    found = copy.copy(detector)
    found.__dict__.pop("_stream", None)
    if not scores:
        found.decision_scores_, found.labels_ = np.empty(0), np.empty(0, dtype=np.int64)
    return found
