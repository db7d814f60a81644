"""``python -m benchmarks COMMAND``: every figure in the README comes from here."""

from __future__ import annotations

import re
import sys

from jsonargparse import auto_cli

from benchmarks.costs.deployment import deployment
from benchmarks.costs.growth import growth
from benchmarks.costs.imports import imports
from benchmarks.costs.overhead import overhead
from benchmarks.costs.scale import scale
from benchmarks.costs.speed import speed
from benchmarks.report.readme import readme
from benchmarks.report.report import report
from benchmarks.run.experiment import list_, run, with_experiment
from benchmarks.studies.collapse import collapse
from benchmarks.studies.linear import linear
from benchmarks.studies.mixin import mixin
from benchmarks.studies.paper import paper
from benchmarks.studies.rays import rays
from benchmarks.studies.stopping import stopping


def main() -> None:
    """Run one command."""
    commands = {
        "run": run,
        "list": list_,
        "report": report,
        "deployment": deployment,
        "growth": growth,
        "imports": imports,
        "linear": linear,
        "mixin": mixin,
        "overhead": overhead,
        "paper": paper,
        "rays": rays,
        "collapse": collapse,
        "readme": readme,
        "scale": scale,
        "speed": speed,
        "stopping": stopping,
    }
    # Both --batch-size and --batch_size.
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in sys.argv[1:]]
    try:
        words = with_experiment(words)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    auto_cli(commands, args=words, prog="python -m benchmarks")


if __name__ == "__main__":
    main()
