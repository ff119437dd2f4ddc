"""The runs of a sweep beside each other, from files alone.

`table.csv` has a row for each run, `along.csv`, where checkpoints were evaluated, one for each of their steps;
`report/index.html` and `report/report.md` show the most telling of both.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from tasft.core.errors import UserError
from tasft.core.provenance import atomic_write_text, read_json
from tasft.core.stats import Estimate, mean_of_independent, rate
from tasft.report import facts
from tasft.report.page import render
from tasft.report.plots import path_plot, trade_off_plot
from tasft.report.read import STATES, Attacked, Judged, Measured, Run, read_run
from tasft.report.text import csv_cell, inline_markdown, markdown_table

OBJECTIVES = {
    "harmful": "Harmful replies to toxic prompts",
    "incoherent": "Incoherent replies to toxic prompts",
    "over_refusal": "Refusals of benign prompts",
    "capability": "Accuracy in tasks",
}
"""What decides the Pareto front: the first three are the better the lower, capability is the better the higher."""

SHOWN = {"safe_coherent": "Safe and coherent replies to toxic prompts", **OBJECTIVES}
"""What the table shows of each run."""

_MEASURED = {
    "safe_coherent": ("toxic", "safe_coherent"),
    "harmful": ("toxic", "harmful"),
    "incoherent": ("toxic", "incoherent"),
    "over_refusal": ("benign", "refusal"),
}

_ALONG = {measure: name for name, (_, measure) in _MEASURED.items() if measure in facts.ALONG}
_ALONG_COLUMNS = ("run", "training step", *(SHOWN[name] for name in _ALONG.values()))
_PARTS = ("value", "low", "high", "n")

_NOTES = (
    "Replies and refusals by the first judge of the recipe that tells them, over all prompts of the sets of their kind "
    "together; accuracy is the mean over tasks of lm-eval, its interval is over their items. In brackets: 95% "
    "intervals.",
    "A run is on the Pareto front if no other is at least as good in all of these and better in one. It is found from "
    "the measured values: of runs whose intervals overlap, chance may decide which is on it.",
)
_ALONG_NOTE = (
    "Of runs whose checkpoints were evaluated. Step 0 is the model that training starts from: after an SFT it need not "
    "be that of the row before training."
)
_FILES = "All figures, by set and judge, are in table.csv, those along training in along.csv."


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        number: Its place in the sweep, from 1.
        fields: What makes it differ from the others, as text.
        folder: The run folder, within that of the sweep.
        state: `done`, `failed` or `waiting`.
        reason: Why it failed.
        commit: Of tasft, by which it was last worked on.
        figures: Column of the table -> its estimate, of all that was measured.
        shown: What the table shows -> its estimate after training; what was not measured is absent.
        before: The same, before training.
        along: What `facts.along` gives, by the judges of the sweep.
    """

    number: int
    fields: Mapping[str, str]
    folder: str
    state: str
    reason: str
    commit: str
    figures: Mapping[str, Estimate]
    shown: Mapping[str, Estimate]
    before: Mapping[str, Estimate]
    along: facts.Along


