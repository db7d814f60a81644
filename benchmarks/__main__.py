"""``python -m benchmarks COMMAND``: every figure in the README comes from here."""

from __future__ import annotations

import re
import sys

from jsonargparse import auto_cli

from benchmarks.deployment import deployment
from benchmarks.experiment import list_, run, with_experiment
from benchmarks.imports import imports
from benchmarks.linear import linear
from benchmarks.mixin import mixin
from benchmarks.overhead import overhead
from benchmarks.paper import paper
from benchmarks.readme import readme
from benchmarks.report import report
from benchmarks.speed import speed
from benchmarks.stopping import stopping


def main() -> None:
    """Run one command."""
    commands = {
        "run": run,
        "list": list_,
        "report": report,
        "deployment": deployment,
        "imports": imports,
        "linear": linear,
        "mixin": mixin,
        "overhead": overhead,
        "paper": paper,
        "readme": readme,
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
