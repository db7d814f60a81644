"""How many threads a computation may use."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

from threadpoolctl import threadpool_limits

__all__ = ["fork_safe", "one_thread"]

_PROCESS = os.getpid()


def one_thread() -> AbstractContextManager[object]:
    """One thread for the block, in the calling thread's OpenMP regions and in BLAS; put back after it.

    Sums of single precision depend on how they are split, so with one thread a fit gives the
    same weights on any number of cores; on small networks more threads gain nothing.
    """
    limits: AbstractContextManager[object] = threadpool_limits(limits=1)
    return limits


def fork_safe() -> AbstractContextManager[object]:
    """:func:`one_thread` in a forked process, where OpenMP would wait for threads that were not forked."""
    return nullcontext() if os.getpid() == _PROCESS else one_thread()
