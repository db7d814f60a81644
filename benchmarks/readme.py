"""Write the benchmarks' tables into the README, from the records in benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.records import RESULTS

README = Path(__file__).parents[1] / "README.md"


def fill(text: str) -> str:
    """``text`` with the table of each record behind its mark ``<!-- table: NAME -->``."""
    without = set(re.findall(r"<!-- table: (\w+) -->", text)) - {path.stem for path in RESULTS.glob("*.json")}
    if without:
        msg = f"README.md has marks without a record in {RESULTS}: {', '.join(sorted(without))}"
        raise ValueError(msg)
    for path in sorted(RESULTS.glob("*.json")):
        mark, table = f"<!-- table: {path.stem} -->", json.loads(path.read_text())["table"]
        if mark not in text:
            msg = f"README.md has no mark {mark}"
            raise ValueError(msg)
        before, after = text.split(mark, 1)
        after = re.sub(r"\A\n(?:(?!<!-- table).)*?<!-- end -->", "", after, count=1, flags=re.DOTALL)
        text = f"{before}{mark}\n{table}\n<!-- end -->{after}"
    return text


def readme() -> None:
    """Bring the README's tables up to date with the records."""
    README.write_text(fill(README.read_text()))
