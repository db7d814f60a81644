"""How many threads a computation may use."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from threadpoolctl import OpenBLASController, ThreadpoolController

__all__ = ["Overlapping", "fork_safe", "is_this_thread", "one_blas_thread", "one_thread", "this_thread"]

_PROCESS = os.getpid()


class Overlapping:
    """A setting of the whole process, for blocks that may overlap in several threads.

    The first block to begin makes it; the last to end undoes it, whichever that is.

    Args:
        setting: Makes the context manager that sets and unsets it.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[object]]) -> None:
        self._setting = setting
        self._lock = threading.Lock()
        self._threads: list[int] = []
        self._stack = ExitStack()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """Forget the other threads, which were not forked, and what they had locked."""
        self._lock = threading.Lock()
        self._threads = [thread for thread in self._threads if thread == this_thread()]
        if not self._threads:
            self._stack.close()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The setting, for a block."""
        thread = this_thread()
        with self._lock:
            if not self._threads:
                self._stack.enter_context(self._setting())
            self._threads.append(thread)
        try:
            yield
        finally:
            with self._lock:
                self._threads.remove(thread)
                if not self._threads:
                    self._stack.close()


_known: tuple[int, ThreadpoolController] | None = None


def _controller() -> ThreadpoolController:
    """The libraries that have threads of their own, looked for anew only where something was imported since.

    Looking for them takes 10 ms, which is more than scoring a row does.
    """
    global _known  # noqa: PLW0603
    modules = len(sys.modules)
    if _known is None or _known[0] != modules:
        _known = modules, ThreadpoolController()
    return _known[1]


def _limit_of(api: str) -> Any:
    # Selected first: a limit that ends puts back the threads of all libraries of its controller.
    return _controller().select(user_api=api).limit(limits=1)


@contextmanager
def _limited_blas() -> Iterator[None]:
    limit = _limit_of("blas")
    try:
        yield
    finally:
        # From 3.8 on, threadpoolctl lets only the thread that set OpenBLAS's limit put it back; here that is
        # whichever thread ends last.
        let_go = getattr(OpenBLASController, "clear_controlling_thread", lambda **_: None)
        let_go(force=True)
        limit.restore_original_limits()
        let_go(force=True)


#: One thread for the block in BLAS, in the whole process.
one_blas_thread = Overlapping(_limited_blas)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the block, in the calling thread's OpenMP regions and in BLAS.

    Sums depend on how they are split, so with one thread a fit gives the same weights on any
    number of cores; on small networks more threads gain nothing. BLAS's limit holds for the
    whole process.
    """
    with _limit_of("openmp"), one_blas_thread():
        yield


def fork_safe() -> AbstractContextManager[object]:
    """:func:`one_thread` in a forked process, where OpenMP would wait for threads that were not forked."""
    return nullcontext() if os.getpid() == _PROCESS else one_thread()


def this_thread() -> int:
    """A number that no other running thread has; 0 in code that is being compiled, which cannot ask."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def is_this_thread(thread: int) -> bool:
    """Whether ``thread`` is what :func:`this_thread` gave here, or compiled code is in the way of knowing."""
    here = this_thread()
    return here == thread or not here or not thread
