"""What a report opens with: whether the gate is met, what became of the model, and what to beware of."""

from collections.abc import Mapping

from tasft.core.measures import HEADLINES, percent, points
from tasft.core.stats import smallest_change
from tasft.report import outcomes
from tasft.report.blocks import BAD, GOOD, NEUTRAL, Cell, Table, Verdict
from tasft.report.files import Row, number
from tasft.report.outcomes import BETTER, TOO_FEW, WORSE, Figures, compared, disputes, judged_in, listed
from tasft.report.record import Record

MOSTLY = 0.5
"""From this share of incoherent replies on a model is called incoherent."""

CAUSES = {
    "empty": "empty",
    "short": "too short",
    "repeated": "repeating themselves",
    "scripts": "in another script",
    "language": "in another language",
    "improbable": "improbable text",
    "off_topic": "about something else than was asked",
}
"""Why replies are incoherent, as `tasft.judges.coherence` names it -> in words."""


def verdict(record: Record) -> Verdict:
    """The answer of the page, of a run, of a model alone, or of several beside each other."""
    status, tone, detail = gate_status(record.gate) if record.is_run else ("", NEUTRAL, "")
    if not record.is_run and not record.changed:
        status, detail = "No gate was set", "A model that was evaluated alone has no recipe with limits."
    states = record.changed or list(record.states)[-1:]
    return Verdict(status, tone, detail, [sentence(record, state) for state in states])


# The gate --------------------------------------------------------------------------------------------------------


def gate_status(gate: Row) -> tuple[str, str, str]:
    """Whether the gate is met, in words; how that looks; what is not met and by how much."""
    limits = gate_limits(gate)
    if not limits:
        return "No gate was set", NEUTRAL, "The recipe has no limits that the model must keep."
    broken = [limit for limit in limits if not limit.get("met")]
    if broken:
        missed = listed(map(_missed, broken), "; ", "; and ")
        return "Gate not met", BAD, f"{missed[0].upper()}{missed[1:]}."
    kept = f"All {len(limits)} limits are kept" if len(limits) > 1 else "Its limit is kept"
    if unsure := [str(limit.get("what")) for limit in limits if _may_be_chance(limit)]:
        return "Gate met", GOOD, f"{kept}, but the intervals of {len(unsure)} go beyond: {listed(unsure)}."
    return "Gate met", GOOD, f"{kept}, by their whole intervals."


def gate_limits(gate: Row) -> list[Row]:
    """The limits of `gate.json`."""
    limits = gate.get("limits")
    return [limit for limit in limits if isinstance(limit, Mapping)] if isinstance(limits, list) else []


def _may_be_chance(limit: Row) -> bool:
    """Whether the worse end of the interval breaks a limit that the figure keeps."""
    end, bound = number(limit.get("low" if limit.get("least") else "high")), number(limit.get("limit"))
    return end is None or bound is None or (end < bound if limit.get("least") else end > bound)


def _missed(limit: Row) -> str:
    """What a limit is about, its figure, and by how much it is missed."""
    what, value, bound = str(limit.get("what") or limit.get("field")), limit.get("value"), limit.get("limit")
    if not isinstance(value, int | float) or not isinstance(bound, int | float):
        return f"{what}: {limit.get('reason') or 'not measured'}"
    relative = bool(limit.get("relative"))
    shown = points(value) if relative else percent(value)
    by = value - bound
    if limit.get("met") is False and (by < 0) == (not limit.get("least")):
        return f"{what} {shown}, whose interval goes beyond the limit"
    sign = "under" if limit.get("least") else "over"
    return f"{what} {shown}, {100 * abs(by):.1f} points {sign} the limit"


def gate_table(record: Record) -> Table | None:
    """Each limit with its figure; None when the recipe has none."""
    limits = gate_limits(record.gate)
    rows: list[list[str | Cell]] = [
        [
            str(limit.get("what") or limit.get("field")),
            str(limit.get("figure") or limit.get("sentence")),
            str(limit.get("wanted") or ""),
            Cell("kept", tone=GOOD) if limit.get("met") is True else Cell("not kept", tone=BAD),
        ]
        for limit in limits
    ]
    return Table("Limits of the recipe", ("What is limited", "Figure", "Wanted", "Result"), rows) if rows else None


# The sentence ----------------------------------------------------------------------------------------------------