def pareto(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other beats, being nowhere higher and somewhere lower; equal points do not beat each other."""
    rows = np.asarray(points, dtype=float)
    return [not ((rows <= row).all(axis=1) & (rows < row).any(axis=1)).any() for row in rows]


def write_sweep_report(folder: Path) -> Path:
    """Writes what is known of a sweep, each file atomically; runs that are not done have no figures.

    Returns:
        The path of `report/index.html`.

    Raises:
        UserError: The folder holds no sweep.
    """
    state = read_json(folder / "sweep.json")
    if state is None:
        raise UserError(f"{folder}: there is no sweep.json; run tasft sweep first")
    runs = [read_run(folder / row["folder"]) if row["state"] == "done" else None for row in state["cells"]]
    judges = {name: _judge(runs, *what) for name, what in _MEASURED.items()}
    cells = [
        _cell(number, row, run, judges) for number, (row, run) in enumerate(zip(state["cells"], runs, strict=True), 1)
    ]
    front = _front(cells)
    atomic_write_text(folder / "table.csv", _csv(cells, front))
    if any(cell.along for cell in cells):
        atomic_write_text(folder / "along.csv", _along_csv(cells))
    else:
        (folder / "along.csv").unlink(missing_ok=True)
    atomic_write_text(folder / "report" / "report.md", _markdown(state["name"], cells, front))
    atomic_write_text(folder / "report" / "index.html", _html(state["name"], cells, front))
    return folder / "report" / "index.html"


def _judge(runs: Sequence[Run | None], kind: str, measure: str) -> str | None:
    """Who tells a measure, the same for all runs: another judge's rate is no better or worse."""
    return next((judge for run in runs if run and (judge := facts.leading(run, kind, measure))), None)


def _cell(number: int, row: Mapping[str, Any], run: Run | None, judges: Mapping[str, str | None]) -> Cell:
    figures = _figures(run) if run else {}
    found = {state: _shown(run, figures, state, judges) if run else {} for state in STATES}
    return Cell(
        number,
        {field: str(value) for field, value in row["fields"].items()},
        row["folder"],
        row["state"],
        row.get("reason", ""),
        str((run.manifest.get("commit") if run else None) or ""),
        figures,
        found["final"],
        found["base"],
        facts.along(run, {measure: judges[name] for measure, name in _ALONG.items()}) if run else (),
    )


def _figures(run: Run) -> dict[str, Estimate]:
    figures = {
        f"{state}.{prompts.name}.{judge}.{measure}": estimate
        for state in STATES
        for prompts in run.sets
        if state in prompts.states
        for judge, judged in prompts.states[state].judged.items()
        for measure, estimate in _told(judged).items()
    }
    besides: dict[str, Mapping[str, Measured | Attacked]] = {
        name.replace("/", "."): states for name, states in run.measured.items()
    }
    besides |= {f"jailbreak.{name}": states for name, states in run.attacks.items()}
    return figures | {
        f"{state}.{name}.{measure}": estimate
        for name, states in besides.items()
        for state, found in states.items()
        for measure, estimate in found.estimates.items()
    }


def _told(judged: Judged) -> dict[str, Estimate]:
    """All rates, the shares of replies that are incoherent for each reason, and the mean score."""
    whole = judged.estimates.get("incoherent")
    n = whole.n if whole else 0
    causes = {f"incoherent.{why}": rate([True] * k + [False] * (n - k)) for why, k in judged.causes.items() if n >= k}
    return {**judged.estimates, **causes, **({"score": judged.score} if judged.score else {})}


def _shown(
    run: Run, figures: Mapping[str, Estimate], state: str, judges: Mapping[str, str | None]
) -> dict[str, Estimate]:
    found = {}
    for name, (kind, measure) in _MEASURED.items():
        there = [prompts.states.get(state) for prompts in run.sets if prompts.kind == kind]
        if told := facts.over_all(there, judges[name], measure):
            found[name] = told
    tasks = [figures[name] for name in figures if name.startswith(f"{state}.capability.") and name.endswith(".acc")]
    if (accuracy := mean_of_independent(tasks)).value is not None:
        found["capability"] = accuracy
    return found


def _columns(cells: Sequence[Cell]) -> list[str]:
    """What some run was measured in."""
    return [name for name in SHOWN if any(name in cell.shown for cell in cells)]


def _compared(cells: Sequence[Cell]) -> list[str]:
    """Objectives that some run was measured in."""
    return [name for name in _columns(cells) if name in OBJECTIVES]


def _front(cells: Sequence[Cell]) -> dict[int, bool]:
    """Of each run that was measured in all that the others were, by its number, whether it is on the Pareto front."""
    compared = _compared(cells)
    whole = [cell for cell in cells if compared and set(compared) <= cell.shown.keys()]
    points = [
        [-_value(cell, name) if name == "capability" else _value(cell, name) for name in compared] for cell in whole
    ]
    return dict(zip((cell.number for cell in whole), pareto(points), strict=True))


def _value(cell: Cell, name: str) -> float:
    value = cell.shown[name].value
    assert value is not None
    return value


def _fields(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(field for cell in cells for field in cell.fields))


def _csv(cells: Sequence[Cell], front: Mapping[int, bool]) -> str:
    fields = _fields(cells)
    estimates = [
        {**cell.shown, **{f"before.{name}": value for name, value in cell.before.items()}, **cell.figures}
        for cell in cells
    ]
    columns = list(dict.fromkeys(column for row in estimates for column in row))
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["run", *map(csv_cell, fields), "state", "reason", "commit", "pareto", *map(csv_cell, _heads(columns))]
    )
    for cell, found in zip(cells, estimates, strict=True):
        row: list[Any] = [cell.number, *(csv_cell(cell.fields.get(field, "")) for field in fields)]
        row += [
            cell.state,
            csv_cell(cell.reason),
            csv_cell(cell.commit),
            {True: 1, False: 0, None: None}[front.get(cell.number)],
        ]
        row += _parts(found, columns)
        writer.writerow(row)
    return out.getvalue()


