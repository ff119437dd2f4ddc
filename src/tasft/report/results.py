"""All figures of a folder, long and tidy: a row for each state, set, judge and measure."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasft.core.errors import UserError
from tasft.core.stats import Estimate
from tasft.core.text import csv_text
from tasft.report.read import read_model, read_run
from tasft.report.record import Record
from tasft.report.text import csv_cell

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("state", "set", "kind", "judge", "measure", "value", "low", "high", "n")

Result = tuple[str, str, str, str, str, float | None, float | None, float | None, int]


def rows(record: Record) -> Iterator[Result]:
    """Values under `COLUMNS`, states in their order, then checkpoints; shares in [0, 1], scores in their own unit."""
    for state in record.states:
        for prompts in record.sets:
            judged = prompts.states[state].judged if state in prompts.states else {}
            for judge in (judge for judge in record.judges if judge in judged):
                keys = (state, prompts.name, prompts.kind, judge)
                for measure, estimate in judged[judge].estimates.items():
                    yield _row(*keys, measure, estimate)
                if score := judged[judge].score:
                    yield _row(*keys, "score", score)
        for attack, states in record.attacks.items():
            for measure, estimate in (states[state].estimates if state in states else {}).items():
                yield _row(state, f"jailbreak/{attack}", "jailbreak", states[state].judge, measure, estimate)
        for task, measured in record.measured.items():
            for measure, estimate in (measured[state].estimates if state in measured else {}).items():
                yield _row(state, task, task.partition("/")[0], "", measure, estimate)
    kinds = {prompts.name: prompts.kind for prompts in record.sets}
    for step, sets in record.checkpoints.items():
        for name, evaluated in sets.items():
            for judge, judgement in evaluated.judged.items():
                for measure, estimate in judgement.estimates.items():
                    yield _row(f"checkpoint-{step}", name, kinds.get(name, ""), judge, measure, estimate)


def _row(state: str, name: str, kind: str, judge: str, measure: str, estimate: Estimate) -> Result:
    return state, name, kind, judge, measure, estimate.value, estimate.low, estimate.high, estimate.n


def as_csv(record: Record) -> str:
    """The rows as CSV; no cell of text is taken for a formula by a spreadsheet."""
    return csv_text([COLUMNS, *([*map(csv_cell, row[:5]), *row[5:]] for row in rows(record))])


def results(path: str | Path) -> "pd.DataFrame":
    """All figures of a run, or of a model that was evaluated alone, read from its files; what it lacks is said.

    Args:
        path: A run folder, or the folder that `tasft evaluate MODEL` wrote.

    Returns:
        Columns state, set, kind (of the prompts, or jailbreak, capability, quality), judge, measure, value, low, high
        (95% interval) and n. Shares are in [0, 1], scores in their judge's own unit; what has no value is NaN.

    Raises:
        UserError: It is neither.
    """
    import pandas as pd  # takes a second

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run, or what tasft evaluate wrote")
    record = read_run(folder) if (folder / "evaluate").is_dir() else read_model(folder)
    for note in record.notes:
        print(f"note: {note}", flush=True)
    return pd.DataFrame(list(rows(record)), columns=list(COLUMNS))