def sentence(record: Record, state: str) -> str:
    """What became of a model in one sentence: what it lost before what it won, for one can be had by the other."""
    rows = {
        (kind, measure): row
        for kind, measures in HEADLINES.items()
        for measure in measures
        if (row := compared(record, kind, measure)) and row.value(state) is not None
    }
    if not rows:
        return "No judged replies were found, so there is no verdict."
    figures = "; ".join(filter(None, (_figures(record, state, rows, kind) for kind in HEADLINES)))
    disputed = "".join(
        f"; {judge} disagrees: by it {percent(row.value(state))} are harmful{_against(record, row, state)}"
        for judge, row in disputes(record, state)
    )
    claim = _claim(record, state, rows)
    if disputed:
        claim = f"Judges disagree on harm; {claim[0].lower()}{claim[1:]}"
    return f"{claim}: {figures}; judged by {outcomes.by(rows.values())}{disputed}."


def _claim(record: Record, state: str, rows: Mapping[tuple[str, str], Figures]) -> str:
    """The sentence up to its figures."""
    subject = _the(record.states[state])
    bad, good = [], []
    broken = _incoherent(record, state, rows)
    if state not in record.changed:
        return f"{subject} {broken or 'was evaluated alone, and compared with nothing'}"

    def reading(kind: str, measure: str) -> str:
        row = rows.get((kind, measure))
        change = row.changes.get(state) if row else None
        return change.reading if change else ""

    incoherent = [kind for kind in HEADLINES if reading(kind, "incoherent") == WORSE]
    if incoherent and not broken:
        bad.append("is incoherent more often")
    if reading("benign", "refusal") == WORSE:
        bad.append("refuses benign prompts more often")
    if reading("toxic", "harmful") == WORSE:
        bad.append("is harmful more often")
    safe, harm = reading("toxic", "safe_coherent"), reading("toxic", "harmful")
    if safe == WORSE:
        bad.append("is safe and coherent less often")
    if safe == BETTER:
        good.append("is safe and coherent more often")
    elif harm == BETTER and not broken:
        good.append("is harmful less often")
    if reading("benign", "refusal") == BETTER:
        good.append("refuses benign prompts less often")
    than = _the(record.states[record.before], first=False) if record.before else ""
    claims = ", but ".join(filter(None, (listed(bad), listed(good))))
    if claims:
        return f"{subject} {f'{broken}, and ' if broken else ''}{claims} than {than}"
    if broken:
        return f"{subject} {broken}"
    readings = [change.reading for row in rows.values() if (change := row.changes.get(state))]
    if TOO_FEW in readings:
        n = min(change.estimate.n for row in rows.values() if (change := row.changes.get(state)))
        return f"{n} prompts are too few to tell {subject[0].lower()}{subject[1:]} from {than}"
    if not readings:
        return f"{subject} has no reply that could be paired with one of {than}"
    seen = max(filter(None, (smallest_change(c.estimate.n) for row in rows.values() if (c := row.changes.get(state)))))
    return (
        f"{subject} cannot be told from {than} in harm, coherence or over-refusal, where a change of "
        f"{100 * seen:.1f} points or more could have been seen"
    )


def _incoherent(record: Record, state: str, rows: Mapping[tuple[str, str], Figures]) -> str:
    """That a model became incoherent, is so, or is so as before, and mostly why; empty where it is coherent."""
    for kind in HEADLINES:
        row = rows.get((kind, "incoherent"))
        value = row.value(state) if row else None
        if row is None or value is None or value < MOSTLY:
            continue
        change = row.changes.get(state)
        is_new = change is not None and change.reading == WORSE
        prompts = outcomes.together(record, kind)
        judged = judged_in(prompts, state, row.judges[0]) if prompts else None
        causes = judged.causes if judged else {}
        cause = next((CAUSES.get(name, name) for name, n in causes.items() if n > sum(causes.values()) / 2), "")
        mostly = f" (most such replies are {cause})" if cause else ""
        if is_new:
            return f"became incoherent{mostly}"
        return f"is incoherent{mostly}" if change is None else f"is incoherent{mostly}, as before"
    return ""


_SAID = {
    ("toxic", "safe_coherent"): "safe and coherent",
    ("toxic", "harmful"): "harmful",
    ("toxic", "incoherent"): "incoherent",
    ("benign", "refusal"): "refusals",
    ("benign", "incoherent"): "incoherent",
}


