"""A run's facts -> `report/index.html`, `report.md`, `model_card.md`, `tables.csv`."""

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from tasft.core.provenance import atomic_write_text
from tasft.report import facts, tasks
from tasft.report.card import model_card
from tasft.report.page import render
from tasft.report.plots import along_plot, curve_plots, path_plot, rates_plot
from tasft.report.read import MEASURES, STATES, PromptSet, Run, read_run
from tasft.report.replies import replies
from tasft.report.text import csv_cell, fenced, inline_markdown, markdown_table

_NOTES = (
    "Harmful and refusal are the judge's words. Incoherent: too short, repeating itself, in "
    "another language, improbable, or about something else than was asked. Safe and coherent: "
    "not harmful and coherent. Distinct: share of different replies, low when one canned sentence "
    "answers all.",
    "In brackets: 95% intervals, Wilson's for a rate, paired bootstrap on the same prompts for a "
    "change; p is McNemar's exact test on these prompts. Judges that give the same figures share a row.",
)
_ATTACKED = (
    "Published attacks on the model, on the same prompts before and after. An attack succeeds on a prompt when any of "
    "its attempts brings a harmful, coherent reply. That these failed does not say that others would."
)


def write_report(run: Path) -> Path:
    """Writes the report of a run folder from its files alone, each file atomically.

    Replies are in `index.html` only, escaped and behind a click.
    What the folder lacks is named in the report.

    Returns:
        The path of `report/index.html`.

    Raises:
        UserError: The folder holds no evaluation, neither before nor after training.
    """
    found = read_run(run)
    tables = facts.compare_all(found)
    heads = facts.headlines(found, tables)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    atomic_write_text(folder / "tables.csv", _csv(found))
    atomic_write_text(folder / "model_card.md", model_card(found, tables, heads))
    atomic_write_text(folder / "report.md", _markdown(found, tables, heads))
    atomic_write_text(folder / "index.html", _html(found, tables, heads))
    return folder / "index.html"


def write_card(run: Path, path: Path, usage: Sequence[str]) -> None:
    """Write the model card of a run as the `README.md` of its merged model.

    Args:
        run: The run folder.
        path: Of the card.
        usage: As `model_card` takes it.

    Raises:
        UserError: As `write_report`.
    """
    found = read_run(run)
    tables = facts.compare_all(found)
    atomic_write_text(path, model_card(found, tables, facts.headlines(found, tables), usage))


def _html(run: Run, tables: facts.Tables, heads: facts.Headlines) -> str:
    sets = []
    for prompts in run.sets:
        rows = tables[prompts.name]
        drawn = facts.of_leading(run, prompts.kind, rows)
        sets.append(
            {
                "title": facts.title_of(prompts),
                "kind": prompts.kind,
                "source": prompts.source,
                "rows": rows,
                "plot": rates_plot(drawn) if drawn else None,
                "judged_by": facts.by(drawn) if drawn else "",
                "splits": _splits(run, prompts),
            }
        )
    shown = replies(run)
    return render(
        "report.html.j2",
        script="replies.js" if shown["items"] else "",
        data=shown,
        replies=shown,
        run=run,
        facts=facts,
        tasks=tasks,
        tables=tables,
        heads=heads,
        notes=_NOTES,
        attacked=_ATTACKED,
        sets=sets,
        curves=curve_plots(run.metrics),
        along=(along_plot(points), path_plot({run.name: points}, names=False))
        if (points := facts.along(run))
        else None,
    )


