"""A fit of data that do not fit in memory is the fit of the same rows in memory, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from toll_plugin.pyod import Parquet, TollDetector
from toll_plugin.pyod import detector as detector_module

pa = pytest.importorskip("pyarrow")
dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
dd = pytest.importorskip("dask.dataframe")

NAMES = list("abcd")
ROWS = 1501
SMALL = {"hidden_sizes": (8,), "latent_dim": 3, "n_members": 2, "batch_size": 50, "max_steps": 25}
FRAME = pd.DataFrame(np.random.default_rng(0).normal(size=(ROWS, 4)), columns=NAMES)
FRAME.iloc[:40] += 4
OTHER = pd.DataFrame(np.random.default_rng(1).normal(size=(50, 4)) * 3, columns=NAMES)
#: Bytes of 200 rows, of which half are fetched at a time.
FEW = 200 * 4 * 8


def write(frame: pd.DataFrame, folder: Path, files: int, group: int = 300) -> Path:
    folder.mkdir()
    for i, rows in enumerate(np.array_split(np.arange(len(frame)), files)):
        frame.iloc[rows].to_parquet(folder / f"{i}.parquet", index=False, row_group_size=group)
    return folder


def batches(frame: pd.DataFrame, count: int):
    return (frame.iloc[rows] for rows in np.array_split(np.arange(len(frame)), count))


def same(one: TollDetector, other: TollDetector) -> None:
    np.testing.assert_array_equal(one.decision_function(OTHER), other.decision_function(OTHER))
    np.testing.assert_array_equal(one.decision_scores_, other.decision_scores_)
    np.testing.assert_array_equal(one.labels_, other.labels_)
    assert one.threshold_ == other.threshold_
    assert one.n_features_in_ == other.n_features_in_
    assert one.history_.keys() == other.history_.keys()
    for name, values in one.history_.items():
        np.testing.assert_array_equal(values, other.history_[name])
    assert list(one.feature_names_in_) == list(other.feature_names_in_)


@pytest.mark.parametrize("memory", [FEW, 1 << 20])
def test_every_door(memory, tmp_path):
    expected = TollDetector(**SMALL).fit(FRAME)
    for data in (
        write(FRAME, tmp_path / "rows", 3),
        Parquet(write(FRAME.assign(id=1), tmp_path / "more", 1), columns=NAMES),
        dd.from_pandas(FRAME, npartitions=4),
        batches(FRAME, 5),
        (pa.Table.from_pandas(frame, preserve_index=False) for frame in batches(FRAME, 2)),
    ):
        same(TollDetector(**SMALL).fit(data, memory=memory), expected)
    array = FRAME.to_numpy()
    unnamed = TollDetector(**SMALL).fit(da.from_array(array, chunks=(400, 3)), memory=memory)
    np.testing.assert_array_equal(unnamed.decision_function(OTHER.to_numpy()), expected.decision_function(OTHER))
    assert not hasattr(unnamed, "feature_names_in_")
    assert unnamed.threshold_ == expected.threshold_


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_steps": None, "epochs": 2},
        {"max_steps": 70, "batch_size": 30, "validation_fraction": 0.2, "patience": 1, "noise": 0.1, "dropout": 0.2},
        {"preprocessing": "none", "metric": "euclidean", "score_scale": "none", "beta": 0.1},
        {"max_steps": 31, "batch_size": 50},  # of which one and thirty hold all rows, the last one more
        {"contamination": np.float32(0.03), "preprocessing": "standard"},
    ],
)
def test_every_way_to_train(parameters):
    lazy = dd.from_pandas(FRAME, npartitions=4)
    settings = SMALL | parameters
    same(TollDetector(**settings).fit(lazy, memory=FEW), TollDetector(**settings).fit(FRAME))


def test_networks_and_transformers_of_ones_own():
    from sklearn.preprocessing import StandardScaler
    from torch import nn

    own = {"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4), "n_members": 1, "preprocessing": StandardScaler()}
    lazy = dd.from_pandas(FRAME, npartitions=4)
    same(TollDetector(max_steps=10, **own).fit(lazy, memory=FEW), TollDetector(max_steps=10, **own).fit(FRAME))


@pytest.mark.parametrize("files", [1, 2, 7])
def test_partitions_workers_and_memory_do_not_matter(files, tmp_path):
    expected = TollDetector(**SMALL).fit(FRAME)
    for memory in (1, FEW, 3 * FEW):
        same(TollDetector(**SMALL).fit(write(FRAME, tmp_path / str(memory), files), memory=memory), expected)
    for scheduler in ({"scheduler": "synchronous"}, {"scheduler": "threads", "num_workers": 3}):
        with dask.config.set(**scheduler):
            same(TollDetector(**SMALL).fit(dd.from_pandas(FRAME, npartitions=files), memory=FEW), expected)


def test_a_bar_over_the_partitions_where_it_is_asked_for(tmp_path, capfd):
    folder = write(FRAME, tmp_path / "rows", 3)
    TollDetector(**SMALL).fit(folder, memory=FEW)
    assert capfd.readouterr() == ("", "")
    TollDetector(**SMALL, verbose=1).fit(folder, memory=FEW)
    assert "read: 100%" in (shown := capfd.readouterr().err)
    assert "3/3" in shown


def test_single_precision_and_integers(tmp_path):
    frame = FRAME.astype({"a": np.float32, "b": np.float32})
    frame["c"] = np.arange(ROWS) % 7
    expected = TollDetector(**SMALL).fit(frame)
    same(TollDetector(**SMALL).fit(write(frame, tmp_path / "rows", 2), memory=FEW), expected)
    same(TollDetector(**SMALL).fit(batches(frame, 3), memory=FEW), expected)


def test_of_large_data_no_order_of_all_rows_is_drawn(monkeypatch, tmp_path):
    from toll_plugin.core import rows
    from toll_plugin.core.tables import fit

    for module in (rows, fit):
        monkeypatch.setattr(module, "FEW_ROWS", 1000)
    monkeypatch.setattr(rows.torch, "randperm", None)
    settings = SMALL | {"batch_size": 10, "max_steps": 2}
    expected = TollDetector(**settings).fit(FRAME)
    same(TollDetector(**settings).fit(write(FRAME, tmp_path / "rows", 3), memory=FEW), expected)


def test_of_large_data_a_sample_is_scored(monkeypatch, tmp_path):
    whole = TollDetector(**SMALL).fit(FRAME)
    monkeypatch.setattr(detector_module, "_SCORED", 1000)
    found = TollDetector(**SMALL).fit(write(FRAME, tmp_path / "rows", 3), memory=FEW)
    np.testing.assert_array_equal(found.decision_function(OTHER), whole.decision_function(OTHER))
    positions = np.searchsorted(np.sort(whole.decision_scores_), found.decision_scores_)
    np.testing.assert_array_equal(np.sort(whole.decision_scores_)[positions], found.decision_scores_)
    assert len(found.decision_scores_) == len(found.labels_) == len(set(positions)) == 1000
    # The share above the sample's threshold: a tenth, to four standard errors of a draw of two thirds of all rows.
    share = np.mean(whole.decision_scores_ > found.threshold_)
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 1000 * (1 - 1000 / ROWS))


def test_a_fit_that_fails_leaves_the_detector_as_it_was():
    detector = TollDetector(**SMALL).fit(FRAME)
    before = detector.decision_function(OTHER)
    bad = FRAME.copy()
    bad.loc[1400, "b"] = np.nan
    with pytest.raises(ValueError, match=r"^partition 3: Input X contains NaN: row \d+, column 1 \('b'\)"):
        detector.fit(dd.from_pandas(bad, npartitions=4), memory=FEW)
    np.testing.assert_array_equal(detector.decision_function(OTHER), before)


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_through_every_door(tmp_path):
    expected = TollDetector(**SMALL)
    for piece in batches(FRAME, 3):
        expected.partial_fit(piece, epochs=2)
    lazy = dd.from_pandas(FRAME, npartitions=3)
    for data in (batches(FRAME, 3), write(FRAME, tmp_path / "rows", 3, group=600)):
        same(TollDetector(**SMALL).partial_fit(data, epochs=2), expected)
    assert lazy.map_partitions(len).compute().tolist() == [501, 500, 500]
    same(TollDetector(**SMALL).partial_fit(lazy, epochs=2), expected)


def test_pieces_of_a_stream_that_are_too_small():
    expected = TollDetector(**SMALL).partial_fit(FRAME[:700]).partial_fit(FRAME[700:])
    for cuts in ([1, 700], [699, 700], [0, 700, 700], [700, 1500]):
        pieces = [FRAME[a:b] for a, b in zip([0, *cuts], [*cuts, ROWS], strict=True)]
        same(TollDetector(**SMALL).partial_fit(iter(pieces)), expected)
        arrays = TollDetector(**SMALL).partial_fit(iter([piece.to_numpy() for piece in pieces]))
        np.testing.assert_array_equal(arrays.decision_scores_, expected.decision_scores_)
    with pytest.raises(ValueError, match="X must hold at least 2 rows to fit, got 1"):
        TollDetector(**SMALL).partial_fit(iter([FRAME[:1]]))


def test_a_bad_piece_of_a_stream_changes_nothing():
    detector = TollDetector(**SMALL).partial_fit(FRAME)
    before = detector.decision_function(OTHER)
    with pytest.raises(ValueError, match=r"^batch 1: Input X contains NaN: row 0, column 3 \('d'\)"):
        detector.partial_fit(iter([FRAME[:100], FRAME[100:200].assign(d=np.nan)]))
    np.testing.assert_array_equal(detector.decision_function(OTHER), before)


def test_a_stream_that_does_not_drift_ends_where_a_fit_does():
    """As near to a fit of all rows as fits of two seeds lie to each other: rank correlation, units, alarms."""

    def drawn(count, seed):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(count, 3)) @ np.random.default_rng(5).normal(size=(3, 8))
        return rows + 0.2 * rng.normal(size=rows.shape)

    rows, fresh = drawn(6000, 0), drawn(2000, 1)
    stream = TollDetector(n_members=4).partial_fit(iter(np.array_split(rows, 4)))
    whole, other = (TollDetector(n_members=4, max_steps=100, random_state=seed).fit(rows) for seed in (42, 1))
    mine, theirs, seeds = (detector.decision_function(fresh) for detector in (stream, whole, other))
    assert spearmanr(mine, theirs)[0] > spearmanr(seeds, theirs)[0] - 0.05
    assert abs(np.median(mine) / np.median(theirs) - 1) < 0.05
    assert abs(np.mean(mine > stream.threshold_) - np.mean(theirs > whole.threshold_)) < 0.03
    np.testing.assert_allclose(stream._model.scaling.scale, whole._model.scaling.scale, rtol=0.03)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [FEW, 1 << 20])
def test_one_bad_row_is_found_wherever_it_is(memory, tmp_path):
    bad = FRAME.copy()
    bad.loc[1234, "c"] = np.inf  # which a fit of few steps would not read
    settings = SMALL | {"max_steps": 1}
    with pytest.raises(ValueError, match=r"^batch 4: Input X contains infinity: row 33, column 2 \('c'\)"):
        TollDetector(**settings).fit(batches(bad, 5), memory=memory)
    place = r"^partition 2 \(2.parquet, row groups 0 to 1\): "
    with pytest.raises(ValueError, match=place + r"Input X contains infinity: row 233, column 2 \('c'\)"):
        TollDetector(**settings).fit(write(bad, tmp_path / "rows", 3), memory=memory)
    with pytest.raises(ValueError, match=r"^chunk 3 of the rows: Input X contains infinity: row 34, column 2"):
        TollDetector(**settings).fit(da.from_array(bad.to_numpy(), chunks=(400, 4)), memory=memory)


def test_text_in_one_partition(tmp_path):
    folder = write(FRAME, tmp_path / "rows", 3)
    FRAME[:5].assign(b=["1", "2", "x", "4", "5"]).to_parquet(folder / "3.parquet", index=False)
    with pytest.raises(ValueError, match=r"^partition 3 .*: Input X contains 'x': row 2, column 1 \('b'\), of type"):
        TollDetector(**SMALL).fit(folder, memory=FEW)
    FRAME[:5].drop(columns="b").to_parquet(folder / "3.parquet", index=False)
    with pytest.raises(ValueError, match=r"^partition 3 \(3.parquet, .* has no column \['b'\]"):
        TollDetector(**SMALL).fit(folder, memory=FEW)
    with pytest.raises(ValueError, match=r"^batch 1: The feature names should match"):
        TollDetector(**SMALL).fit(iter([FRAME, FRAME.assign(e=1.0)]))


def test_data_of_no_rows(tmp_path):
    empty = FRAME[:0]
    empty.to_parquet(tmp_path / "empty.parquet")
    for data, rows in (
        (tmp_path / "empty.parquet", 0),
        (dd.from_pandas(empty, npartitions=1), 0),
        (iter([]), 0),
        (iter([empty, FRAME[:1]]), 1),
    ):
        with pytest.raises(ValueError, match=f"X must hold at least 2 rows to fit, got {rows}"):
            TollDetector(**SMALL).fit(data)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"path must hold at least one Parquet file, got '.*none'"):
        TollDetector(**SMALL).fit(tmp_path / "none")


def test_partitions_without_rows_change_nothing(tmp_path):
    expected = TollDetector(**SMALL).fit(FRAME)
    folder = write(FRAME, tmp_path / "rows", 2)
    FRAME[:0].to_parquet(folder / "00.parquet", index=False)
    FRAME[:0].to_parquet(folder / "11.parquet", index=False)
    same(TollDetector(**SMALL).fit(folder, memory=FEW), expected)
    same(TollDetector(**SMALL).fit(iter([FRAME[:0], FRAME[:700], FRAME[:0], FRAME[700:]]), memory=FEW), expected)
    lazy = dd.from_pandas(pd.concat([FRAME, FRAME[:500]], ignore_index=True), npartitions=5)
    lazy = lazy.map_partitions(lambda frame: frame[frame.index < ROWS], meta=FRAME[:0])
    same(TollDetector(**SMALL).fit(lazy, memory=FEW), expected)


def test_data_that_change_during_a_fit(tmp_path, monkeypatch):
    folder = write(FRAME, tmp_path / "rows", 2)
    monkeypatch.setattr(Parquet, "counts", lambda _: [751, 760])  # before some rows were deleted
    with pytest.raises(ValueError, match="partition 1 must stay as it is during a fit, but it had 760 rows and now"):
        TollDetector(**SMALL).fit(folder, memory=FEW)


def test_memory_is_a_number_of_bytes():
    with pytest.raises(ValueError, match="memory must be at least 1, got 0"):
        TollDetector(**SMALL).fit(iter([FRAME]), memory=0)
    with pytest.raises(TypeError, match="memory must be an integer"):
        TollDetector(**SMALL).fit(iter([FRAME]), memory="1 GB")


# -- the rows that are read ------------------------------------------------------------------------


@given(
    count=st.integers(1, 40),
    memory=st.integers(1, 500),
    drawn=st.lists(st.lists(st.integers(0, 39), max_size=9), max_size=8),
)
def test_a_distant_table_is_its_rows(count, memory, drawn):
    from toll_plugin.core.tables.distant import DistantTable

    x, passes = np.arange(2.0 * count).reshape(count, 2), []

    def fetch(rows):
        assert (np.diff(rows) > 0).all()
        passes.append(len(rows))
        return x[rows]

    table = DistantTable(x.shape, fetch, memory)
    batches = [np.array(rows, dtype=np.int64) % count for rows in drawn]
    for found, rows in zip(table.batches(iter(batches)), batches, strict=True):
        np.testing.assert_array_equal(found, x[rows])
    most = max([memory // 32, *map(len, batches)])
    assert all(rows <= most for rows in passes)
    np.testing.assert_array_equal(table[3:7], x[3:7])
    before = len(passes)
    table.keep(np.arange(0, count, 2))
    np.testing.assert_array_equal(table[np.array([0, 0]), 1:], x[[0, 0], 1:])
    assert len(passes) == before + 1


@given(count=st.integers(0, 30), without=st.sets(st.integers(0, 29)), index=st.lists(st.integers(0, 29)))
def test_the_rows_that_stay(count, without, index):
    from toll_plugin.core.rows import WithoutRows

    left_out = np.array(sorted(row for row in without if row < count), dtype=np.int64)
    expected = np.delete(np.arange(count), left_out)
    rest = WithoutRows(count, left_out)
    assert len(rest) == len(expected)
    np.testing.assert_array_equal(rest[:], expected)
    assert list(rest) == list(expected)
    np.testing.assert_array_equal(rest[2:9], expected[2:9])
    known = np.array([i for i in index if i < len(expected)], dtype=np.int64)
    np.testing.assert_array_equal(rest[known], expected[known])


@pytest.mark.parametrize("whole", [10, 1 << 24])
def test_a_random_order_is_one(whole, monkeypatch):
    import torch

    from toll_plugin.core import rows

    monkeypatch.setattr(rows, "FEW_ROWS", whole)
    generator = torch.Generator().manual_seed(0)
    assert sorted(rows.random_order(50, 99, generator).tolist()) == list(range(50))
    first = [rows.random_order(50, 5, generator).numpy() for _ in range(4000)]
    assert all(len(set(order)) == 5 for order in first)
    for place in range(5):  # every row as often at each of the first places: 80 times, to five standard errors
        counts = np.bincount([order[place] for order in first], minlength=50)
        assert np.abs(counts - 80).max() < 5 * np.sqrt(80)
    huge = rows.random_order(10**10, 1000, generator) if whole == 10 else torch.arange(1000)
    assert len(set(huge.tolist())) == 1000
