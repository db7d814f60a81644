"""One thread for a block: what is limited, what is put back, what it costs."""

from __future__ import annotations

import sys
import threading
import types

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


def test_blas_stays_limited_until_the_last_of_two_threads_is_through():
    before, entered, leave, seen = limits(), threading.Event(), threading.Event(), []

    def other():
        with threads.one_thread():
            entered.set()
            leave.wait(10)
            seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    thread = threading.Thread(target=other)
    with threads.one_thread():
        thread.start()
        assert entered.wait(10)
    leave.set()
    thread.join()
    assert set(seen) == {1}
    assert limits() == before


def test_an_error_in_the_block_puts_back_what_was():
    before, message = limits(), "here"
    with pytest.raises(RuntimeError, match=message), threads.one_thread():
        raise RuntimeError(message)
    assert limits() == before
