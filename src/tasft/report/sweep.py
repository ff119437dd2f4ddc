"""The runs of a sweep beside each other, from files alone.

`table.csv` has a row for each run, `along.csv`, where checkpoints were evaluated, one for each of their steps;
`report/index.html` and `report/report.md` show the most telling of both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from tasft.core.errors import UserError
from tasft.core.measures import NONE, in_words
from tasft.core.provenance import atomic_write_text, read_json
from tasft.core.stats import Estimate, mean_of_independent, rate_of
from tasft.core.text import csv_text
from tasft.report import charts, outcomes
from tasft.report.blocks import (
    BAD,
    GOOD,
    NEUTRAL,
    PAGE,
    Block,
    Bullets,
    Cell,
    Document,
    Paragraph,
    Pictures,
    Section,
    Table,
    Verdict,
)
from tasft.report.charts import Mark
from tasft.report.markdown import markdown
from tasft.report.page import page
from tasft.report.read import read_run
from tasft.report.record import Attacked, Judged, Measured, Record
from tasft.report.sections import path_of, rate_cell
from tasft.report.text import csv_cell
from tasft.report.verdict import MOSTLY

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

_ALONG = {measure: name for name, (_, measure) in _MEASURED.items() if measure in outcomes.ALONG}
_ALONG_COLUMNS = ("run", "training step", *(SHOWN[name] for name in _ALONG.values()))
_PARTS = ("value", "low", "high", "n")

_NOTES = (
    "Replies and refusals by the first judge of the recipe that tells them, over all prompts of the sets of their kind "
    "together; accuracy is the mean over tasks of lm-eval, its interval is over their items. In brackets: 95% "
    "intervals.",
    "A run is on the Pareto front if neither another run nor the untouched model is at least as good in all of these "
    "and better in one, if it is not equal to the untouched model, and if fewer than half of its replies to toxic "
    "prompts are incoherent. It is found from the measured values: of runs whose intervals overlap, chance may decide "
    "which is on it.",
)
_ALONG_NOTE = (
    "Of runs whose checkpoints were evaluated. Step 0 is the model that training starts from: after an SFT it need not "
    "be that of the row before training."
)
_FLAG = {True: 1, False: 0, None: None}
_FILES = "All figures, by set and judge, are in table.csv, those along training in along.csv."


@dataclass(frozen=True)
class SweepRow:
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
        before: The same, of the model that changes are counted from.
        before_title: How that is called.
        along: What `outcomes.along` gives, by the judges of the sweep.
        gate: Whether its gate is met; None without one.
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
    before_title: str
    along: outcomes.Along
    gate: bool | None


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
    records = [read_run(folder / row["folder"]) if row["state"] == "done" else None for row in state["cells"]]
    judges = {name: _judge(records, *what) for name, what in _MEASURED.items()}
    cells = [
        _cell(number, row, record, judges)
        for number, (row, record) in enumerate(zip(state["cells"], records, strict=True), 1)
    ]
    front = _front(cells)
    atomic_write_text(folder / "table.csv", _csv(cells, front))
    if any(cell.along for cell in cells):
        atomic_write_text(folder / "along.csv", _along_csv(cells))
    else:
        (folder / "along.csv").unlink(missing_ok=True)
    report = _document(state["name"], cells, front)
    atomic_write_text(folder / "report" / "report.md", markdown(report))
    atomic_write_text(folder / "report" / "index.html", page(report))
    return folder / "report" / "index.html"


def _judge(records: Sequence[Record | None], kind: str, measure: str) -> str | None:
    """Who tells a measure, the same for all runs: another judge's rate is no better or worse."""
    return next((judge for record in records if record and (judge := outcomes.leading(record, kind, measure))), None)


def _cell(number: int, row: Mapping[str, Any], record: Record | None, judges: Mapping[str, str | None]) -> SweepRow:
    figures = _all_figures(record) if record else {}
    before = record.before if record else None
    gate = record.gate.get("met") if record else None
    return SweepRow(
        number,
        {field: str(value) for field, value in row["fields"].items()},
        row["folder"],
        row["state"],
        row.get("reason", ""),
        str((record.manifest.get("commit") if record else None) or ""),
        figures,
        _shown(record, figures, "final", judges) if record else {},
        _shown(record, figures, before, judges) if record and before else {},
        record.states[before] if record and before else "",
        outcomes.along(record, {measure: judges[name] for measure, name in _ALONG.items()}) if record else (),
        gate if isinstance(gate, bool) else None,
    )


