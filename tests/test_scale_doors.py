"""One table through every door: array, frame, Parquet, Dask, iterator; and what is refused, by place."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import NotFittedError

from toll_plugin.pyod import BatchScorer, Parquet, TollDetector

pa = pytest.importorskip("pyarrow")
da = pytest.importorskip("dask.array")
dd = pytest.importorskip("dask.dataframe")
dataset = pytest.importorskip("pyarrow.dataset")

RNG = np.random.default_rng(0)
SMALL = {"hidden_sizes": (8,), "latent_dim": 3, "n_members": 2, "max_steps": 10}
NAMES = list("abcd")
FRAME = pd.DataFrame(RNG.normal(size=(100, 4)), columns=NAMES)
#: Of each method that looks at rows one by one.
METHODS = [("decision_function", {}), ("predict", {}), ("predict_proba", {}), ("predict_proba", {"method": "unify"})]


@pytest.fixture(scope="module")
def detector():
    return TollDetector(**SMALL).fit(FRAME)


def write(frame: pd.DataFrame, folder: Path, *, files: int = 3, group: int = 13) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(np.array_split(np.arange(len(frame)), files)):
        frame.iloc[rows].reset_index(drop=True).to_parquet(folder / f"{i}.parquet", row_group_size=group)
    return folder


def tables():
    found = [pytest.param(load_breast_cancer(as_frame=True).data, id="breast cancer")]
    shuttle = Path(os.environ.get("TOLL_DATA_ROOT", "datasets")) / "ODDS/shuttle.mat"
    if shuttle.is_file():
        from scipy.io import loadmat

        x = loadmat(shuttle)["X"].astype(float)
        found.append(pytest.param(pd.DataFrame(x, columns=[f"c{i}" for i in range(x.shape[1])]), id="shuttle"))
    return found


@pytest.mark.parametrize("frame", tables())
def test_the_same_scores_through_every_door(frame, tmp_path):
    detector = TollDetector(max_steps=10).fit(frame)
    scores = detector.decision_function(frame)
    folder = write(frame, tmp_path / "rows", group=200)
    pieces = [frame[:1], frame[1:40], frame[40:40], frame[40:]]
    arrow = [pa.Table.from_pandas(piece, preserve_index=False) for piece in pieces]
    lazy = dd.from_pandas(frame, npartitions=4)
    found = {
        "folder": detector.decision_function(folder),
        "text": detector.decision_function(str(folder)),
        "pattern": detector.decision_function(f"{folder}/*.parquet"),
        "arrow dataset": detector.decision_function(dataset.dataset(folder)),
        "arrow table": detector.decision_function(pa.concat_tables(arrow)),
        "frames": np.concatenate(list(detector.decision_function(iter(pieces)))),
        "arrow tables": np.concatenate(list(detector.decision_function(iter(arrow)))),
        "arrow reader": np.concatenate(list(detector.decision_function(pa.concat_tables(arrow).to_reader(100)))),
        "dask": detector.decision_function(lazy).compute(),
        "scorer": np.concatenate([BatchScorer(detector)(piece)["score"] for piece in pieces]),
    }
    for door, mine in found.items():
        np.testing.assert_array_equal(mine, scores, err_msg=door)
    unnamed = TollDetector(max_steps=10).fit(frame.to_numpy())
    chunks = da.from_array(frame.to_numpy(), chunks=(150, 7))
    np.testing.assert_array_equal(unnamed.decision_function(chunks).compute(), scores)


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_other_methods_give_what_they_give_in_memory(detector, method, arguments, tmp_path):
    expected = getattr(detector, method)(FRAME, **arguments)
    lazy = dd.from_pandas(FRAME, npartitions=3)
    found = getattr(detector, method)(lazy, **arguments)
    assert found.divisions == lazy.divisions
    computed = found.compute()
    assert computed.dtypes is not None
    pd.testing.assert_index_equal(computed.index, FRAME.index)
    assert list(found._meta.columns if computed.ndim == 2 else [found._meta.name]) == (
        list(computed.columns) if computed.ndim == 2 else [computed.name]
    )
    np.testing.assert_array_equal(computed.to_numpy(), expected)
    np.testing.assert_array_equal(getattr(detector, method)(write(FRAME, tmp_path), **arguments), expected)
    batches = list(getattr(detector, method)(iter([FRAME[:30], FRAME[30:]]), **arguments))
    np.testing.assert_array_equal(np.concatenate(batches), expected)
    unnamed = TollDetector(**SMALL).fit(FRAME.to_numpy())
    chunks = getattr(unnamed, method)(da.from_array(FRAME.to_numpy(), chunks=(30, 4)), **arguments)
    assert chunks.chunks[0] == (30, 30, 30, 10)
    assert chunks.dtype == expected.dtype
    np.testing.assert_array_equal(chunks.compute(), expected)


def test_explanations_through_every_door(detector, tmp_path):
    expected = detector.explain(FRAME)
    names = ["score", "reconstruction", "latent", *(f"contribution: {name}" for name in NAMES)]
    values = np.column_stack([expected.score, expected.reconstruction, expected.latent, expected.contributions])
    lazy = detector.explain(dd.from_pandas(FRAME, npartitions=3))
    assert list(lazy.columns) == names
    np.testing.assert_array_equal(lazy.compute().to_numpy(), values)
    whole = detector.explain(write(FRAME, tmp_path))
    np.testing.assert_array_equal(whole.frame().to_numpy(), values)
    assert whole.names == expected.names
    first, second = detector.explain(iter([FRAME[:30], FRAME[30:]]))
    np.testing.assert_array_equal(np.vstack([first.contributions, second.contributions]), expected.contributions)
    unnamed = TollDetector(**SMALL).fit(FRAME.to_numpy())
    chunks = unnamed.explain(da.from_array(FRAME.to_numpy(), chunks=(30, 4)))
    np.testing.assert_array_equal(chunks.compute().to_numpy(), values)


def test_dask_computes_nothing_before_it_is_asked_and_holds_the_model_once(detector):
    looked = []

    def look(frame):
        looked.append(len(frame))
        return frame

    lazy = dd.from_pandas(FRAME, npartitions=10).map_partitions(look, meta=FRAME[:0])
    scores = detector.decision_function(lazy)
    assert looked == []
    graph = detector.decision_function(dd.from_pandas(FRAME, npartitions=10)).optimize().dask
    sizes = sorted(len(pickle.dumps(task)) for task in graph.values())
    assert sizes[-1] > 10_000 > 3 * sizes[-2]  # one has the model, the others name it
    other = TollDetector(**SMALL, random_state=1).fit(FRAME).decision_function(lazy)
    assert not np.array_equal(scores.compute(), other.compute())  # two models are not taken for one
    assert len(looked) == 20


def test_partitions_without_rows(detector, tmp_path):
    lazy = dd.from_pandas(FRAME, npartitions=4)
    lazy = lazy.map_partitions(lambda frame: frame[frame.index >= 30], meta=FRAME[:0])
    assert lazy.map_partitions(len).compute().min() == 0
    for method, _ in METHODS[:3]:
        found, expected = getattr(detector, method)(lazy).compute(), getattr(detector, method)(FRAME[30:])
        np.testing.assert_array_equal(found.to_numpy(), expected)
        assert set(np.atleast_1d(found.dtypes)) == {expected.dtype}
    assert detector.explain(lazy).compute().shape == (70, 7)
    FRAME[:0].to_parquet(tmp_path / "a.parquet")
    FRAME.to_parquet(tmp_path / "b.parquet")
    np.testing.assert_array_equal(detector.decision_function(tmp_path), detector.decision_function(FRAME))
    assert [len(scores) for scores in detector.decision_function(iter([FRAME[:0], FRAME[:2]]))] == [0, 2]


# -- Parquet -------------------------------------------------------------------------------------


def test_columns_predicate_and_folders_of_values(detector, tmp_path):
    scores = detector.decision_function(FRAME)
    frame = FRAME.assign(id=np.arange(100), day=np.arange(100) // 25)
    flat = write(frame, tmp_path / "flat")
    dataset.write_dataset(
        pa.Table.from_pandas(frame, preserve_index=False),
        tmp_path / "days",
        format="parquet",
        partitioning=["day"],
        partitioning_flavor="hive",
    )
    late = dataset.field("day") >= 2
    for path in (flat, tmp_path / "days", sorted(flat.glob("*.parquet"))):
        source = Parquet(path, columns=NAMES, where=late)
        np.testing.assert_array_equal(detector.decision_function(source), scores[50:])
        assert sum(source.counts()) == 50
        np.testing.assert_array_equal(detector.decision_function(Parquet(path, columns=NAMES)), scores)


def test_a_file_is_cut_between_groups_of_rows(monkeypatch, tmp_path):
    from toll_plugin.pyod.scale import parquet

    write(FRAME, tmp_path, files=2, group=10)
    monkeypatch.setattr(parquet, "_PARTITION", 25)
    found = Parquet(tmp_path).partitions()
    assert [part.groups for part in found] == [(0, 1), (2, 3), (4,)] * 2
    assert [part.number for part in found] == list(range(6))
    assert [part.rows for part in found] == [20, 20, 10] * 2


def test_paths_mean_the_same_in_another_folder(detector, monkeypatch, tmp_path):
    write(FRAME, tmp_path / "rows [1]")
    monkeypatch.chdir(tmp_path)
    for path in ("rows [1]", "rows [[]1]/*.parquet", ["rows [1]/0.parquet", Path("rows [1]/1.parquet")]):
        source = Parquet(path)
        assert all(Path(part.path).is_absolute() for part in source.partitions())
        scores = detector.decision_function(source)
        np.testing.assert_array_equal(scores, detector.decision_function(FRAME)[: len(scores)])
    with pytest.raises(FileNotFoundError, match="path must hold at least one Parquet file"):
        Parquet([])


def test_paths_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must fit at least one file, got '.*none-"):
        Parquet(f"{tmp_path}/none-*.parquet")
    with pytest.raises(FileNotFoundError):
        Parquet(tmp_path / "none.parquet")
    with pytest.raises(TypeError, match=r"path must be a path, a pattern, a list of files .*, got 3"):
        Parquet(3)
    path = write(FRAME, tmp_path, files=1)
    with pytest.raises(ValueError, match=r"columns must be in the files, which have no \['z'\], only \['a', 'b'"):
        Parquet(path, columns=["a", "z"])
    with pytest.raises(TypeError, match="columns must be a list of names, got 'a'"):
        Parquet(path, columns="a")


# -- what is refused -------------------------------------------------------------------------------


def spoilt(column: str, value: object) -> pd.DataFrame:
    """The frame with a bad cell in the eleventh of the last 33 rows."""
    frame = FRAME.copy()
    if isinstance(value, str):
        frame[column] = frame[column].astype(object)
    frame.loc[77, column] = value
    return frame


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN"), (np.inf, "infinity"), ("many", "'many'"), ("2026-01-01", "'2026-01-01'")]
)
def test_a_bad_cell_is_named_by_partition_row_and_column(detector, value, message, tmp_path):
    frame = spoilt("c", value)
    with pytest.raises(ValueError, match=f"^partition 2: Input X contains {message}: row 10, column 2 \\('c'\\)"):
        detector.decision_function(dd.from_pandas(frame, npartitions=3)).compute()
    with pytest.raises(ValueError, match=f"^batch 1: Input X contains {message}: row 27, column 2 \\('c'\\)"):
        list(detector.predict(iter([frame[:50], frame[50:]])))
    with pytest.raises(ValueError, match=f"^Input X contains {message}: row 77, column 2 \\('c'\\)"):
        detector.decision_function(frame)
    if not isinstance(value, str):
        path = write(frame, tmp_path, files=3)
        place = r"^partition 2 \(2.parquet, row groups 0 to 2\): "
        with pytest.raises(ValueError, match=f"{place}Input X contains {message}: row 10, column 2"):
            detector.predict_proba(path)
        with pytest.raises(ValueError, match=r"^chunk 1 of the rows: .* row 27, column 2"):
            TollDetector(**SMALL).fit(FRAME.to_numpy()).predict(
                da.from_array(frame.to_numpy(), chunks=(50, 4))
            ).compute()


def test_rows_are_counted_over_the_batches_of_a_partition(detector, monkeypatch, tmp_path):
    from toll_plugin.pyod.scale import parquet

    monkeypatch.setattr(parquet, "_VALUES", 4)  # of which at least 1024 rows are read
    frame = pd.concat([FRAME] * 30, ignore_index=True)
    frame.loc[2500, "b"] = np.nan
    frame.to_parquet(tmp_path / "rows.parquet")
    assert len(list(Parquet(tmp_path))) == 3
    with pytest.raises(ValueError, match=r"^partition 0 .*: row 2500, column 1 \('b'\)"):
        detector.decision_function(tmp_path)


def test_columns_of_one_file(detector, tmp_path):
    write(FRAME, tmp_path)
    FRAME.drop(columns="b").to_parquet(tmp_path / "3.parquet")
    with pytest.raises(ValueError, match=r"partition 3 \(3.parquet, row groups 0 to 0\) has no column \['b'\]"):
        detector.decision_function(tmp_path)
    FRAME.assign(e=1.0).to_parquet(tmp_path / "3.parquet")
    with pytest.raises(ValueError, match=r"partition 3 .* has columns that the first file has not: \['e'\]"):
        detector.decision_function(tmp_path)
    assert detector.decision_function(Parquet(tmp_path, columns=NAMES)).shape == (200,)
    FRAME.assign(c=pd.Categorical(["low"] * 100)).to_parquet(tmp_path / "3.parquet")
    with pytest.raises(ValueError, match=r"partition 3 .*: Input X contains 'low': row 0, column 2 \('c'\), of type"):
        detector.decision_function(tmp_path)
    FRAME.astype({"a": np.float32, "b": np.int64}).to_parquet(tmp_path / "3.parquet")
    assert np.isfinite(detector.decision_function(tmp_path)).all()


def test_columns_of_the_whole(detector):
    for frame in (FRAME.assign(e=1.0), FRAME.drop(columns="b"), FRAME[NAMES[::-1]]):
        with pytest.raises(ValueError, match=r"^partition [01]: The feature names should match"):
            detector.decision_function(dd.from_pandas(frame, npartitions=2)).compute()
    dated = FRAME.assign(d=pd.Timestamp("2026-01-01"))
    with pytest.raises(ValueError, match=r"row 0, column 3 \('d'\), of type datetime64"):
        detector.decision_function(dated)


def test_what_has_no_pieces(detector):
    with pytest.raises(TypeError, match="X must be a Dask DataFrame or a Dask Array"):
        detector.decision_function(dd.from_pandas(FRAME, npartitions=2)["a"])
    with pytest.raises(ValueError, match="return_confidence=True needs a table in memory"):
        detector.predict(dd.from_pandas(FRAME, npartitions=2), return_confidence=True)
    with pytest.raises(NotFittedError):
        TollDetector().decision_function(iter([FRAME]))


# -- BatchScorer ---------------------------------------------------------------------------------


def test_a_scorer_keeps_keys_order_and_index(detector):
    scorer = pickle.loads(pickle.dumps(BatchScorer(detector, keys=["id"])))
    batch = FRAME.assign(id=[f"row {i}" for i in range(100)]).sample(20, random_state=0)
    found = scorer(batch)
    assert list(found.columns) == ["id", "score"]
    pd.testing.assert_series_equal(found["id"], batch["id"])
    np.testing.assert_array_equal(found["score"], detector.decision_function(batch[NAMES]))
    for form in (pa.Table.from_pandas(batch), {name: batch[name].to_numpy() for name in batch}):
        np.testing.assert_array_equal(scorer(form)["score"], found["score"])
    assert [len(one) for one in scorer.each([batch, batch[:0], batch[:1]])] == [20, 0, 1]
    unnamed = TollDetector(**SMALL).fit(FRAME.to_numpy())
    np.testing.assert_array_equal(BatchScorer(unnamed)(FRAME.to_numpy())["score"], unnamed.decision_scores_)


def test_a_scorer_flags_rows_that_have_no_score(detector):
    frame = FRAME.copy()
    frame["b"] = frame["b"].astype(object)
    frame.loc[3, "a"], frame.loc[5, "b"], frame.loc[7, "d"] = np.nan, "many", -np.inf
    scores = BatchScorer(detector, errors="flag")(frame)["score"]
    assert list(np.flatnonzero(scores.isna())) == [3, 5, 7]
    good = scores.notna()
    np.testing.assert_array_equal(scores[good], detector.decision_function(FRAME)[good])
    assert BatchScorer(detector, errors="flag")(frame[3:4])["score"].isna().all()
    with pytest.raises(ValueError, match="The feature names should match"):
        BatchScorer(detector, errors="flag")(frame.drop(columns="a"))


def test_a_scorer_leaves_training_rows_and_scores_at_home():
    streamed = TollDetector(**SMALL).partial_fit(FRAME)
    sent = pickle.dumps(BatchScorer(streamed).detector)
    assert streamed._stream.sample.tobytes() not in sent
    assert streamed.decision_scores_.tobytes() not in sent
    assert len(streamed.decision_scores_) == 100
    streamed.partial_fit(FRAME)  # whose own it still has


def test_transformers_that_take_no_zeros():
    from sklearn.preprocessing import FunctionTransformer

    frame = FRAME.abs() + 1
    detector = TollDetector(**SMALL, preprocessing=FunctionTransformer(np.log)).fit(frame)
    found = detector.decision_function(dd.from_pandas(frame, npartitions=2)).compute()
    np.testing.assert_array_equal(found, detector.decision_scores_)


def test_a_scorers_arguments(detector):
    with pytest.raises(ValueError, match="keys must be a list of columns, none of them 'score', got 'id'"):
        BatchScorer(detector, keys="id")
    with pytest.raises(ValueError, match="none of them 'score', got \\['score'\\]"):
        BatchScorer(detector, keys=["score"])
    with pytest.raises(ValueError, match="errors must be one of 'raise', 'flag', got 'skip'"):
        BatchScorer(detector, errors="skip")
    with pytest.raises(ValueError, match=r"keys must be columns of the batch, which has no \['id'\]"):
        BatchScorer(detector, keys=["id"])(FRAME)
    with pytest.raises(NotFittedError):
        BatchScorer(TollDetector())
