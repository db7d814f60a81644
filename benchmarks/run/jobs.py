"""Several runs at a time: in joblib's processes or on the workers of a Dask cluster, with one bar."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.run.store import Configuration, Runs, provenance


def check_jobs(jobs: int) -> None:
    """Refuse what joblib gives no meaning.

    Raises:
        ValueError: If ``jobs`` is 0.
    """
    if jobs == 0:
        msg = "jobs must not be 0; -1 is one for each core"
        raise ValueError(msg)


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


def as_they_finish(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int, what: str
) -> Iterator[tuple[int, Any]]:
    """Position and result of each of ``calls``, the first to finish first; a bar counts them.

    Args:
        function: Called with each of ``calls`` as its arguments.
        calls: The arguments.
        jobs: How many at a time, in joblib's sense.
        what: Named by the bar.
    """
    from joblib import Parallel, delayed, effective_n_jobs
    from tqdm import tqdm

    work = Parallel(jobs, return_as="generator_unordered")(
        delayed(_numbered)(function, i, call) for i, call in enumerate(calls)
    )
    at_once = effective_n_jobs(jobs)
    with tqdm(total=len(calls), desc=what, unit="run", smoothing=0) as bar:
        bar.set_postfix_str(f"{min(at_once, len(calls))} under way")
        for found in work:
            bar.set_postfix_str(f"{min(at_once, len(calls) - bar.n - 1)} under way", refresh=False)
            bar.update()
            yield found


def _numbered(function: Callable[..., Any], i: int, call: tuple[Any, ...]) -> tuple[int, Any]:
    return i, function(*call)


def run_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int, what: str) -> list[Any]:
    """What ``function`` returns for each of ``calls``, in their order."""
    found = dict(as_they_finish(function, calls, jobs, what))
    return [found[i] for i in range(len(calls))]


def run_missing(
    runs: Runs,
    function: Callable[..., tuple[dict[str, Any], Any]],
    calls: Sequence[tuple[str, Configuration, tuple[Any, ...]]],
    jobs: int,
    what: str,
) -> list[dict[str, Any]]:
    """Records of all runs, in order; those that are kept already are not run again.

    A run that raises is kept as failed, with its error, and is tried again by the next command.

    Args:
        runs: Where they are kept.
        function: Returns a result and the weights to keep (or ``None``).
        calls: Label, configuration and arguments of each run.
        jobs: How many at a time, in joblib's sense.
        what: Named by the bar.
    """
    found = [runs.find(label, configuration) for label, configuration, _ in calls]
    missing = [i for i, record in enumerate(found) if record is None]
    if len(missing) < len(calls):
        print(f"{len(calls) - len(missing)} of {len(calls)} runs are in {runs.folder} already")
    work = as_they_finish(_attempt, [(function, calls[i][2]) for i in missing], jobs, what)
    for position, (result, weights) in work:
        i = missing[position]
        label, configuration, _ = calls[i]
        found[i] = runs.keep(label, configuration, result, weights)
    return [record for record in found if record is not None]


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    begun = {"provenance": provenance()}  # of the process that works, which may be on another machine
    try:
        result, weights = function(*arguments)
        json.dumps(result, allow_nan=False)  # what cannot be written must fail here, as one run
    except Exception as error:  # noqa: BLE001  one failure must not lose the other runs
        return begun | {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}, None
    return begun | result, weights
