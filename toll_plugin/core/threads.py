"""How many threads a computation may use."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from threadpoolctl import threadpool_limits

__all__ = ["Overlapping", "fork_safe", "one_thread", "this_thread"]

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
        self._entered = 0
        self._stack = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The setting, for a block."""
        with self._lock:
            if not self._entered:
                self._stack.enter_context(self._setting())
            self._entered += 1
        try:
            yield
        finally:
            with self._lock:
                self._entered -= 1
                if not self._entered:
                    self._stack.close()


_one_blas_thread = Overlapping(lambda: threadpool_limits(limits=1, user_api="blas"))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the block, in the calling thread's OpenMP regions and in BLAS.

    Sums depend on how they are split, so with one thread a fit gives the same weights on any
    number of cores; on small networks more threads gain nothing. BLAS's limit holds for the
    whole process.
    """
    with threadpool_limits(limits=1, user_api="openmp"), _one_blas_thread():
        yield


def fork_safe() -> AbstractContextManager[object]:
    """:func:`one_thread` in a forked process, where OpenMP would wait for threads that were not forked."""
    return nullcontext() if os.getpid() == _PROCESS else one_thread()


def this_thread() -> int:
    """A number that no other running thread has; 0 in code that is being compiled, which cannot ask."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
