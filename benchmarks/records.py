"""What a result carries, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("toll-plugin", "anomalib", "lightning", "torch", "torchvision", "pyod", "scikit-learn", "numpy")


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
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def run_all(function: Callable[..., Any], calls: list[tuple[Any, ...]], jobs: int, what: str, unit: str) -> list[Any]:
    """What ``function`` returns for each of ``calls``, in their order, in ``jobs`` processes, with a bar."""
    from joblib import Parallel, delayed
    from tqdm import tqdm

    work = Parallel(jobs, return_as="generator")(delayed(function)(*call) for call in calls)
    return list(tqdm(work, total=len(calls), desc=what, unit=unit))


def mean_and_error(gaps: list[float]) -> str:
    """Mean of paired differences and its standard error."""
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return f"{statistics.mean(gaps):+.4f} ± {error:.4f}"


def finish(path: Path, record: dict[str, Any]) -> None:
    """Print a record's table and write it as JSON; an interrupted run leaves the earlier file."""
    print(record["table"])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
