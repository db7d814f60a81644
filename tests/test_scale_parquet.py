"""Scores written as Parquet: killed and gone on with, refused, on a cluster."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError

from toll_plugin.pyod import Parquet, ScoredParquet, TollDetector, score_parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
distributed = pytest.importorskip("distributed")

NAMES = list("abcd")
ROWS, FILES = 4000, 16
SMALL = {"hidden_sizes": (8,), "latent_dim": 3, "n_members": 2, "max_steps": 10}
FRAME = pd.DataFrame(np.random.default_rng(0).normal(size=(ROWS, 4)), columns=NAMES)
FRAME["id"] = np.arange(ROWS)
FRAME["name"] = [f"row {i}" for i in range(ROWS)]
KEYS = ["id", "name"]


@pytest.fixture(scope="module")
def detector():
    return TollDetector(**SMALL).fit(FRAME[NAMES])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i, rows in enumerate(np.array_split(np.arange(ROWS), FILES)):
        FRAME.iloc[rows].to_parquet(folder / f"{i:02d}.parquet", index=False, row_group_size=100)
    return folder


@pytest.fixture(scope="module")
def expected(detector):
    return FRAME[KEYS].assign(score=detector.decision_function(FRAME[NAMES]))


def read(target: Path) -> pd.DataFrame:
    return pd.read_parquet(target)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_keys_and_scores_in_the_order_of_the_source(detector, source, expected, tmp_path, capfd):
    found = score_parquet(detector, source, tmp_path / "new/scores", keys=KEYS)
    assert found == ScoredParquet(ROWS, 0, FILES, 0)
    pd.testing.assert_frame_equal(read(tmp_path / "new/scores"), expected)
    assert "4.00k/4.00k" in capfd.readouterr().err
    names = {f"part-{i:06d}.parquet" for i in range(FILES)}
    assert {path.name for path in (tmp_path / "new/scores").iterdir()} == names | {"_toll.json"}
    assert score_parquet(detector, source, tmp_path / "new/scores", keys=KEYS, progress=False).resumed == FILES
    assert capfd.readouterr() == ("", "")


def test_predicates_and_features_that_are_keys(detector, source, expected, tmp_path):
    from pyarrow import dataset

    rows = Parquet(source, columns=NAMES, where=dataset.field("id") < 300)
    found = score_parquet(detector, rows, tmp_path / "scores", keys=["id", "a"], progress=False)
    assert found == ScoredParquet(300, 0, FILES, 0)
    scores = read(tmp_path / "scores")
    assert list(scores.columns) == ["id", "a", "score"]
    np.testing.assert_array_equal(scores["score"], expected["score"][:300])


def test_partitions_without_rows_are_written(detector, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    for i, frame in enumerate((FRAME[:0], FRAME[:10], FRAME[:0])):
        frame.to_parquet(rows / f"{i}.parquet", index=False)
    target = tmp_path / "scores"
    assert score_parquet(detector, rows, target, keys=KEYS, progress=False) == ScoredParquet(10, 0, 3, 0)
    assert score_parquet(detector, rows, target, keys=KEYS, progress=False) == ScoredParquet(10, 0, 3, 3)
    assert len(read(target)) == 10


def test_rows_that_have_no_score(detector, expected, tmp_path):
    frame = FRAME.copy()
    frame.loc[[7, 2000], "b"] = np.nan
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    with pytest.raises(
        ValueError, match=r"^partition 0 \(rows.parquet, .*: Input X contains NaN: row 7, column 1 \('b'"
    ):
        score_parquet(detector, tmp_path / "rows.parquet", tmp_path / "raised", keys=KEYS, progress=False)
    assert {path.name for path in (tmp_path / "raised").iterdir()} == {"_toll.json"}
    arguments = {"keys": KEYS, "errors": "flag", "progress": False}
    for resumed in (0, 1):
        found = score_parquet(detector, tmp_path / "rows.parquet", tmp_path / "flagged", **arguments)
        assert found == ScoredParquet(ROWS, 2, 1, resumed)
    scores = read(tmp_path / "flagged")
    assert list(np.flatnonzero(scores["score"].isna())) == [7, 2000]
    good = scores["score"].notna()
    np.testing.assert_array_equal(scores["score"][good], expected["score"][good])


# -- cut off and gone on with ----------------------------------------------------------------------


def written(target: Path) -> int:
    return len(list(target.glob("part-*.parquet")))


def _score(detector, source, target):
    score_parquet(detector, source, target, keys=KEYS, progress=False)


def test_killed_at_three_points(detector, source, expected, tmp_path):
    target, points = tmp_path / "scores", random.Random(0)
    context = multiprocessing.get_context("fork")  # which need not import everything anew
    for until in (1, 6, 11):
        child = context.Process(target=_score, args=(detector, source, target))
        child.start()
        while written(target) < until + points.randint(0, 3) and child.is_alive():
            time.sleep(0.001)
        time.sleep(points.random() / 50)  # into the middle of a partition
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    before = {name: path.stat().st_mtime_ns for path in target.iterdir() if (name := path.name).startswith("part")}
    assert 0 < len(before) <= FILES
    (target / ".part-000015.parquet.0123.part").write_text("cut off in the middle")
    found = score_parquet(detector, source, target, keys=KEYS, progress=False)
    assert found == ScoredParquet(ROWS, 0, FILES, len(before))
    pd.testing.assert_frame_equal(read(target), expected)
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before
    assert not list(target.glob(".*"))
    score_parquet(detector, source, tmp_path / "whole", keys=KEYS, progress=False)
    assert contents(target) == contents(tmp_path / "whole")


def test_killed_before_anything_was_written(detector, source, tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/._toll.json.0123.part").write_text("{")
    assert score_parquet(detector, source, tmp_path / "scores", keys=KEYS, progress=False).rows == ROWS
    assert not list((tmp_path / "scores").glob(".*"))


def test_a_full_disk_loses_nothing(detector, expected, tmp_path):
    target = tmp_path / "scores"
    small, big = FRAME[:100], pd.concat([FRAME] * 4)
    rows = tmp_path / "rows"
    rows.mkdir()
    for i, frame in enumerate((small, big, small)):
        frame.to_parquet(rows / f"{i}.parquet", index=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            score_parquet(detector, rows, target, keys=KEYS, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in target.iterdir()} == {"_toll.json", "part-000000.parquet"}
    found = score_parquet(detector, rows, target, keys=KEYS, progress=False)
    assert found == ScoredParquet(4 * ROWS + 200, 0, 3, 1)
    pd.testing.assert_frame_equal(
        read(target), pd.concat([expected[:100], *[expected] * 4, expected[:100]], ignore_index=True)
    )


def test_a_file_that_was_emptied_is_written_again(detector, source, expected, tmp_path):
    target = tmp_path / "scores"
    score_parquet(detector, source, target, keys=KEYS, progress=False)
    (target / "part-000003.parquet").write_bytes(b"")
    (target / "part-000005.parquet").unlink()
    assert score_parquet(detector, source, target, keys=KEYS, progress=False).resumed == FILES - 2
    pd.testing.assert_frame_equal(read(target), expected)


# -- what is refused -------------------------------------------------------------------------------


def test_a_target_that_is_not_ours(detector, source, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match=f"target must be new, .*{name}' holds something else"):
            score_parquet(detector, source, tmp_path / name, keys=KEYS)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "mine"
    assert contents(tmp_path / "folder") == {"file": b"mine"}


def test_a_target_of_another_call(detector, source, tmp_path):
    target = tmp_path / "scores"
    score_parquet(detector, source, target, keys=KEYS, progress=False)
    before = contents(target)
    other = TollDetector(**SMALL, random_state=1).fit(FRAME[NAMES])
    few = Parquet([source / "00.parquet"])
    for made, rows, arguments, what in (
        (other, source, {"keys": KEYS}, "detector"),
        (detector, Parquet(source, columns=NAMES), {"keys": ["id"]}, "keys"),
        (detector, source, {"keys": KEYS, "errors": "flag"}, "errors"),
        (detector, few, {"keys": KEYS}, "partitions"),
    ):
        with pytest.raises(FileExistsError, match=rf"was written with other \[.*'{what}'"):
            score_parquet(made, rows, target, progress=False, **arguments)
    assert contents(target) == before


def test_other_arguments(detector, source, tmp_path):
    with pytest.raises(ValueError, match=r"target must not hold the source, but .* has .*00.parquet"):
        score_parquet(detector, source, source, keys=KEYS)
    with pytest.raises(FileNotFoundError):
        score_parquet(detector, tmp_path / "none", tmp_path / "scores")
    with pytest.raises(ValueError, match=r"partition 0 .* has no column \['key'\]"):
        score_parquet(detector, source, tmp_path / "scores", keys=["key"])
    assert not (tmp_path / "scores").exists()
    with pytest.raises(ValueError, match=r"partition 0 .*: The feature names should match[\s\S]*- name"):
        score_parquet(detector, source, tmp_path / "scores", keys=["id"], progress=False)
    # A call that wrote nothing binds no other.
    assert score_parquet(detector, source, tmp_path / "scores", keys=KEYS, progress=False).rows == ROWS
    with pytest.raises(NotFittedError):
        score_parquet(TollDetector(), source, tmp_path / "scores")


# -- a cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        distributed.Client(cluster) as found,
    ):
        yield found


def test_two_workers_write_what_one_process_does(detector, source, client, tmp_path):
    found = score_parquet(detector, source, tmp_path / "two", keys=KEYS, client=client, progress=False)
    assert found == ScoredParquet(ROWS, 0, FILES, 0)
    score_parquet(detector, source, tmp_path / "one", keys=KEYS, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_error_of_a_worker_names_the_row(detector, client, tmp_path):
    frame = FRAME.copy()
    frame.loc[7, "b"] = np.nan
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    with pytest.raises(ValueError, match=r"^partition 0 .*: Input X contains NaN: row 7, column 1 \('b'"):
        score_parquet(detector, tmp_path / "rows.parquet", tmp_path / "new", keys=KEYS, client=client, progress=False)


def test_a_worker_with_other_versions(detector, source, client, tmp_path, monkeypatch):
    from toll_plugin.pyod.scale import writing

    ours = writing._versions()
    monkeypatch.setattr(writing, "_versions", lambda: ours | {"numpy": "1.0"})
    with pytest.raises(RuntimeError, match=rf"workers must have .*, got one with numpy {np.__version__} \(not 1.0\)"):
        score_parquet(detector, source, tmp_path / "scores", keys=KEYS, client=client, progress=False)


def test_a_lost_worker(detector, client, expected, tmp_path):
    frame = pd.concat([FRAME] * 5, ignore_index=True)
    rows = tmp_path / "rows"
    rows.mkdir()
    for i in range(FILES):
        frame.to_parquet(rows / f"{i:02d}.parquet", index=False)
    target, found = tmp_path / "scores", []
    arguments = {"keys": KEYS, "client": client, "progress": False}
    running = threading.Thread(target=lambda: found.append(score_parquet(detector, rows, target, **arguments)))
    processes = client.run(os.getpid)
    running.start()
    while written(target) < 2:
        time.sleep(0.001)
    os.kill(next(iter(processes.values())), signal.SIGKILL)
    running.join(60)
    assert found == [ScoredParquet(5 * ROWS * FILES, 0, FILES, 0)]
    whole = pd.concat([expected] * (5 * FILES), ignore_index=True)
    pd.testing.assert_frame_equal(read(target), whole)
    assert processes.keys() & client.run(os.getpid).keys()  # the other worker went on
