"""Records: what was measured, as JSON with its provenance, written whole or not at all.

A finished run is a file of its own, named by a digest of its configuration (:class:`Runs`). What a command
hands on is one file with all of its runs (:func:`finish`), which :func:`read` reads back.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

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

#: What tells a run of an experiment from the others.
CONFIGURATION = ("label", "method", "kind", "dataset", "part", "protocol", "seed")

Configuration = dict[str, Any]
#: What was measured in one run, with its configuration and provenance.
Run = dict[str, Any]


# --- provenance


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


#: The entries of :func:`provenance`, which a record of many runs states once.
_SHARED = ("date", "commit", "dirty", "python", "machine", "cores", "packages")


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


# --- writing


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


def write(path: Path, record: Mapping[str, Any]) -> None:
    """A record as JSON; its runs take a line each, so that a changed run is a changed line."""
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


def finish(path: Path, record: Mapping[str, Any]) -> None:
    """Write a command's record and print its table."""
    write(path, record)
    print(record["table"])


# --- finished runs, a file each


class Runs:
    """Finished runs in a folder, so that a killed command continues: one file each.

    A file is named by the run's label and a digest of its whole configuration.

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
        """The record of a run that has finished; ``None`` if there is none, it failed or its weights are gone.

        Raises:
            ValueError: If the file is broken.
        """
        path = self.path(label, configuration)
        if not path.is_file():
            return None
        record: dict[str, Any] = _json(path, "; delete it to run it again")
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
        """Keep a run and return its record, which is written last, so that where it is, the weights are."""
        path = self.path(label, configuration)
        if weights is not None:
            import torch

            with whole(path.with_suffix(".pt")) as part:
                torch.save(weights, part)
        record = {"configuration": configuration, "weights": weights is not None, **result}
        write(path, record)
        return record


# --- all runs of an experiment in one file


class Experiment(NamedTuple):
    """What a record of ``run`` holds."""

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
    """The records of ``run`` in benchmarks/results, studies last."""
    found = [*sorted(RESULTS.glob("*.json")), *sorted(RESULTS.glob("studies/*.json"))]
    return [path for path in found if _json(path).get("command") == "run"]


def read(path: Path) -> Experiment:
    """The experiment of a record of ``run``, or of a folder of single runs; what :func:`lean` took out is back.

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


def _json(path: Path, remedy: str = "") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is no record of run: {error}{remedy}"
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