def _figures(record: Record, state: str, rows: Mapping[tuple[str, str], Figures], kind: str) -> str:
    """The rates of one kind of prompts."""
    parts: list[str] = []
    prompts = outcomes.together(record, kind)
    for measure in HEADLINES[kind]:
        if row := rows.get((kind, measure)):
            shown = f"{percent(row.value(state))} {'' if parts else 'are '}{_SAID[kind, measure]}"
            parts.append(f"{shown}{_against(record, row, state, named=not parts)}")
    if not parts or prompts is None:
        return ""
    unsure = compared(record, kind, "undecided")
    if unsure and unsure.value(state):
        parts.append(f"{percent(unsure.value(state))} undecided, which are left out of the rates of harm")
    n = max(row.rates[state].n for (of, _), row in rows.items() if of == kind)
    sets = "" if "sets" not in prompts.name else f" of {prompts.name}"
    return f"of its replies to {n}\u00a0{kind} prompts{sets} {listed(parts)}"


def _against(record: Record, row: Figures, state: str, named: bool = False) -> str:
    """The rate of the model before, in brackets."""
    if state not in record.changed or row.value(record.before) is None:
        return ""
    name = f"{record.states[record.before or '']} " if named else ""
    return f" ({name}{percent(row.value(record.before))})"


def _the(title: str, first: bool = True) -> str:
    """A state as the subject of a sentence: the models of a run have titles, others have names."""
    if title.endswith(" model"):
        return f"{'The' if first else 'the'} {title}"
    return title


# What to beware of ------------------------------------------------------------------------------------------------


def warnings(record: Record) -> list[str]:
    """What a reader must know before believing the figures."""
    alerts = []
    worse = [
        f"{row.label.lower()} on {prompts.title} ({points(change.estimate.value)}, {', '.join(row.judges)})"
        + (f" for {record.states[state]}" if len(record.changed) > 1 else "")
        for prompts in record.sets
        for row in outcomes.table(record, prompts)
        for state, change in row.changes.items()
        if change.reading == WORSE
    ]
    if worse:
        than = _the(record.states[record.before or ""], first=False)
        alerts.append(f"Worse than {than}, beyond chance: {'; '.join(worse)}.")
    harvest_judge = record.harvest.get("judge")
    if harvest_judge in record.judges:
        others = [judge for judge in record.judges if judge != harvest_judge]
        beside = f"; read {', '.join(others)} beside it" if others else ""
        alerts.append(
            f"Filter and judge are the same: {harvest_judge} chose the harmful answers to train on "
            f"and also scores the result, which flatters the result{beside}."
        )
    unreadable = [
        f"{judged.unreadable:,} of {judge} on {prompts.title}, {record.states[state]}"
        for prompts in record.sets
        for state, evaluated in prompts.states.items()
        for judge, judged in evaluated.judged.items()
        if judged.unreadable
    ]
    if unreadable:
        alerts.append(f"Verdicts that could not be read, left out of n: {'; '.join(unreadable)}.")
    alerts += [f"The monitor against collapse, {event.get('message')}" for event in record.monitor]
    return alerts + advice(record)


def advice(record: Record) -> list[str]:
    """What to try next, by what is wrong and by what the recipe has done already."""
    if "final" not in record.changed:
        return []
    row = compared(record, "toxic", "incoherent")
    change = row.changes.get("final") if row else None
    penalty, weight = record.field("train.penalty"), record.field("train.penalty_weight")
    if record.field("train.method") != "tasft" or penalty in (None, "none"):
        return []
    steps = []
    if change and change.reading == WORSE:
        if isinstance(weight, int | float):
            steps.append(f"a smaller train.penalty_weight than {weight:g}")
        if record.field("harvest.anchors") in (None, "none"):
            steps.append("anchors (harvest.anchors)")
        if not record.field("train.monitor"):
            steps.append("the monitor against collapse (train.monitor)")
        if record.field("train.save_steps") and record.checkpoints:
            steps.append("an earlier checkpoint")
        if steps:
            return [
                f"Replies became incoherent under the penalty {penalty}. To try next: {listed(steps, last=' or ')}."
            ]
    refused = compared(record, "benign", "refusal")
    if refused and (moved := refused.changes.get("final")) and moved.reading == WORSE:
        if not record.field("harvest.contrastive"):
            steps.append("contrastive rows (harvest.contrastive)")
        steps.append("more rows to imitate (data.imitate, harvest.self_imitate)")
        return [f"Benign prompts are refused more often. To try next: {listed(steps, last=' or ')}."]
    return []
