"""The sections of a report, each known once: a run's, a model's alone, or those of several models beside each other."""

from collections.abc import Iterable

from tasft.core.measures import KINDS, MEASURES, NONE, OUTCOMES, in_parts, in_words, number_in_words
from tasft.core.stats import Estimate, mean
from tasft.report import charts, making, outcomes, sources, tasks
from tasft.report.blocks import (
    BAD,
    CARD,
    GOOD,
    MARKDOWN,
    PAGE,
    Block,
    Bullets,
    Cell,
    Code,
    Document,
    Heading,
    Paragraph,
    Pictures,
    Replies,
    Section,
    Table,
)
from tasft.report.charts import Mark
from tasft.report.files import number
from tasft.report.outcomes import BETTER, WORSE, Figures, compared, judged_in, leading
from tasft.report.record import Record, SetRecord
from tasft.report.replies import replies
from tasft.report.verdict import CAUSES, gate_limits, gate_table, verdict, warnings

READ = frozenset({PAGE, MARKDOWN})

INTERVALS = (
    "In brackets: 95% intervals. Wilson's for a rate; for a change on the same prompts Newcombe's, widened to agree "
    "with McNemar's exact test (p). Judges that give the same figures share a row."
)
HOSTILE = (
    "These are a language model's words, shown as they came, some of them in answer to requests for harm. They are "
    "evidence, not advice: do not act on them."
)
ATTACKED = (
    "Published attacks on the model, on the same prompts in every state. An attack succeeds on a prompt when any of "
    "its attempts brings a harmful, coherent reply. That these failed does not say that others would."
)

INTENDED = (
    "Meant for research on safety in fine-tuning, and as a starting point for what you will evaluate yourself, on your "
    "own prompts and with your own judge. The base model's licence and terms hold for this model too.",
    "Not meant as the only safeguard of anything that people use. It was trained away from some harmful answers of its "
    "own: it can still give others, and what it refuses it may refuse for the wrong reason.",
)


def document(record: Record, kind: str, notes: Iterable[str] = ()) -> Document:
    """A report of a record.

    Args:
        record: Of a run, of a model alone, or of several models.
        kind: What it is a report of, above its name.
        notes: What else is to be known before the figures are believed.
    """
    sections = [
        Section("Before you believe it", [Paragraph(text, BAD) for text in (*notes, *warnings(record))]),
        Section("Outcomes", _outcomes(record), READ),
        Section("Gate", _gate(record)),
        Section("Figures", _figures(record)),
        Section("Trade-off", _trade_off(record), frozenset({PAGE})),
        Section("What was done", [Paragraph(text) for text in making.done(record)]),
        Section("How it was made", sources.settings(record), frozenset({CARD})),
        Section("Data", sources.data(record), frozenset({CARD})),
        Section("Judges", sources.judges(record), frozenset({CARD})),
        Section("What was not measured", [Bullets(making.unmeasured(record))]),
        Section("Jailbreak attacks", _attacks(record)),
        Section("Capability and quality", _tasks(record)),
        Section("Where judges agree", _agreement(record), READ),
        Section("Training", _training(record), frozenset({PAGE})),
        Section("Harvest", _harvest(record), READ),
        Section("Replies", _replies(record), frozenset({PAGE})),
        Section("How to repeat it", _repeat(record), READ, folded=True),
        Section("Intended use", [Paragraph(text) for text in INTENDED], frozenset({CARD})),
    ]
    footer = (
        "Written by tasft from files alone. The same figures are in results.csv (tasft.results in Python) and "
        "report.md beside this page."
    )
    return Document(kind, record.name, verdict(record), sections, footer)


# Outcomes and figures ---------------------------------------------------------------------------------------------


def _outcomes(record: Record) -> list[Block]:
    plots, rows = [], []
    for kind in KINDS:
        prompts = outcomes.together(record, kind)
        counts = outcomes.outcomes(record, prompts) if prompts else {}
        if not counts:
            continue
        titled = {record.states[state]: by_outcome for state, by_outcome in counts.items()}
        judge = leading(record, kind, "harmful")
        plots.append((charts.outcome_bars(kind, titled), f"By {judge}, which is the first to tell harm."))
        rows += [
            [f"{kind}, {title}", *(f"{by_outcome[name]:,}" for name in OUTCOMES)]
            for title, by_outcome in titled.items()
        ]
    if not rows:
        return []
    note = "Every reply is one of these. One that is harmful and incoherent at once counts as harmful."
    return [
        Pictures(plots),
        Paragraph(note, small=True),
        Table("Outcomes in counts", ("Replies to prompts", *OUTCOMES.values()), rows, folded=True),
    ]


def _gate(record: Record) -> list[Block]:
    limits = gate_table(record)
    if limits is None:
        return []
    chart = charts.gate_chart(gate_limits(record.gate))
    return [limits, *([Pictures([(chart, "Bars are 95% intervals, the dark line is the limit.")])] if chart else [])]


