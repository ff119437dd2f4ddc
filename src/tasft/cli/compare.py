"""Models beside each other: a table in the terminal for each, and one page for all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.evaluate import results
from tasft.report import write_comparison

LONGEST_NAME = 100


def titles_of(folders: Sequence[Path]) -> dict[str, Path]:
    """How each model is called: by its folder, a state by its run too; a number tells equal ones apart."""
    titled: dict[str, Path] = {}
    for folder in folders:
        is_state = folder.absolute().parent.name == "evaluate" and folder.name != "final"
        name = f"{folder.absolute().parents[1].name} {folder.name}" if is_state else folder.absolute().name
        title, number = name, 1
        while title in titled:
            number += 1
            title = f"{name} ({number})"
        titled[title] = folder
    return titled


def judged(paths: Sequence[Path], judges: Sequence[str]) -> list[Path]:
    """The folders of evaluations; for a log of another tool that of its replies, judged now if they were not."""
    from tasft.data.logs import read_log

    folders = []
    for path in paths:
        if path.is_file() or (path.is_dir() and not (path / "manifest.json").exists() and any(path.glob("*.jsonl"))):
            if read_log(path) is None:
                raise UserError(f"{path}: neither a folder of an evaluation nor a log that is known")
            from tasft.evaluate.logged import judge_log
            from tasft.judges import load_judge

            folder = Path("runs") / f"log-{path.name}-{provenance.content_hash(str(path.absolute()))[:8]}"
            judge_log(path, [load_judge(name) for name in judges], folder)
            path = folder
        folders.append(path)
    return folders


def compare(folders: Sequence[Path], out: Path | None) -> dict[str, Any]:
    """The first model against each of the others, and the page of all of them.

    Args:
        folders: Runs, whose final models are meant; states such as `RUN/evaluate/base`; folders of models alone.
        out: Where the page goes, in its `report/`; None for `runs/compare-` and their names.

    Returns:
        `models`: how each is called -> its folder. `rows`: as `tasft.evaluate.results.compare` gives them, each with
        the `model` that is the second. `notes`. `report`: the page.

    Raises:
        UserError: Fewer than two are given, two have nothing in common, or the page's folder holds something else.
    """
    if len(folders) < 2:
        raise UserError("name at least two models to compare")
    titled = titles_of(folders)
    name = "-".join(title.replace(" ", "-") for title in titled)[:LONGEST_NAME]
    target = out or Path("runs") / f"compare-{name}"
    if any(path.name not in ("report",) for path in target.glob("*")):
        raise UserError(f"{target} is there and holds something else: choose another with --out")
    first, *others = titled.items()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    comparable: dict[str, set[tuple[str, str]]] = {}
    for title, folder in others:
        result = results.compare(first[1], folder)
        rows += [{"model": title, **row} for row in result["rows"]]
        notes += [f"{title}: {note}" for note in result["notes"]]
        comparable[title] = {(row["set"], row["judge"]) for row in result["rows"]}
    with provenance.private():
        page = write_comparison(titled, target, comparable, notes)
    return {
        "models": {title: str(folder) for title, folder in titled.items()},
        "rows": rows,
        "notes": notes,
        "report": str(page),
    }