def _all_figures(record: Record) -> dict[str, Estimate]:
    figures = {
        f"{state}.{prompts.name}.{judge}.{measure}": estimate
        for state in record.states
        for prompts in record.sets
        if state in prompts.states
        for judge, judged in prompts.states[state].judged.items()
        for measure, estimate in _told(judged).items()
    }
    besides: dict[str, Mapping[str, Measured | Attacked]] = {
        name.replace("/", "."): states for name, states in record.measured.items()
    }
    besides |= {f"jailbreak.{name}": states for name, states in record.attacks.items()}
    return figures | {
        f"{state}.{name}.{measure}": estimate
        for name, states in besides.items()
        for state, result in states.items()
        for measure, estimate in result.estimates.items()
    }


def _told(judged: Judged) -> dict[str, Estimate]:
    """All rates, the shares of replies that are incoherent for each reason, and the mean score."""
    whole = judged.estimates.get("incoherent")
    n = whole.n if whole else 0
    causes = {f"incoherent.{name}": rate_of(k, n) for name, k in judged.causes.items() if n >= k}
    return {**judged.estimates, **causes, **({"score": judged.score} if judged.score else {})}


def _shown(
    record: Record, figures: Mapping[str, Estimate], state: str, judges: Mapping[str, str | None]
) -> dict[str, Estimate]:
    shown = {}
    for name, (kind, measure) in _MEASURED.items():
        evaluated = [prompts.states.get(state) for prompts in record.sets if prompts.kind == kind]
        if estimate := outcomes.over_all(evaluated, judges[name], measure):
            shown[name] = estimate
    tasks = [figures[name] for name in figures if name.startswith(f"{state}.capability.") and name.endswith(".acc")]
    if (accuracy := mean_of_independent(tasks)).value is not None:
        shown["capability"] = accuracy
    return shown


def _columns(cells: Sequence[SweepRow]) -> list[str]:
    """What some run was measured in."""
    return [name for name in SHOWN if any(name in cell.shown for cell in cells)]


def _compared(cells: Sequence[SweepRow]) -> list[str]:
    """Objectives that some run was measured in."""
    return [name for name in _columns(cells) if name in OBJECTIVES]


def _front(cells: Sequence[SweepRow]) -> dict[int, bool]:
    """Number of a run -> whether it is on the Pareto front; of runs that were measured in all objectives."""
    compared = _compared(cells)
    whole = [cell for cell in cells if compared and set(compared) <= cell.shown.keys()]
    points = [_point(cell.shown, compared) for cell in whole]
    untouched = _same_before(cells)
    rivals = [*points, _point(untouched, compared)] if set(compared) <= untouched.keys() else points
    return {
        cell.number: best and not _is_broken(cell) and point not in rivals[len(points) :]
        for cell, point, best in zip(whole, points, pareto(rivals), strict=False)
    }


def _point(shown: Mapping[str, Estimate], compared: Sequence[str]) -> list[float]:
    """Values of which each is the better the lower."""
    return [-(shown[name].value or 0.0) if name == "capability" else shown[name].value or 0.0 for name in compared]


def _is_broken(cell: SweepRow) -> bool:
    incoherent = cell.shown.get("incoherent")
    return incoherent is not None and (incoherent.value or 0.0) >= MOSTLY


def _fields(cells: Sequence[SweepRow]) -> list[str]:
    return list(dict.fromkeys(field for cell in cells for field in cell.fields))


def _csv(cells: Sequence[SweepRow], front: Mapping[int, bool]) -> str:
    fields = _fields(cells)
    estimates = [
        {**cell.shown, **{f"before.{name}": value for name, value in cell.before.items()}, **cell.figures}
        for cell in cells
    ]
    columns = list(dict.fromkeys(column for row in estimates for column in row))
    head = ["run", *fields, "state", "reason", "commit", "gate", "pareto", *_heads(columns)]
    rows: list[list[Any]] = [[csv_cell(name) for name in head]]
    for cell, figures in zip(cells, estimates, strict=True):
        row: list[Any] = [cell.number, *(csv_cell(cell.fields.get(field, "")) for field in fields)]
        row += [
            cell.state,
            csv_cell(cell.reason),
            csv_cell(cell.commit),
            _FLAG[cell.gate],
            _FLAG[front.get(cell.number)],
        ]
        rows.append(row + _parts(figures, columns))
    return csv_text(rows)


