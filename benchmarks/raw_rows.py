"""Raw result files: a JSON list, a line a row, so that a change of one row is a change of one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """No rows where there is no file yet."""
    return json.loads(file.read_text("utf-8")) if file.exists() else []


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """The file is exchanged as a whole, so that a process that is killed leaves the old one or the new one."""
    new = file.with_name(file.name + ".new")
    new.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")
    new.replace(file)
