"""Files of a folder -> plain values; what is absent or broken becomes a note."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tasft.core.stats import Estimate

Row = Mapping[str, Any]


class Files:
    """Reads below `root`, and remembers in `notes` what was missing or broken."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []

    def text(self, name: str) -> str:
        """A file as text; empty where it is not there."""
        try:
            # A byte that is no UTF-8 must not cost the user the report.
            return (self.root / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            self.notes.append(f"{name} is not there")
            return ""

    def parsed(self, name: str, parse: Any, text: str) -> Row:
        """A text that holds one mapping; empty where it holds none."""
        if not text:
            return {}
        try:
            value = parse(text)
        except (ValueError, yaml.YAMLError, RecursionError):
            value = None
        if not isinstance(value, Mapping):
            self.notes.append(f"{name} could not be read")
            return {}
        return value

    def document(self, name: str, *, optional: bool = False) -> Row:
        """A JSON file of one mapping; an optional one may be absent without a note."""
        if optional and not (self.root / name).exists():
            return {}
        return self.parsed(name, json.loads, self.text(name))

    def rows(self, name: str, *, optional: bool = False) -> list[Row]:
        """Rows of a JSONL file."""
        if optional and not (self.root / name).exists():
            return []
        rows, bad = [], 0
        # Not splitlines(): it also breaks at U+2028 and others, which JSON allows inside a string.
        for line in self.text(name).split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, Mapping):
                rows.append(row)
            else:
                bad += 1
        if bad:
            self.notes.append(f"{name}: {bad} of {bad + len(rows)} lines could not be read")
        return rows

    def folders(self, name: str) -> list[str]:
        """Names of the folders in one."""
        path = self.root / name
        return sorted(inside.name for inside in path.iterdir() if inside.is_dir()) if path.is_dir() else []


def by_id(rows: list[Row], meant: Any = None) -> dict[str, Row]:
    """Rows by their ids; with a list of those that are meant, without what a larger limit has left behind."""
    known = {str(name) for name in meant} if isinstance(meant, list) else None
    return {str(row["id"]): row for row in rows if "id" in row and (known is None or str(row["id"]) in known)}


def mapping(value: Any) -> Row:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def estimate_of(value: Any) -> Estimate:
    """An estimate as a summary holds it."""
    parts = mapping(value)
    n = parts.get("n")
    shown, low, high = (number(parts.get(key)) for key in ("value", "low", "high"))
    return Estimate(shown, low, high, n if isinstance(n, int) else 0)


def number(value: Any) -> float | None:
    """The value as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