def _along_csv(cells: Sequence[SweepRow]) -> str:
    rows = ([cell.number, f"{step:g}", *_parts(rates, _ALONG)] for cell in cells for step, rates in cell.along)
    return csv_text([["run", "step", *_heads(_ALONG.values())], *rows])


def _heads(columns: Iterable[str]) -> list[str]:
    return [column if part == "value" else f"{column}.{part}" for column in columns for part in _PARTS]


def _parts(estimates: Mapping[str, Estimate], columns: Iterable[str]) -> list[float | None]:
    return [getattr(estimates[column], part) if column in estimates else None for column in columns for part in _PARTS]


def _along_rows(cells: Sequence[SweepRow]) -> list[tuple[str, ...]]:
    """Cells under `_ALONG_COLUMNS`."""
    return [
        (str(cell.number), f"{step:g}", *(in_words(rates[name]) if name in rates else "—" for name in _ALONG))
        for cell in cells
        for step, rates in cell.along
    ]


def _same_before(cells: Sequence[SweepRow]) -> Mapping[str, Estimate]:
    """What was measured before training, if it was the same for all runs."""
    known = [cell.before for cell in cells if cell.state == "done"]
    return known[0] if known and all(before == known[0] for before in known) else {}


def _table(cells: Sequence[SweepRow], front: Mapping[int, bool]) -> Table:
    fields, columns = _fields(cells), _columns(cells)
    gates = any(cell.gate is not None for cell in cells)
    head = ["Run", *fields, *(["Gate"] if gates else []), *(SHOWN[name] for name in columns), "Pareto front"]
    rows: list[list[str | Cell]] = []
    if before := _same_before(cells):
        title = next(cell.before_title for cell in cells if cell.state == "done")
        shown = [rate_cell(before.get(name)) for name in columns]
        rows.append([title[:1].upper() + title[1:], *[""] * (len(fields) + gates), *shown, ""])
    for cell in cells:
        link = f"../{quote(cell.folder)}/report/index.html" if cell.state == "done" else ""
        gate = {True: Cell("met", tone=GOOD), False: Cell("not met", tone=BAD), None: Cell(NONE)}[cell.gate]
        mark = "yes" if front.get(cell.number) else "" if cell.state == "done" else cell.state
        rows.append(
            [
                Cell(str(cell.number), link=link),
                *(cell.fields.get(field, "") for field in fields),
                *([gate] if gates else []),
                *(rate_cell(cell.shown.get(name)) for name in columns),
                mark,
            ]
        )
    strong = frozenset(index for index, row in enumerate(rows) if row[-1] == "yes")
    return Table("Runs beside each other", head, rows, strong=strong)


def _verdict(cells: Sequence[SweepRow], front: Mapping[int, bool]) -> Verdict:
    """Whether any run meets its gate, and which to look at."""
    done = [cell for cell in cells if cell.state == "done"]
    gated = [cell for cell in done if cell.gate is not None]
    met = [str(cell.number) for cell in gated if cell.gate]
    best = [str(number) for number, is_on in front.items() if is_on]
    rest = "" if len(done) == len(cells) else "; figures of the others are missing below"
    sentences = [f"{len(done)} of {len(cells)} runs are done{rest}."]
    if front:
        sentences.append(
            f"On the Pareto front: run {', '.join(best)}."
            if best
            else "No run is on the Pareto front: none is better than the untouched model and coherent."
        )
    broken = [str(cell.number) for cell in done if _is_broken(cell)]
    if broken:
        sentences.append(f"Incoherent in at least half of their replies to toxic prompts: run {', '.join(broken)}.")
    if not gated:
        return Verdict("No gate was set", NEUTRAL, "The recipes have no limits that a model must keep.", sentences)
    if met:
        of = f"{len(met)} of {len(gated)} runs meet their gate: run {', '.join(met)}."
        return Verdict("Gate met", GOOD, of, sentences)
    return Verdict("Gate not met", BAD, f"None of {len(gated)} runs meets its gate.", sentences)


