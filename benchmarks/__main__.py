"""``python -m benchmarks COMMAND``: every figure in the README comes from here."""

from __future__ import annotations

from jsonargparse import auto_cli

from benchmarks.arrhythmia import arrhythmia
from benchmarks.digits import digits
from benchmarks.imports import imports
from benchmarks.mixin import mixin
from benchmarks.overhead import overhead
from benchmarks.readme import readme
from benchmarks.speed import speed
from benchmarks.tables import tables


def main() -> None:
    """Run one command."""
    commands = {
        "arrhythmia": arrhythmia,
        "digits": digits,
        "imports": imports,
        "mixin": mixin,
        "overhead": overhead,
        "readme": readme,
        "speed": speed,
        "tables": tables,
    }
    auto_cli(commands, prog="python -m benchmarks")


if __name__ == "__main__":
    main()
