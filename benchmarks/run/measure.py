"""Time and memory that calls and blocks take."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def median_seconds(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turns, after one run of each that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if repeat:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


@contextmanager
def peak_memory(*, files: bool = True) -> Iterator[list[float]]:
    """The first entry becomes the largest resident memory of the block over that at its start, in MB.

    A lower bound: memory that the process had freed but not given back is used first. Without ``files``, pages of
    files that are mapped, which the system takes back where it needs them, do not count.
    """
    import psutil

    gc.collect()
    process = psutil.Process()

    def resident() -> int:
        now = process.memory_info()
        return int(now.rss if files else now.rss - now.shared)

    before = resident()
    found, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            found[0] = max(found[0], (resident() - before) / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found[0] = max(found[0], (resident() - before) / 1e6)


def in_new_process(module: str, *arguments: object) -> Any:
    """What the last line that ``python -m module`` prints says in JSON.

    Memory is measured there: this process would use again what it had freed.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603  this interpreter
    return json.loads(done.stdout.splitlines()[-1])
