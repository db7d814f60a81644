"""``python -m benchmarks COMMAND``: every figure in the README comes from here."""

from __future__ import annotations

from jsonargparse import auto_cli

from benchmarks.digits import digits


def main() -> None:
    auto_cli({"digits": digits}, prog="python -m benchmarks")


if __name__ == "__main__":
    main()