def _along_csv(cells: Sequence[Cell]) -> str:
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "step", *_heads(_ALONG.values())])
    for cell in cells:
        for step, rates in cell.along:
            writer.writerow([cell.number, f"{step:g}", *_parts(rates, _ALONG)])
    return out.getvalue()


def _heads(columns: Iterable[str]) -> list[str]:
    return [column if part == "value" else f"{column}.{part}" for column in columns for part in _PARTS]


def _parts(found: Mapping[str, Estimate], columns: Iterable[str]) -> list[float | None]:
    return [getattr(found[column], part) if column in found else None for column in columns for part in _PARTS]


def _along_rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Cells under `_ALONG_COLUMNS`."""
    return [
        (str(cell.number), f"{step:g}", *(facts.in_words(rates[name]) if name in rates else "—" for name in _ALONG))
        for cell in cells
        for step, rates in cell.along
    ]


def _same_before(cells: Sequence[Cell]) -> Mapping[str, Estimate]:
    """What was measured before training, if it was the same for all runs."""
    known = [cell.before for cell in cells if cell.state == "done"]
    return known[0] if known and all(each == known[0] for each in known) else {}


def _rows(cells: Sequence[Cell], front: Mapping[int, bool]) -> list[list[str]]:
    """Cells of the table that page and Markdown show, the head first."""
    fields, columns = _fields(cells), _columns(cells)

    def said(found: Mapping[str, Estimate]) -> list[str]:
        return [facts.in_words(found[name]) if name in found else "—" for name in columns]

    rows = [["run", *fields, *(SHOWN[name] for name in columns), "Pareto front"]]
    if before := _same_before(cells):
        rows.append(["before training", *[""] * len(fields), *said(before), ""])
    for cell in cells:
        mark = "yes" if front.get(cell.number) else "" if cell.state == "done" else cell.state
        values = [cell.fields.get(field, "") for field in fields]
        rows.append([str(cell.number), *values, *said(cell.shown), mark])
    return rows


def _state(cells: Sequence[Cell]) -> str:
    done = sum(cell.state == "done" for cell in cells)
    best = "" if done == len(cells) else "; figures of the others are missing below"
    return f"{done} of {len(cells)} runs are done{best}."


def _failures(cells: Sequence[Cell]) -> list[str]:
    return [f"Run {cell.number} failed: {cell.reason}" for cell in cells if cell.state == "failed"]


def _markdown(name: str, cells: Sequence[Cell], front: Mapping[int, bool]) -> str:
    text = inline_markdown
    head, *rows = _rows(cells, front)
    lines = [f"# {text(name)}: report of a sweep", "", _state(cells), ""]
    lines += [f"> {text(failure)}\n" for failure in _failures(cells)]
    lines += markdown_table([text(column) for column in head], rows)
    lines += [f"{note}\n" for note in _NOTES]
    if along := _along_rows(cells):
        lines += ["## Along training", "", _ALONG_NOTE, "", *markdown_table(_ALONG_COLUMNS, along)]
    lines += ["## Files", "", f"{_FILES} Each run has its own report:", ""]
    lines += [f"- {cell.number}: {text(cell.folder)}/report/report.md" for cell in cells if cell.state == "done"]
    return "\n".join(lines) + "\n"


def _html(name: str, cells: Sequence[Cell], front: Mapping[int, bool]) -> str:
    compared = _compared(cells)
    plots = [
        trade_off_plot(
            [(cell.number, _value(cell, "harmful"), _value(cell, up), front[cell.number]) for cell in shown],
            OBJECTIVES["harmful"],
            OBJECTIVES[up],
        )
        for up in compared
        if "harmful" in compared and up != "harmful" and (shown := [cell for cell in cells if cell.number in front])
    ]
    head, *rows = _rows(cells, front)
    return render(
        "sweep.html.j2",
        name=name,
        state=_state(cells),
        failures=_failures(cells),
        head=head,
        rows=rows,
        plots=plots,
        path=path_plot({str(cell.number): cell.along for cell in cells}, names=True),
        along=_along_rows(cells),
        along_columns=_ALONG_COLUMNS,
        along_note=_ALONG_NOTE,
        files=_FILES,
        notes=_NOTES,
        done=[cell for cell in cells if cell.state == "done"],
    )
