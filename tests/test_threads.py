"""One thread for a block: what is limited, what is put back, what it costs."""

from __future__ import annotations

import sys
import types
from contextlib import ExitStack

import pytest
from threadpoolctl import ThreadpoolController, threadpool_info

from toll_plugin.core import threads


def limits() -> list[tuple[str, int]]:
    return sorted((pool["filepath"], pool["num_threads"]) for pool in threadpool_info())


def test_one_thread_in_the_block_and_as_many_as_before_after_it():
    before = limits()
    with threads.one_thread(), threads.one_thread():
        assert {count for _, count in limits()} == {1}
    assert limits() == before


def test_libraries_are_looked_for_once(monkeypatch):
    looked = []

    def counting():
        looked.append(1)
        return ThreadpoolController()

    monkeypatch.setattr(threads, "ThreadpoolController", counting)
    monkeypatch.setattr(threads, "_known", None)
    for _ in range(20):
        with threads.one_thread():
            pass
    assert len(looked) == 1
    monkeypatch.setitem(sys.modules, "a_module_that_may_bring_a_library", types.ModuleType("a"))
    with threads.one_thread():
        pass
    assert len(looked) == 2


def test_the_limit_ends_with_the_last_of_two_overlapping_blocks():
    before = limits()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(threads.one_thread())
        second.enter_context(threads.one_thread())
        first.close()
        blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        assert set(blas) == {1}
        second.close()
        assert limits() == before


def test_an_error_in_the_block_puts_back_what_was():
    before, message = limits(), "here"
    with pytest.raises(RuntimeError, match=message), threads.one_thread():
        raise RuntimeError(message)
    assert limits() == before
