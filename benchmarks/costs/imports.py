"""What the plugin adds to `import torch` and to `import anomalib.models`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.run.store import RESULTS, finish, provenance
from benchmarks.run.tables import markdown

# torch's scan for entry points runs with or without plugins, so it is not counted.
_TORCH = """
import time, torch
from importlib.metadata import entry_points
(point,) = [p for p in entry_points(group="torch.backends") if p.name == "toll_plugin"]
start = time.perf_counter()
point.load()()
print(time.perf_counter() - start)
"""
_ANOMALIB = """
import time, anomalib.models
start = time.perf_counter()
import toll_plugin.anomalib
print(time.perf_counter() - start)
"""


def _milliseconds(code: str, repeats: int, uncounted: int) -> list[float]:
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code]

    def once() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603
        return 1000 * float(done.stdout)

    return [once() for _ in range(uncounted + repeats)][uncounted:]


def imports(repeats: int = 9, uncounted: int = 1, output: Path = RESULTS / "imports.json") -> None:
    """Time that registration adds, each in fresh processes.

    Args:
        repeats: Processes per measurement.
        uncounted: Processes before them, which find no file in the system's memory yet.
        output: Where the record goes.
    """
    record = {"command": "imports", **provenance(), "repeats": repeats}
    rows = []
    for name, code in (("import torch", _TORCH), ("import anomalib.models", _ANOMALIB)):
        times = _milliseconds(code, repeats, uncounted)
        shown = {"median, ms": statistics.median(times), "smallest": min(times), "largest": max(times)}
        rows.append({"added to": f"`{name}`", **{key: f"{value:.2f}" for key, value in shown.items()}})
    finish(output, {**record, "table": markdown(rows)})
