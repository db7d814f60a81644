"""Runs of an experiment in one file: written without what they share, and read back whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.report.comparison import Run
from benchmarks.run.records import RESULTS

#: What tells a run from the others.
CONFIGURATION = ("label", "method", "kind", "dataset", "part", "protocol", "seed")

#: Of :func:`benchmarks.run.records.provenance`.
_SHARED = ("date", "commit", "dirty", "python", "machine", "cores", "packages")


class Experiment(NamedTuple):
    """What a record holds."""

    name: str
    about: str
    runs: list[Run]


def lean(runs: Sequence[Run], shared: Mapping[str, Any]) -> list[Run]:
    """Runs without the provenance that a record states once, and without where on a machine an error was raised."""
    return [
        {name: value for name, value in run.items() if name not in ("traceback", "weights")}
        | {"provenance": {name: value for name, value in run["provenance"].items() if shared.get(name) != value}}
        for run in runs
    ]


def collected() -> list[Path]:
    """The collected records of ``run`` in benchmarks/results, studies last."""
    found = [*sorted(RESULTS.glob("*.json")), *sorted(RESULTS.glob("studies/*.json"))]
    return [path for path in found if _json(path).get("command") == "run"]


def read(path: Path) -> Experiment:
    """The experiment of a collected record, or of a folder of single runs.

    Raises:
        ValueError: If it is none.
        FileNotFoundError: If it is not there.
    """
    if path.is_dir():
        experiment = Experiment(path.name, "", [_run(_json(file), file) for file in sorted(path.glob("*.json"))])
    else:
        record = _json(path)
        if not isinstance(record, dict) or not isinstance(record.get("runs"), list):
            msg = f"{path} is no record of run: it has no list of runs"
            raise ValueError(msg)
        about = record.get("experiment") or {}
        shared = {name: record[name] for name in _SHARED if name in record}
        runs = [_run(run, path, shared) for run in record["runs"]]
        experiment = Experiment(str(about.get("name", path.stem)), str(about.get("about", "")), runs)
    if not experiment.runs:
        msg = f"{path} holds no runs"
        raise ValueError(msg)
    return experiment


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is no record of run: {error}"
        raise ValueError(msg) from error


def _run(run: Any, path: Path, shared: Mapping[str, Any] = MappingProxyType({})) -> Run:
    configuration = run.get("configuration") if isinstance(run, dict) else None
    given = configuration if isinstance(configuration, dict) else {}
    lacks = [name for name in CONFIGURATION if name not in given]
    if not lacks and "error" not in run and "auroc" not in (run.get("metrics") or {}):
        lacks = ["metrics or an error"]
    if lacks:
        msg = f"{path} is no record of run: a run lacks {', '.join(lacks)}"
        raise ValueError(msg)
    return run | {"provenance": shared | (run.get("provenance") or {})}
