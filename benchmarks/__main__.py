"""``python -m benchmarks COMMAND``: every figure in the README comes from here."""

from __future__ import annotations

from jsonargparse import auto_cli

from benchmarks.digits import digits
from benchmarks.imports import imports
from benchmarks.overhead import overhead
from benchmarks.readme import readme


def main() -> None:
    """Run one command."""
    auto_cli(
        {"digits": digits, "imports": imports, "overhead": overhead, "readme": readme}, prog="python -m benchmarks"
    )


if __name__ == "__main__":
    main()
