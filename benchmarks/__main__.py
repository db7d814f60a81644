"""``python -m benchmarks COMMAND``: every figure in the README comes from here."""

from __future__ import annotations

import re
import sys

from jsonargparse import auto_cli

from benchmarks.digits import digits
from benchmarks.imports import imports
from benchmarks.mixin import mixin
from benchmarks.overhead import overhead
from benchmarks.paper import paper
from benchmarks.readme import readme
from benchmarks.speed import speed
from benchmarks.stopping import stopping
from benchmarks.tables import tables


def main() -> None:
    """Run one command."""
    commands = {
        "digits": digits,
        "imports": imports,
        "mixin": mixin,
        "overhead": overhead,
        "paper": paper,
        "readme": readme,
        "speed": speed,
        "stopping": stopping,
        "tables": tables,
    }
    # Both --batch-size and --batch_size.
    arguments = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in sys.argv[1:]]
    auto_cli(commands, args=arguments, prog="python -m benchmarks")


if __name__ == "__main__":
    main()