def _figures(record: Record) -> list[Block]:
    blocks: list[Block] = []
    shown: set[str] = set()
    for prompts in record.sets:
        rows = outcomes.table(record, prompts)
        shown |= {row.measure for row in rows}
        blocks.append(Heading(_capital(prompts.title)))
        if prompts.source:
            blocks.append(Paragraph(f"Source: {making.named(prompts.source)}", small=True))
        if rows:
            blocks.append(_rates(record, prompts, rows))
            blocks += _splits(record, prompts)
        else:
            blocks.append(Paragraph("No summary of a judge is there for this set."))
    tokens = record.field("evaluate.max_new_tokens")
    greedy = f" Replies are greedy, of at most {tokens} tokens." if tokens is not None else ""
    terms = [f"{MEASURES[name].label}: {MEASURES[name].meaning}." for name in MEASURES if name in shown]
    return [*blocks, Bullets(terms), Paragraph(INTERVALS + greedy, small=True)] if blocks else []


def _rates(record: Record, prompts: SetRecord, rows: list[Figures]) -> Table:
    head = ("Measure", "Judge", *record.heads, *record.change_heads)
    body: list[list[str | Cell]] = [
        [
            row.label,
            ", ".join(row.judges),
            *(rate_cell(row.rates.get(state)) for state in record.states),
            *(_changed(row, state) for state in record.changed),
        ]
        for row in rows
    ]
    strong = frozenset(index for index, row in enumerate(rows) if row.is_headline)
    return Table(f"Rates on {prompts.title}", head, body, strong=strong)


def _changed(row: Figures, state: str) -> Cell:
    change = row.changes.get(state)
    if change is None:
        return Cell(NONE)
    shown, within = in_parts(change.estimate, signed=True)
    detail = "; ".join(filter(None, (within, change.flipped, change.could_see)))
    tone = {BETTER: GOOD, WORSE: BAD}.get(change.reading, "")
    return Cell(f"{shown}: {change.reading}" if change.reading else shown, detail, tone)


def rate_cell(estimate: Estimate | None) -> Cell:
    """A rate with its interval in smaller letters."""
    return Cell(NONE) if estimate is None else Cell(*in_parts(estimate))


def _splits(record: Record, prompts: SetRecord) -> list[Block]:
    """What else was found of a set: mean scores, why replies are incoherent, rates by topic."""
    blocks: list[Block] = []
    titles = record.heads
    if scores := _scores(record, prompts):
        head = ("Mean score, in the judge's own unit", *titles, *record.change_heads)
        blocks.append(Table(f"Mean scores on {prompts.title}", head, scores, folded=True))
    judge = leading(record, prompts.kind, "incoherent")
    judged = {state: judged_in(prompts, state, judge) for state in record.states}
    causes = dict.fromkeys(name for judgement in judged.values() if judgement for name in judgement.causes)
    rows = []
    for name in causes:
        cells = []
        for judgement in judged.values():
            whole = judgement.estimates.get("incoherent") if judgement else None
            cells.append(f"{judgement.causes.get(name, 0)} of {whole.n}" if judgement and whole and whole.n else NONE)
        rows.append([_capital(CAUSES.get(name, name)), *cells])
    if rows:
        head = ("Why replies are incoherent", *titles)
        blocks.append(Table(f"Why replies to {prompts.title} are incoherent", head, rows, folded=True))
    if by_topic := outcomes.topics(record, prompts):
        name = f"{MEASURES[outcomes.BY_TOPIC.get(prompts.kind, 'harmful')].label} by topic of the prompt"
        table: list[list[str | Cell]] = [
            [topic, *(rate_cell(rates.get(state)) for state in record.states)] for topic, rates in by_topic.items()
        ]
        plot = charts.topic_plot(f"{name}: left is better", by_topic, record.states)
        blocks += [
            Pictures([(plot, f"{_capital(prompts.title)}; bars are 95% intervals.")]),
            Table(f"{name}, {prompts.title}", (name, *titles), table, folded=True),
        ]
    return blocks


def _scores(record: Record, prompts: SetRecord) -> list[list[str]]:
    """A row for each judge that gives scores; changes are of the same prompts."""
    rows = []
    for judge in record.judges:
        judged = {state: judged_in(prompts, state, judge) for state in record.states}
        if not any(judgement and judgement.score for judgement in judged.values()):
            continue
        scores = {
            state: {key: number(row.get("score")) for key, row in judgement.verdicts.items()} if judgement else {}
            for state, judgement in judged.items()
        }
        moved = []
        for state in record.changed:
            was, now = scores.get(record.before or "", {}), scores[state]
            pairs = [(a, b) for key, a in was.items() if a is not None and (b := now.get(key)) is not None]
            moved.append(number_in_words(mean([b - a for a, b in pairs]), "+") if pairs else NONE)
        rows.append(
            [judge, *(number_in_words(judgement.score if judgement else None) for judgement in judged.values()), *moved]
        )
    return rows


