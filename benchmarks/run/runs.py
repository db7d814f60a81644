"""Finished runs in a folder: what is there is not run again, so that a killed command continues."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.run.records import as_they_finish, provenance, whole, write_json

Configuration = dict[str, Any]


class Runs:
    """One JSON file per run, named by its label and a digest of its whole configuration.

    Args:
        folder: Where they are kept. Weights lie beside a run's file, as ``.pt``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, label: str, configuration: Configuration) -> Path:
        """Where a run is kept, finished or not."""
        digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:10]
        return self.folder / f"{label}_{digest}.json"

    def find(self, label: str, configuration: Configuration) -> dict[str, Any] | None:
        """The record of a run that has finished; ``None`` if there is none, it failed or its weights are gone."""
        path = self.path(label, configuration)
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            msg = f"{path} is no record: {error}; delete it to run it again"
            raise ValueError(msg) from error
        lost = record.get("weights") and not path.with_suffix(".pt").is_file()
        return None if "error" in record or lost else record

    def weights(self, label: str, configuration: Configuration) -> Any:
        """The weights kept with a finished run, on the CPU."""
        import torch

        path = self.path(label, configuration).with_suffix(".pt")
        return torch.load(path, map_location="cpu", weights_only=True)

    def keep(
        self, label: str, configuration: Configuration, result: dict[str, Any], weights: Any = None
    ) -> dict[str, Any]:
        """Keep a run and return its record, which comes last, so that where it is, the weights are."""
        path = self.path(label, configuration)
        if weights is not None:
            import torch

            with whole(path.with_suffix(".pt")) as part:
                torch.save(weights, part)
        record = {"configuration": configuration, "weights": weights is not None, **result}
        write_json(path, record)
        return record


class Progress:
    """How far a run is, told every second through a file that the command reads.

    Args:
        path: The file; :func:`run_missing` looks for it beside the run's own, with this suffix.
        total: Steps of the run.
    """

    suffix = ".progress"

    def __init__(self, path: Path, total: int) -> None:
        self._path, self._total, self._count, self._told = path, total, 0, time.monotonic()

    def __call__(self) -> None:
        """Count a step."""
        self._count += 1
        if time.monotonic() - self._told >= 1:
            self._told = time.monotonic()
            with contextlib.suppress(OSError):  # a worker elsewhere may not have the folder
                self._path.write_text(f"{self._count / self._total:.4f}")

    @staticmethod
    def read(path: Path) -> float:
        """The share that is done, 0 where nothing is known."""
        try:
            return float(path.read_text())
        except (OSError, ValueError):  # none, or half written
            return 0.0


def check_jobs(jobs: int) -> None:
    """Refuse what joblib gives no meaning.

    Raises:
        ValueError: If ``jobs`` is 0.
    """
    if jobs == 0:
        msg = "jobs must not be 0; -1 is one for each core"
        raise ValueError(msg)


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
    told = {i: runs.path(*calls[i][:2]).with_suffix(Progress.suffix) for i in missing}
    for path in told.values():
        path.unlink(missing_ok=True)  # of a command that was killed
    work = as_they_finish(
        _attempt,
        [(function, calls[i][2]) for i in missing],
        jobs,
        what,
        "run",
        lambda: sum(map(Progress.read, list(told.values()))),
    )
    for position, (result, weights) in work:
        i = missing[position]
        label, configuration, _ = calls[i]
        found[i] = runs.keep(label, configuration, result, weights)
        told.pop(i).unlink(missing_ok=True)
    return [record for record in found if record is not None]


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    begun = {"provenance": provenance()}  # of the process that works, which may be on another machine
    try:
        result, weights = function(*arguments)
        json.dumps(result, allow_nan=False)  # what cannot be written must fail here, as one run
    except Exception as error:  # noqa: BLE001  one failure must not lose the other runs
        return begun | {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}, None
    return begun | result, weights