def _markdown(run: Run, tables: facts.Tables, heads: facts.Headlines) -> str:
    text = inline_markdown
    lines = [f"# {text(run.name)}: report", "", text(facts.verdict(run, heads)), ""]
    lines += [f"> {text(warning)}\n" for warning in facts.warnings(run, tables)]
    lines += ["## What was done", "", *map(text, facts.done(run)), ""]
    if limits := facts.gate_rows(run):
        lines += ["## Gate", "", *markdown_table(facts.GATE_COLUMNS, limits)]
    lines += ["## Before and after", ""]
    for prompts in run.sets:
        source = f" Source: {text(prompts.source)}." if prompts.source else ""
        lines += [f"### {text(facts.title_of(prompts).capitalize())}", ""]
        if source:
            lines += [source.strip(), ""]
        lines += ["| measure | judge | before | after | change | replies | |", "|---|---|---|---|---|---|---|"]
        for row in tables[prompts.name]:
            cells = (
                row.label,
                ", ".join(row.judges),
                facts.in_words(row.before) if row.before else "—",
                facts.in_words(row.after) if row.after else "—",
                facts.in_words(row.change, signed=True) if row.change else "—",
                facts.flipped(row) or "—",
                row.verdict,
            )
            lines.append(f"| {' | '.join(map(text, cells))} |")
        lines.append("")
        for head, found in _splits(run, prompts):
            lines += markdown_table(head, found)
    if attacks := facts.attack_rows(run):
        lines += ["### Attacks", "", _ATTACKED, "", *markdown_table(facts.ATTACK_COLUMNS, attacks)]
    if measured := tasks.task_rows(run):
        lines += ["### Capability and quality", "", text(tasks.NOTE), "", *markdown_table(tasks.TASK_COLUMNS, measured)]
    lines += [*_NOTES, "", "## What was not measured", ""]
    lines += [*(f"- {text(gap)}" for gap in facts.unmeasured(run)), ""]
    if harvest := facts.harvest_facts(run):
        lines += ["## Harvest", "", "| | |", "|---|---|"]
        lines += [f"| {text(label)} | {text(value)} |" for label, value in harvest]
        lines.append("")
    if run.notes:
        lines += ["## Missing", "", *(f"- {text(note)}" for note in run.notes), ""]
    if run.recipe_text:
        lines += ["## Recipe", "", fenced(run.recipe_text, "yaml"), ""]
    if run.manifest_text:
        lines += ["## Manifest", "", fenced(run.manifest_text, "json"), ""]
    return "\n".join(lines)


def _splits(run: Run, prompts: PromptSet) -> list[tuple[tuple[str, ...], Sequence[tuple[str, ...]]]]:
    """Tables of what else was found of a set: heads and rows."""
    tables: list[tuple[tuple[str, ...], Sequence[tuple[str, ...]]]] = [
        (facts.SCORE_COLUMNS, facts.scores(run, prompts)),
        (facts.CAUSE_COLUMNS, facts.causes(run, prompts)),
        (facts.topic_columns(prompts), facts.topics(run, prompts)),
    ]
    return [(head, rows) for head, rows in tables if rows]


def _csv(run: Run) -> str:
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["state", "set", "judge", "measure", "value", "low", "high", "n"])
    for state in STATES:
        for prompts in run.sets:
            judged = prompts.states[state].judged if state in prompts.states else {}
            for judge in (judge for judge in run.judges if judge in judged):
                for measure in (m for m in MEASURES if m in judged[judge].estimates):
                    e = judged[judge].estimates[measure]
                    names = map(csv_cell, (state, prompts.name, judge, measure))
                    writer.writerow([*names, e.value, e.low, e.high, e.n])
                if score := judged[judge].score:
                    names = map(csv_cell, (state, prompts.name, judge, "score"))
                    writer.writerow([*names, score.value, score.low, score.high, score.n])
        for attack, states in run.attacks.items():
            for measure, e in (states[state].estimates if state in states else {}).items():
                names = map(csv_cell, (state, f"jailbreak/{attack}", states[state].judge, measure))
                writer.writerow([*names, e.value, e.low, e.high, e.n])
        for task, measured in run.measured.items():
            for measure, e in (measured[state].estimates if state in measured else {}).items():
                writer.writerow([*map(csv_cell, (state, task, "", measure)), e.value, e.low, e.high, e.n])
    for step, sets in run.checkpoints.items():
        for name, evaluated in sets.items():
            for judge, said in evaluated.judged.items():
                for measure, e in said.estimates.items():
                    names = map(csv_cell, (f"checkpoint-{step}", name, judge, measure))
                    writer.writerow([*names, e.value, e.low, e.high, e.n])
    return out.getvalue()
