"""The reports under a folder, as one list."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from tasft.core.measures import MEASURES, NONE, percent
from tasft.report.blocks import BAD, GOOD, NEUTRAL, Cell, Document, Section, Table, Verdict
from tasft.report.files import Files, Row, mapping, number

RATES = (("toxic", "safe_coherent"), ("toxic", "harmful"), ("toxic", "incoherent"), ("benign", "refusal"))
DEEPEST = 6
"""Folders below the one that is listed in which a report is looked for."""


@dataclass(frozen=True)
class Listed:
    """A report that was found.

    Attributes:
        folder: Of the run, the model, the sweep or the comparison.
        kind: run, model, sweep or comparison.
        recipe: Of a run, else empty.
        gate: Whether it is met; None without one.
        rates: `RATES` of the final model by the first judge that tells them; what was not measured is absent.
        written: When the report was.
    """

    folder: Path
    kind: str
    recipe: Row
    gate: bool | None
    rates: Mapping[tuple[str, str], float]
    written: datetime


def reports_in(folder: Path) -> list[Listed]:
    """Every report under a folder, the newest first. Reads what reports have written, no reply and no verdict."""
    listed = [_listed(path.parents[1]) for path in _pages(folder)]
    return sorted(listed, key=lambda report: report.written, reverse=True)


def _pages(folder: Path, depth: int = 0) -> Iterator[Path]:
    page = folder / "report" / "index.html"
    if page.is_file() and not page.is_symlink():
        yield page
    if depth < DEEPEST:
        for inside in sorted(folder.iterdir()) if folder.is_dir() else ():
            if inside.is_dir() and not inside.is_symlink() and inside.name not in ("report", "evaluate", "train"):
                yield from _pages(inside, depth + 1)


def _listed(folder: Path) -> Listed:
    files = Files(folder)
    recipe = (folder / "recipe.yaml").is_file()
    is_sweep = (folder / "sweep.json").is_file()
    kind = (
        "sweep" if is_sweep else "run" if recipe else "model" if (folder / "manifest.json").is_file() else "comparison"
    )
    gate = files.document("report/gate.json", optional=True).get("met")
    return Listed(
        folder,
        kind,
        files.parsed("recipe.yaml", yaml.safe_load, files.text("recipe.yaml")) if recipe else {},
        gate if isinstance(gate, bool) else None,
        _rates(folder / "report" / "results.csv") if kind in ("run", "model") else {},
        datetime.fromtimestamp((folder / "report" / "index.html").stat().st_mtime, UTC),
    )


def _rates(path: Path) -> dict[tuple[str, str], float]:
    """Over all sets of a kind, by the first judge that tells a measure."""
    sums: dict[tuple[str, str], tuple[str, float, int]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    last = "final" if any(row.get("state") == "final" for row in rows) else None
    for row in rows:
        wanted = str(row.get("kind")), str(row.get("measure"))
        value, n = _number(row.get("value")), _number(row.get("n"))
        if wanted not in RATES or (last and row.get("state") != last) or value is None or not n:
            continue
        judge, total, count = sums.get(wanted, (str(row.get("judge")), 0.0, 0))
        if judge == row.get("judge"):
            sums[wanted] = judge, total + value * n, count + int(n)
    return {wanted: total / count for wanted, (_, total, count) in sums.items()}


def _number(text: Any) -> float | None:
    try:
        return number(float(text))
    except (TypeError, ValueError):
        return None


def listing(folder: Path) -> Document:
    """The list as a page; each line is a link to a report below `files/`."""
    reports = reports_in(folder)
    rows: list[list[str | Cell]] = []
    for report in reports:
        path = report.folder.relative_to(folder).as_posix()
        link = f"files/{quote(path)}/report/index.html" if path != "." else "files/report/index.html"
        train, model = mapping(report.recipe.get("train")), mapping(report.recipe.get("model"))
        method = " ".join(str(train[key]) for key in ("method", "penalty") if train.get(key) not in (None, "none"))
        gate = {True: Cell("met", tone=GOOD), False: Cell("not met", tone=BAD), None: Cell(NONE)}[report.gate]
        name = str(report.recipe.get("name") or (path if path != "." else folder.resolve().name))
        base = str(model.get("base") or NONE).rstrip("/").rpartition("/")[2]
        shown = [percent(report.rates.get(wanted)) for wanted in RATES]
        date = report.written.strftime("%Y-%m-%d %H:%M")
        rows.append([Cell(name, path, link=link), report.kind, base, method or NONE, gate, *shown, date])
    head = (
        "Name",
        "What",
        "Model",
        "Method",
        "Gate",
        *(f"{MEASURES[m].label}, {k}" for k, m in RATES),
        "Written (UTC)",
    )
    count = f"{len(reports)} report{'' if len(reports) == 1 else 's'}"
    gates = [report.gate for report in reports if report.gate is not None]
    sentence = f"{count}; {sum(gates)} of {len(gates)} gates are met." if gates else f"{count}."
    sections = [Section("Reports", [Table("Reports", head, rows)] if rows else [])]
    note = "Rates are of the final model, or of a model alone, by the first judge of its recipe that tells them."
    return Document(
        "Reports under a folder", folder.resolve().name, Verdict("", NEUTRAL, "", [sentence]), sections, note
    )