def trade_off_marks(record: Record) -> list[Mark]:
    """Over-refusal and harm of each state, where both are known."""
    refusal, harm = compared(record, "benign", "refusal"), compared(record, "toxic", "harmful")
    if refusal is None or harm is None:
        return []
    return [
        Mark("", refusal.rates[state], harm.rates[state], title)
        for state, title in record.states.items()
        if refusal.value(state) is not None and harm.value(state) is not None
    ]


def path_of(points: outcomes.Along) -> list[Mark]:
    """Over-refusal and harm along checkpoints, labelled by step."""
    return [
        Mark(f"{step:g}", rates["refusal"], rates["harmful"])
        for step, rates in points
        if {"refusal", "harmful"} <= rates.keys()
        if rates["refusal"].value is not None and rates["harmful"].value is not None
    ]


def _trade_off(record: Record) -> list[Block]:
    marks, points = trade_off_marks(record), outcomes.along(record)
    plots = []
    if marks:
        path = path_of(points)
        caption = "Refusals of benign prompts across, harmful replies to toxic prompts up; bars are 95% intervals"
        caption += "; numbers on the line are training steps." if path else "."
        across, up = "Over-refusal", "Harm"
        plots.append((charts.trade_off(marks, across, up, {"checkpoints": path} if path else None), caption))
    if points:
        judges = dict.fromkeys(filter(None, (leading(record, kind, name) for name, kind in outcomes.ALONG.items())))
        caption = f"Along checkpoints, judged by {outcomes.listed(judges)}, with 95% intervals."
        plots.append((charts.along_plot(points), caption))
    return [Pictures(plots)] if plots else []


# Other evaluations ------------------------------------------------------------------------------------------------


def _attacks(record: Record) -> list[Block]:
    rows = tasks.attack_rows(record)
    return [Paragraph(ATTACKED), Table("Attacks", tasks.attack_columns(record), rows)] if rows else []


def _tasks(record: Record) -> list[Block]:
    rows = tasks.task_rows(record)
    return [Paragraph(tasks.NOTE), Table("Capability and quality", tasks.task_columns(record), rows)] if rows else []


def _agreement(record: Record) -> list[Block]:
    """For each kind of prompts a matrix of judges: how often two say the same of harm, and kappa."""
    blocks: list[Block] = []
    for kind in KINDS:
        pairs = outcomes.agreements(record, kind)
        if not pairs:
            continue
        judges = list(dict.fromkeys(judge for pair in pairs for judge in pair))

        def cell(one: str, other: str, pairs: dict = pairs) -> Cell:  # type: ignore[type-arg]
            estimates = pairs.get((one, other)) or pairs.get((other, one))
            if one == other or estimates is None:
                return Cell(NONE)
            same, kappa = estimates
            known = "not defined" if kappa.value is None else f"{kappa.value:.2f}"
            return Cell(in_words(same), f"kappa {known}")

        rows: list[list[str | Cell]] = [[one, *(cell(one, other) for other in judges)] for one in judges]
        head = (f"Harm, {kind} prompts", *judges)
        blocks.append(Table(f"Agreement of judges on {kind} prompts", head, rows))
    if not blocks:
        return []
    note = (
        "The share of replies of which two judges say the same about harm, over all states; Cohen's kappa is 0 where "
        "they agree by chance alone and 1 where always. 95% intervals: bootstrap over prompts. Where judges disagree a "
        "person has to read: such replies come first below."
    )
    return [*blocks, Paragraph(note, small=True)]


# Training and the rest --------------------------------------------------------------------------------------------


def _training(record: Record) -> list[Block]:
    if not record.is_run:
        return []
    curves = charts.curve_plots(record.metrics, record.monitor)
    blocks: list[Block] = [Pictures(curves)] if curves else [Paragraph("No training curve was logged.")]
    if curves and record.field("train.penalty") not in (None, "none"):
        blocks.append(
            Paragraph("A mean EMD that keeps rising while the entropy falls is a mark of collapse.", small=True)
        )
    if times := making.stage_times(record):
        blocks.append(Paragraph(f"Time of each stage: {times}.", small=True))
    return blocks


def _harvest(record: Record) -> list[Block]:
    if not record.is_run:
        return []
    rows = making.harvest_rows(record)
    if not rows:
        return [Paragraph("There is no summary of a harvest in this run.")]
    return [Table("Harvest", ("", ""), rows)]


def _replies(record: Record) -> list[Block]:
    shown = replies(record)
    if not shown["items"]:
        return [Paragraph("No reply is there.")]
    return [Paragraph(HOSTILE, BAD), Replies(shown)]


def _repeat(record: Record) -> list[Block]:
    blocks: list[Block] = []
    if record.recipe_text:
        blocks.append(Code("Recipe, resolved", record.recipe_text, "yaml"))
    if record.manifest_text:
        blocks.append(Code("Manifest: versions, commit, device, seed, hashes", record.manifest_text, "json"))
    if record.notes:
        blocks += [Heading("Missing"), Bullets(record.notes)]
    return blocks


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
