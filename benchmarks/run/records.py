"""What a result carries, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = (
    "toll-plugin",
    "anomalib",
    "lightning",
    "torch",
    "torchvision",
    "timm",
    "pyod",
    "scikit-learn",
    "scipy",
    "numpy",
)


def provenance() -> dict[str, Any]:
    """Versions, machine and commit; ask for it before the work, which may outlast an edit."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)  # noqa: S603
        return done.stdout.strip()

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "machine": _machine(),
        "cores": os.cpu_count(),
        "packages": {name: number for name in PACKAGES if (number := _version(name))},
    }


def _machine() -> str:
    """The processor's name where the system tells it."""
    with suppress(OSError), Path("/proc/cpuinfo").open() as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_all(function: Callable[..., Any], calls: list[tuple[Any, ...]], jobs: int, what: str, unit: str) -> list[Any]:
    """What ``function`` returns for each of ``calls``, in their order, in ``jobs`` processes, with a bar."""
    found = dict(as_they_finish(function, calls, jobs, what, unit))
    return [found[i] for i in range(len(calls))]


def as_they_finish(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    jobs: int,
    what: str,
    unit: str,
    under_way: Callable[[], float] = lambda: 0.0,
) -> Iterator[tuple[int, Any]]:
    """Position and result of each of ``calls``, the first to finish first, on joblib's backend of the moment.

    The bar counts ``under_way``, how many calls' worth of work the unfinished ones have done, so that
    the time left is known before the first is finished.
    """
    from joblib import Parallel, delayed
    from tqdm import tqdm

    calls = list(calls)
    work = Parallel(jobs, return_as="generator_unordered")(
        delayed(_numbered)(function, i, call) for i, call in enumerate(calls)
    )
    done, over = 0, threading.Event()
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}]"
    with tqdm(total=len(calls), desc=what, unit=unit, smoothing=0, bar_format=shape) as bar:

        def show() -> None:
            while not over.wait(1):
                n = done + min(under_way(), len(calls) - done)
                if n != bar.n:
                    bar.n = n
                    bar.refresh()

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            for found in work:
                done += 1
                yield found
        finally:
            over.set()
            thread.join()
            bar.n = done


def _numbered(function: Callable[..., Any], i: int, call: tuple[Any, ...]) -> tuple[int, Any]:
    return i, function(*call)


@contextmanager
def cluster(scheduler: str | None) -> Iterator[None]:
    """joblib's own processes, or the workers of the Dask scheduler at an address."""
    if scheduler is None:
        yield
        return
    from dask.distributed import Client
    from joblib import parallel_config

    with Client(scheduler), parallel_config(backend="dask", wait_for_workers_timeout=60):
        yield


def mean_and_error(gaps: list[float]) -> str:
    """Mean of paired differences and its standard error."""
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return f"{statistics.mean(gaps):+.4f} ± {error:.4f}"


def finish(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON and print its table; an interrupted run leaves the earlier file."""
    write_json(path, record)
    print(record["table"])


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write whole or not at all; a record's runs take a line each."""
    runs = record.get("runs")
    if isinstance(runs, list) and runs:
        lines = ",\n  ".join(json.dumps(run, allow_nan=False) for run in runs)
        head = json.dumps({**record, "runs": None}, indent=1, allow_nan=False)
        before, after = head.rsplit('"runs": null', 1)
        text = f'{before}"runs": [\n  {lines}\n ]{after}'
    else:
        text = json.dumps(record, indent=1, allow_nan=False)
    with whole(path) as part:
        part.write_text(text + "\n")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` at the end; an interrupted write leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two commands may write the same file
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
