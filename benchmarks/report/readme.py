"""Write the benchmarks' tables into the README, from the records in benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.report.report import markdown_table
from benchmarks.run.store import RESULTS, read

README = Path(__file__).parents[2] / "README.md"


def fill(text: str) -> str:
    """``text`` with the table of each record behind its mark ``<!-- table: NAME -->``."""
    without = set(re.findall(r"<!-- table: (\w+) -->", text)) - {path.stem for path in RESULTS.glob("*.json")}
    if without:
        msg = f"README.md has marks without a record in {RESULTS}: {', '.join(sorted(without))}"
        raise ValueError(msg)
    for path in sorted(RESULTS.glob("*.json")):
        mark, table = f"<!-- table: {path.stem} -->", table_of(path)
        if mark not in text:
            msg = f"README.md has no mark {mark}"
            raise ValueError(msg)
        before, after = text.split(mark, 1)
        after = re.sub(r"\A\n(?:(?!<!-- table).)*?<!-- end -->", "", after, count=1, flags=re.DOTALL)
        text = f"{before}{mark}\n{table}\n<!-- end -->{after}"
    return text


def table_of(path: Path) -> str:
    """The table of a record; of an experiment as it is made now, not when it was run."""
    record = json.loads(path.read_text())
    return markdown_table(read(path).runs) if record.get("command") == "run" else str(record["table"])


def readme() -> None:
    """Bring the README's tables up to date with the records."""
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
