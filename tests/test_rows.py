"""Tables of rows: the cache that moves to a file, and subsets."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from toll_plugin.core.rows import RowCache, RowSubset

# --- RowCache


def _filled(limit: float, folder=None, *, width: int = 3) -> tuple[RowCache, np.ndarray]:
    cache, rows = (
        RowCache(width, limit=limit, folder=folder),
        np.arange(20 * width, dtype=np.float32).reshape(-1, width),
    )
    for start, end in ((0, 1), (1, 8), (8, 8), (8, 15), (15, 20)):
        cache.append(torch.from_numpy(rows[start:end]))
    return cache, rows


INDICES = [slice(None), slice(3, 9), slice(18, 99), slice(4, 4), slice(None, None, 7), torch.tensor([19, 0, 0, 7])]
INDICES += [torch.arange(20)[None, :5].flatten(), torch.empty(0, dtype=torch.int64), torch.arange(20) % 3 == 0]


# All in memory, all in the file, and a file from the third piece on.
@pytest.mark.parametrize("limit", [1e9, 0, 12 * 10])
def test_a_cache_gives_its_rows(limit):
    cache, rows = _filled(limit)
    assert len(cache) == 20
    assert cache.in_memory == (limit == 1e9)
    np.testing.assert_array_equal(cache[slice(None)].numpy(), rows)
    for index in INDICES:
        found = cache[index]
        expected = rows[index if isinstance(index, slice) else index.numpy()]
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected)
        found.fill_(-1)  # a copy: what is read can be written to and changes nothing
    np.testing.assert_array_equal(cache[slice(None)].numpy(), rows)


def test_the_limit_is_one_of_bytes():
    cache = RowCache(3, limit=24)
    cache.append(torch.ones(2, 3))  # two rows of three values of four bytes
    assert cache.in_memory
    cache.append(torch.full((1, 3), 2.0))
    assert not cache.in_memory
    assert cache[slice(None)].tolist() == [[1.0] * 3, [1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("limit", [1e9, 0, 12 * 10])
def test_rows_may_be_added_after_reading(limit):
    cache, rows = _filled(limit)
    for _ in range(2):
        before = cache[slice(None)].numpy()
        cache.append(torch.full((6, 3), -1.0))
        rows = np.concatenate([rows, np.full((6, 3), -1, np.float32)])
        np.testing.assert_array_equal(cache[slice(None)].numpy(), rows)
        np.testing.assert_array_equal(before, rows[:-6])  # what was given out does not change


@pytest.mark.parametrize("limit", [1e9, 0])
def test_the_rows_are_not_the_callers(limit):
    cache, given = RowCache(2, limit=limit), torch.ones(3, 2)
    cache.append(given)
    given.fill_(5)
    assert cache[slice(None)].tolist() == [[1.0, 1.0]] * 3


def test_rows_of_any_layout_and_precision():
    cache, expected = RowCache(2), []
    features = torch.arange(12.0).view(1, 2, 2, 3)
    for dtype in (torch.float16, torch.float64, torch.int64):
        strided = features.permute(0, 2, 3, 1).reshape(-1, 2).T.contiguous().T.to(dtype)
        assert not strided.is_contiguous()
        cache.append(strided)
        expected += [[float(p), float(p + 6)] for p in range(6)]
    cache.append(torch.ones(1, 2, requires_grad=True))
    assert cache[slice(None)].tolist() == [*expected, [1.0, 1.0]]


def test_an_empty_cache():
    for limit in (0, 100):
        cache = RowCache(3, limit=limit)
        assert len(cache) == 0
        assert cache[slice(None)].shape == (0, 3)
        cache.append(torch.empty(0, 3))
        assert cache[torch.empty(0, dtype=torch.int64)].shape == (0, 3)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed by Linux alone")
def test_the_file_is_gone_with_the_cache(tmp_path):
    def held() -> list[str]:
        # The listing's own descriptor is closed by now, so its link leads nowhere and is left out.
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [name for link in links if (name := str(link.readlink())).startswith(str(tmp_path))]

    cache, rows = _filled(0, tmp_path)
    assert list(tmp_path.iterdir()) == []  # without a name, so that a killed process leaves nothing behind
    assert len(held()) >= 1
    np.testing.assert_array_equal(cache[slice(None)].numpy(), rows)
    del cache
    gc.collect()
    assert held() == []


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, 4),
        torch.zeros(3),
        torch.zeros(1, 2, 3),
        torch.tensor([[0.0, math.nan, 0.0]]),
        torch.tensor([[0.0, math.inf, 0.0]]),
        torch.tensor([[0.0, 1e300, 0.0]], dtype=torch.float64),  # finite until it is kept in single precision
    ],
)
def test_bad_rows_are_refused_and_leave_the_cache_as_it_was(rows):
    cache, kept = _filled(1e9)
    with pytest.raises(ValueError, match=r"rows must (be finite|have shape \(N, 3\))"):
        cache.append(rows)
    np.testing.assert_array_equal(cache[slice(None)].numpy(), kept)


def test_bad_arguments_of_a_cache(tmp_path):
    with pytest.raises(ValueError, match=r"limit must be finite and >= 0, got -1"):
        RowCache(3, limit=-1)
    with pytest.raises(TypeError, match=r"limit must be a real number"):
        RowCache(3, limit="1 GiB")
    with pytest.raises(ValueError, match=r"folder must be an existing folder, got .*none"):
        RowCache(3, folder=tmp_path / "none")


@pytest.mark.parametrize("limit", [1e9, 0])
def test_a_subset_is_indexed_by_its_own_positions(limit):
    cache, rows = _filled(limit)
    chosen = torch.tensor([7, 7, 2, 19])
    subset = RowSubset(cache, chosen)
    assert len(subset) == 4
    np.testing.assert_array_equal(subset[slice(1, 3)].numpy(), rows[[7, 2]])
    np.testing.assert_array_equal(subset[torch.tensor([3, 0])].numpy(), rows[[19, 7]])
    np.testing.assert_array_equal(RowSubset(subset, torch.tensor([2]))[slice(None)].numpy(), rows[[2]])
    assert subset[slice(0, 0)].shape == (0, 3)


class _Table:
    """Rows that remember by which index they were fetched."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.fetched = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        self.fetched.append(index)
        return self.rows[index]


def test_a_subset_of_a_subset_fetches_from_the_table_itself():
    table = _Table(torch.arange(10.0)[:, None])
    odd = RowSubset(table, torch.arange(1, 10, 2))
    subset = RowSubset(RowSubset(odd, torch.tensor([4, 0, 2])), torch.tensor([2, 2, 0]))
    del odd
    assert subset._rows is table
    assert len(subset) == 3
    assert subset[torch.tensor([0, 2])].tolist() == [[5.0], [9.0]]
    assert [index.tolist() for index in table.fetched] == [[5, 9]]


def test_rows_are_prepared_when_they_are_fetched_and_by_each_subset_in_turn():
    calls = []
    doubled = RowSubset(
        torch.arange(6.0)[:, None], torch.tensor([5, 3, 1]), lambda rows: calls.append(len(rows)) or 2 * rows
    )
    assert calls == []
    assert doubled[slice(0, 2)].tolist() == [[10.0], [6.0]]
    assert calls == [2]
    negated = RowSubset(doubled, torch.tensor([2, 0]), torch.neg)
    assert negated[slice(None)].tolist() == [[-2.0], [-10.0]]
