"""How many threads a computation may use."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from threadpoolctl import threadpool_limits

__all__ = ["fork_safe", "one_thread"]

_PROCESS = os.getpid()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the block, in the calling thread's OpenMP regions and in BLAS.

    Sums depend on how they are split, so with one thread a fit gives the same weights on any
    number of cores; on small networks more threads gain nothing. BLAS's limit holds for the
    whole process: of blocks that overlap, the last to end puts back what the first one found.
    """
    with threadpool_limits(limits=1, user_api="openmp"):
        with _lock:
            if not _entered:
                _limits.append(threadpool_limits(limits=1, user_api="blas"))
            _entered.append(None)
        try:
            yield
        finally:
            with _lock:
                _entered.pop()
                if not _entered:
                    _limits.pop().restore_original_limits()


_lock = threading.Lock()
_entered: list[None] = []
_limits: list[Any] = []


def fork_safe() -> AbstractContextManager[object]:
    """:func:`one_thread` in a forked process, where OpenMP would wait for threads that were not forked."""
    return nullcontext() if os.getpid() == _PROCESS else one_thread()
