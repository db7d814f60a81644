"""Finished runs in a folder: what is there is not run again, so that a killed command continues."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import as_they_finish, provenance, write_json

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
        """The record of a run that has finished; ``None`` if there is none, or it failed."""
        path = self.path(label, configuration)
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            msg = f"{path} is no record: {error}; delete it to run it again"
            raise ValueError(msg) from error
        return None if "error" in record else record

    def weights(self, label: str, configuration: Configuration) -> Any:
        """The weights kept with a run, on the CPU.

        Raises:
            FileNotFoundError: If there are none.
        """
        import torch

        path = self.path(label, configuration).with_suffix(".pt")
        if not path.is_file():
            msg = f"no weights {path}: run without mode=eval first"
            raise FileNotFoundError(msg)
        return torch.load(path, map_location="cpu", weights_only=True)

    def keep(self, label: str, configuration: Configuration, record: dict[str, Any], weights: Any = None) -> None:
        """Keep a run; the record comes last, so that where it is, the weights are."""
        path = self.path(label, configuration)
        if weights is not None:
            import torch

            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            torch.save(weights, part)
            part.replace(path.with_suffix(".pt"))
        write_json(path, record)


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
    begun = provenance()
    work = as_they_finish(_attempt, [(function, calls[i][2]) for i in missing], jobs, what, "run")
    for position, (result, weights) in work:
        i = missing[position]
        label, configuration, _ = calls[i]
        found[i] = {"configuration": configuration, "provenance": begun, **result}
        runs.keep(label, configuration, found[i], weights)
    return [record for record in found if record is not None]


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001  one failure must not lose the other runs
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}, None