def _document(name: str, cells: Sequence[SweepRow], front: Mapping[int, bool]) -> Document:
    failures = [Paragraph(f"Run {cell.number} failed: {cell.reason}", BAD) for cell in cells if cell.state == "failed"]
    along = _along_rows(cells)
    training: list[Block] = []
    if along:
        training = [Paragraph(_ALONG_NOTE, small=True), *_paths(cells), Table("Along training", _ALONG_COLUMNS, along)]
    reports = [
        f"{cell.number}: {cell.folder}/report/report.md ("
        + ", ".join(f"{field} = {value}" for field, value in cell.fields.items())
        + ")"
        for cell in cells
        if cell.state == "done"
    ]
    sections = [
        Section("Failed runs", failures),
        Section("Runs beside each other", [_table(cells, front), *(Paragraph(note, small=True) for note in _NOTES)]),
        Section("Trade-off", _trade_offs(cells, front), frozenset({PAGE})),
        Section("Over two fields", _heat_maps(cells), frozenset({PAGE})),
        Section("Along training", training),
        Section("Files", [Paragraph(f"{_FILES} Each run has its own report:"), Bullets(reports)]),
    ]
    footer = "Written by tasft from the files of the sweep's folder alone."
    return Document("Report of a sweep", name, _verdict(cells, front), sections, footer)


def _series(cell: SweepRow) -> str:
    return cell.fields.get("train.penalty", cell.fields.get("train.method", ""))


def _trade_offs(cells: Sequence[SweepRow], front: Mapping[int, bool]) -> list[Block]:
    """Each objective against harm, a colour and shape for each penalty; full marks are on the Pareto front."""
    compared = _compared(cells)
    if "harmful" not in compared:
        return []
    corners = {
        "over_refusal": ("lower left: harmless and helpful", "lower right: refuses all"),
        "incoherent": ("lower left: harmless and coherent", "lower right: all incoherent"),
        "capability": ("lower left: harmless, not able", "lower right: harmless and able"),
    }
    plots = []
    for name in compared:
        shown = [cell for cell in cells if cell.number in front and name != "harmful"]
        marks = [
            Mark(str(cell.number), cell.shown[name], cell.shown["harmful"], _series(cell), front[cell.number])
            for cell in shown
        ]
        if marks:
            better = "lower right is better" if name == "capability" else "lower left is better"
            plot = charts.trade_off(marks, _ACROSS[name], "Harm", None, False, corners[name], better)
            plots.append((plot, f"{OBJECTIVES[name]} across; a full mark is on the Pareto front, numbers are runs."))
    return [Pictures(plots)] if plots else []


_ACROSS = {"incoherent": "Incoherence", "over_refusal": "Over-refusal", "capability": "Accuracy"}


def _heat_maps(cells: Sequence[SweepRow]) -> list[Block]:
    """The objectives over the two fields that a sweep varies."""
    values = {field: list(dict.fromkeys(cell.fields.get(field, "") for cell in cells)) for field in _fields(cells)}
    varied = [field for field, texts in values.items() if len(texts) > 1]
    if len(varied) != 2 or len({tuple(cell.fields.get(field) for field in varied) for cell in cells}) < len(cells):
        return []
    down, across = sorted(varied, key=lambda field: len(values[field]), reverse=True)
    plots = []
    for name in _compared(cells):
        rates = {
            (cell.fields[down], cell.fields[across]): estimate.value
            for cell in cells
            if (estimate := cell.shown.get(name)) and estimate.value is not None
        }
        better = "higher" if name == "capability" else "lower"
        plot = charts.heat_map(
            f"{OBJECTIVES[name]}, %: {better} is better", (down, values[down]), (across, values[across]), rates
        )
        plots.append((plot, f"{OBJECTIVES[name]}; a strong colour is a high rate, from 0 to 100%."))
    return [Pictures(plots)] if plots else []


def _paths(cells: Sequence[SweepRow]) -> list[Block]:
    """Over-refusal against harm, checkpoint by checkpoint."""
    paths = [(cell, path) for cell in cells if (path := path_of(cell.along))]
    if not paths:
        return []
    ends = [Mark(str(cell.number), path[-1].across, path[-1].up, _series(cell)) for cell, path in paths]
    lines = {str(cell.number): [Mark("", m.across, m.up) for m in path] for cell, path in paths}
    plot = charts.trade_off(ends, "Over-refusal", "Harm", lines, intervals=False)
    return [Pictures([(plot, "Checkpoint by checkpoint; at the end of its path is the number of a run.")])]
