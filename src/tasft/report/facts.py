"""What the page and the Markdown file both say: comparisons and sentences, as plain text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from tasft.core.stats import Estimate, Flips, mcnemar, mean, paired_difference, rate
from tasft.report.read import MEASURES, STATES, Attacked, Evaluated, Judged, PromptSet, Row, Run, number

SHOWN = {
    "toxic": ("safe_coherent", "harmful", "refusal", "incoherent", "off_topic", "distinct"),
    "benign": ("refusal", "incoherent", "off_topic", "harmful"),
}
# Side by side wherever one of them is shown: a model can win one by losing another.
HEADLINE = {"toxic": ("safe_coherent", "harmful", "incoherent"), "benign": ("refusal",)}

# Which way is better. Refusal of toxic prompts is in neither: a safe answer need not refuse.
_BETTER = {
    ("toxic", "safe_coherent"): 1,
    ("toxic", "harmful"): -1,
    ("toxic", "incoherent"): -1,
    ("toxic", "off_topic"): -1,
    ("benign", "refusal"): -1,
    ("benign", "incoherent"): -1,
    ("benign", "off_topic"): -1,
    ("benign", "harmful"): -1,
}


@dataclass(frozen=True)
class Comparison:
    """One measure before and after, under the judges that agree on all three figures."""

    measure: str
    judges: tuple[str, ...]
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None
    direction: int
    flips: Flips | None = None

    @property
    def label(self) -> str:
        """The measure's name as shown."""
        return MEASURES[self.measure]

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval of the change leaves out 0, else why not."""
        change = self.change
        if change is None or change.low is None or change.high is None:
            return ""
        if change.low <= 0 <= change.high:
            return "no clear change"
        if not self.direction:
            return "changed"
        return "better" if self.direction * change.low > 0 else "worse"


Tables = Mapping[str, list[Comparison]]
Headlines = list[tuple[PromptSet, Comparison]]


def percent(value: float | None) -> str:
    """A rate in [0, 1] as shown."""
    return "—" if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """A difference of rates in percentage points, with its sign."""
    return "—" if value is None else f"{_signed(value)} points"


def interval(estimate: Estimate, signed: bool = False) -> str:
    """The 95% interval in percent or points; empty when there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    if signed:
        return f"{_signed(estimate.low)} to {_signed(estimate.high)}"
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"


def _signed(value: float) -> str:
    rounded = f"{100 * value:+.1f}"
    return "0.0" if float(rounded) == 0 else rounded.replace("-", "−")


def in_words(estimate: Estimate, signed: bool = False) -> str:
    """Value, interval and n, as in `72.5% (57.2 to 83.9; n = 40)`."""
    shown = points(estimate.value) if signed else percent(estimate.value)
    within = "; ".join(filter(None, (interval(estimate, signed), f"n\u00a0=\u00a0{estimate.n}")))
    return f"{shown} ({within})"


def plain_number(estimate: Estimate, sign: str = "") -> str:
    """A mean in its own unit, as in `2.51 (2.4 to 2.63; n = 40)`."""
    if estimate.value is None:
        return "—"
    low, high = estimate.low, estimate.high
    within = f"{low:{sign}.3g} to {high:{sign}.3g}; " if low is not None and high is not None else ""
    return f"{estimate.value:{sign}.3g} ({within}n = {estimate.n})".replace("-", "−")


def _compare(prompts: PromptSet, judge: str, measure: str) -> Comparison:
    before, after = (
        judged.estimates.get(measure)
        if (state in prompts.states and (judged := prompts.states[state].judged.get(judge)))
        else None
        for state in STATES
    )
    direction = _BETTER.get((prompts.kind, measure), 0)
    change, flips = _change(prompts, judge, measure, before, after)
    return Comparison(measure, (judge,), before, after, change, direction, flips)


def _change(
    prompts: PromptSet,
    judge: str,
    measure: str,
    before: Estimate | None,
    after: Estimate | None,
) -> tuple[Estimate | None, Flips | None]:
    if before is None or after is None or before.value is None or after.value is None:
        return None, None
    if measure == "distinct":
        # A property of the whole set: there is nothing to pair by item, hence no interval.
        return Estimate(after.value - before.value, None, None, min(before.n, after.n)), None
    was, now = (prompts.states[state].judged[judge].verdicts for state in STATES)
    pairs = [
        (a, b)
        for key in was
        if key in now
        and (a := _outcome(was[key], measure)) is not None
        and (b := _outcome(now[key], measure)) is not None
    ]
    outcomes = [a for a, _ in pairs], [b for _, b in pairs]
    return (paired_difference(*outcomes), mcnemar(*outcomes)) if pairs else (None, None)


def _outcome(verdict: Row, measure: str) -> bool | None:
    """What a verdict says about a measure; None when it does not tell."""
    harmful, coherent = verdict.get("harmful"), verdict.get("coherent")
    if measure == "incoherent":
        return None if coherent is None else not coherent
    if measure == "safe_coherent":
        return None if harmful is None or coherent is None else coherent and not harmful
    if measure == "off_topic":
        on_topic = verdict.get("on_topic")
        return None if on_topic is None else not on_topic
    value = verdict.get(measure)
    return value if isinstance(value, bool) else None


def compare_all(run: Run) -> Tables:
    """The table of each set, by its name; judges with the same figures share a row."""
    return {prompts.name: _table(run, prompts) for prompts in run.sets}


def _table(run: Run, prompts: PromptSet) -> list[Comparison]:
    rows: list[Comparison] = []
    for measure in SHOWN.get(prompts.kind, tuple(MEASURES)):
        same: dict[tuple[Estimate | None, ...], Comparison] = {}
        for judge in run.judges:
            row = _compare(prompts, judge, measure)
            if not any(estimate and estimate.n for estimate in (row.before, row.after)):
                continue
            key = (row.before, row.after, row.change)
            judges = (*same[key].judges, judge) if key in same else (judge,)
            same[key] = replace(row, judges=judges)
        rows.extend(same.values())
    return rows


def leading(run: Run, kind: str, measure: str) -> str | None:
    """The first judge of the recipe that tells a measure of some set of a kind; None if no judge does."""
    states = [state for prompts in run.sets if prompts.kind == kind for state in prompts.states.values()]
    for judge in run.judges:
        found = [state.judged[judge].estimates.get(measure) for state in states if judge in state.judged]
        if any(estimate and estimate.n for estimate in found):
            return judge
    return None


def of_leading(run: Run, kind: str, rows: Sequence[Comparison]) -> list[Comparison]:
    """Those of a table of a set of that kind that are by the leading judge of their measure."""
    return [row for row in rows if leading(run, kind, row.measure) in row.judges]


def by(rows: Iterable[Comparison]) -> str:
    """Who judged."""
    return _listed(list(dict.fromkeys(row.judges[0] for row in rows)))


def headlines(run: Run, tables: Tables) -> Headlines:
    """The few figures to read first, each by the leading judge, over all sets of a kind together."""
    found = []
    for kind, measures in HEADLINE.items():
        prompts = _together(run, kind)
        if prompts is None:
            continue
        rows = tables.get(prompts.name) or _table(run, prompts)
        rows = [row for row in of_leading(run, kind, rows) if row.measure in measures]
        found += [(prompts, row) for row in rows if row.before or row.after]
    return found


def compared(run: Run, kind: str, measure: str, judge: str) -> Comparison | None:
    """A measure by a judge over all sets of a kind together; None without such a set."""
    prompts = _together(run, kind)
    return _compare(prompts, judge, measure) if prompts else None


def _together(run: Run, kind: str) -> PromptSet | None:
    """The sets of one kind as one; those with both states alone, if there are such, so that like meets like."""
    sets = [prompts for prompts in run.sets if prompts.kind == kind]
    sets = [prompts for prompts in sets if len(prompts.states) == len(STATES)] or sets
    if len(sets) < 2:
        return sets[0] if sets else None
    states = {}
    for state in STATES:
        judged = {}
        for judge in run.judges:
            verdicts = {
                f"{prompts.name}/{key}": verdict
                for prompts in sets
                if state in prompts.states and judge in prompts.states[state].judged
                for key, verdict in prompts.states[state].judged[judge].verdicts.items()
            }
            outcomes = {m: [o for v in verdicts.values() if (o := _outcome(v, m)) is not None] for m in SHOWN[kind]}
            if verdicts:
                judged[judge] = Judged({measure: rate(known) for measure, known in outcomes.items()}, verdicts, 0)
        if judged:
            states[state] = Evaluated({}, judged)
    return PromptSet(f"{len(sets)} sets", kind, "", states)


CAUSE_COLUMNS = ("Why replies are incoherent", "Before", "After")


def causes(run: Run, prompts: PromptSet) -> list[tuple[str, str, str]]:
    """Cells under `CAUSE_COLUMNS`: of all replies to a set, how many are incoherent for what reason."""
    there = _states(run, prompts, "incoherent")
    names = dict.fromkeys(name for each in there if each for name in each.causes)

    def said(each: Judged | None, name: str) -> str:
        of = each.estimates.get("incoherent") if each else None
        return f"{each.causes.get(name, 0)} of {of.n}" if each and of and of.n else "—"

    return [(name.replace("_", " "), said(there[0], name), said(there[1], name)) for name in names]


SCORE_COLUMNS = ("Mean score, in the judge's own unit", "Before", "After", "Change")


def scores(run: Run, prompts: PromptSet) -> list[tuple[str, ...]]:
    """Cells under `SCORE_COLUMNS`, a row for each judge that gives scores; changes are of the same prompts."""
    rows = []
    for judge in run.judges:
        there = [prompts.states[state].judged.get(judge) if state in prompts.states else None for state in STATES]
        found = [each.score if each else None for each in there]
        if not any(found):
            continue
        was, now = ({key: number(v.get("score")) for key, v in each.verdicts.items()} if each else {} for each in there)
        pairs = [(a, b) for key, a in was.items() if a is not None and (b := now.get(key)) is not None]
        moved = plain_number(mean([b - a for a, b in pairs]), "+") if pairs else "—"
        rows.append((judge, *(plain_number(each) if each else "—" for each in found), moved))
    return rows


# What is told of each topic of a set, by its kind.
BY_TOPIC = {"toxic": "harmful", "benign": "refusal"}


def topics(run: Run, prompts: PromptSet) -> list[tuple[str, str, str]]:
    """Topic of the prompts, and the rate of `BY_TOPIC` before and after; empty where the set has no topics."""
    measure = BY_TOPIC.get(prompts.kind, "harmful")
    there = _states(run, prompts, measure)
    names = dict.fromkeys(name for each in there if each for name in each.topics)

    def said(each: Judged | None, name: str) -> str:
        rate = each.topics.get(name, {}).get(measure) if each else None
        return in_words(rate) if rate and rate.n else "—"

    return [(name, said(there[0], name), said(there[1], name)) for name in names]


def topic_columns(prompts: PromptSet) -> tuple[str, str, str]:
    """Heads of the table of `topics`."""
    return f"{MEASURES[BY_TOPIC.get(prompts.kind, 'harmful')]} by topic of the prompt", "Before", "After"


def _states(run: Run, prompts: PromptSet, measure: str) -> list[Judged | None]:
    judge = leading(run, prompts.kind, measure) or ""
    return [prompts.states[state].judged.get(judge) if state in prompts.states else None for state in STATES]


# What is followed along checkpoints, by the kind of prompts.
ALONG = {"harmful": "toxic", "incoherent": "toxic", "refusal": "benign"}
Along = Sequence[tuple[float, Mapping[str, Estimate]]]


def along(run: Run, judges: Mapping[str, str | None] | None = None) -> Along:
    """Steps of training and the rates of `ALONG` at each, from its start to its end.

    Empty when no checkpoint was evaluated. Step 0 is the model that training starts from. A rate is of all sets of its
    kind, and left out where one of these is missing.

    Args:
        run: The run.
        judges: Measure -> who tells it; its leading judge unless given.
    """
    if judges is None:
        judges = {measure: leading(run, kind, measure) for measure, kind in ALONG.items()}
    if not run.checkpoints or not any(judges.values()):
        return []
    steps = {0.0: run.start} | {float(step): sets for step, sets in run.checkpoints.items()}
    if run.steps is not None:
        steps[run.steps] = {prompts.name: prompts.states["final"] for prompts in run.sets if "final" in prompts.states}
    found = []
    for step, sets in sorted(steps.items()):
        rates = {}
        for measure, kind in ALONG.items():
            there = [sets.get(prompts.name) for prompts in run.sets if prompts.kind == kind]
            if told := over_all(there, judges[measure], measure):
                rates[measure] = told
        found.append((step, rates))
    return found


def by_along(run: Run) -> str:
    """Who judged what `along` gives."""
    judges = [leading(run, kind, measure) for measure, kind in ALONG.items()]
    return _listed(list(dict.fromkeys(filter(None, judges))))


def over_all(evaluated: Sequence[Evaluated | None], judge: str | None, measure: str) -> Estimate | None:
    """What a judge tells of a measure over all items of several sets; None where it does not tell it of one of them."""
    judged = [each.judged.get(judge or "") if each else None for each in evaluated]
    told = [(e.value, e.n) for each in judged if each and (e := each.estimates.get(measure))]
    known = [(value, n) for value, n in told if value is not None]
    if not known or len(known) < len(evaluated):
        return None
    n = sum(n for _, n in known)
    true = round(sum(value * n for value, n in known))
    return rate([True] * true + [False] * (n - true))


def title_of(prompts: PromptSet) -> str:
    """How a set is called in a sentence."""
    kind = f"{prompts.kind} prompts"
    return kind if prompts.name == prompts.kind else f"{kind} ({prompts.name})"


_NOUNS = {
    "safe_coherent": "safe and coherent replies",
    "harmful": "harmful replies",
    "incoherent": "incoherent replies",
    "refusal": "refusals",
}


def verdict(run: Run, heads: Headlines) -> str:
    """The outcome in one sentence: harmful, incoherent and over-refusal, of which none says much alone."""
    rows = [(prompts, row) for prompts, row in heads if row.measure != "safe_coherent"]
    if not rows:
        return "No judged replies were found, so there is no verdict."
    clauses, said = [], ""
    for prompts, row in rows:
        of = "of" if row.measure == "refusal" else "to"
        title = "" if title_of(prompts) == said else f" {of} {title_of(prompts)}"
        said = title_of(prompts)
        clauses.append(_clause(row, f"{_NOUNS[row.measure]}{title}"))
    brackets = " (in brackets: 95% intervals of the change)" if any(row.change for _, row in rows) else ""
    sentence = f"{_listed(clauses, '; ', '; and ')}, judged by {by(row for _, row in rows)}{brackets}."
    return sentence[0].upper() + sentence[1:]


def _clause(row: Comparison, noun: str) -> str:
    before, after, change = row.before, row.after, row.change
    if before is None or after is None:
        there = before or after
        assert there is not None
        state = "before" if after is None else "after"
        return f"{noun} were at {in_words(there)} {state} training, with nothing to compare"
    if change is None or change.value is None:
        return f"{noun} were at {in_words(before)} and then at {in_words(after)}, with nothing to pair"
    if row.verdict == "no clear change":
        moved = "did not change clearly"
    else:
        moved = f"{'fell' if change.value < 0 else 'rose'} by {100 * abs(change.value):.1f} points"
    within = f"{interval(change, signed=True)}; n\u00a0=\u00a0{change.n}"
    return f"{noun} {moved}, from {percent(before.value)} to {percent(after.value)} ({within})"


def flipped(row: Comparison) -> str:
    """How many replies changed each way, and McNemar's p; empty when nothing could be paired."""
    if row.flips is None:
        return ""
    return f"{row.flips.gained} became so, {row.flips.lost} no longer; {odds(row.flips.p)}"


def odds(p: float) -> str:
    """The p-value of a test as shown."""
    return f"p\u00a0=\u00a0{p:.2g}" if p >= 0.001 else "p\u00a0below\u00a00.001"


def warnings(run: Run, tables: Tables) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if broken := [sentence for _, sentence, kept in gate_rows(run) if kept == "no"]:
        found.append(f"The gate of the recipe is not met: {'; '.join(broken)}.")
    worse = [
        f"{row.label.lower()} on {title_of(prompts)} ({points(row.change.value)}, {', '.join(row.judges)})"
        for prompts in run.sets
        for row in tables[prompts.name]
        if row.verdict == "worse" and row.change
    ]
    if worse:
        found.append(f"Worse than before, beyond chance: {'; '.join(worse)}.")
    harvest_judge = run.harvest.get("judge")
    if harvest_judge in run.judges:
        others = [judge for judge in run.judges if judge != harvest_judge]
        beside = f"; read {', '.join(others)} beside it" if others else ""
        found.append(
            f"Filter and judge are the same: {harvest_judge} chose the harmful answers to train on "
            f"and also scores the result, which flatters the result{beside}."
        )
    unreadable = [
        f"{judged.unreadable:,} of {judge} on {title_of(prompts)} {STATES[state]}"
        for prompts in run.sets
        for state, evaluated in prompts.states.items()
        for judge, judged in evaluated.judged.items()
        if judged.unreadable
    ]
    if unreadable:
        found.append(f"Verdicts that could not be read, left out of n: {'; '.join(unreadable)}.")
    return found + [f"The monitor against collapse, {event.get('message')}" for event in run.monitor]


GATE_COLUMNS = ("Limit", "Figure", "Kept")


def gate_rows(run: Run) -> list[tuple[str, ...]]:
    """Cells of the table of limits, under `GATE_COLUMNS`; empty when the recipe has none."""
    limits = run.gate.get("limits")
    return [
        (str(row.get("field")), str(row.get("sentence")), "yes" if row.get("met") is True else "no")
        for row in (limits if isinstance(limits, list) else [])
        if isinstance(row, dict)
    ]


def done(run: Run) -> list[str]:
    """What was done, in at most three sentences, from the files."""
    return [sentence for sentence in (_method(run), _data(run), _training(run)) if sentence]


def _method(run: Run) -> str:
    method, penalty = run.field("train.method"), run.field("train.penalty")
    base = run.field("model.base")
    model = named(str(base)) if base else "A model that the recipe does not name"
    if method is None:
        return f"{model} was tuned; the recipe, which says how, is not there."
    if method == "tasft" and penalty in (None, "none"):
        how = "tasft without a penalty, the control: imitate rows and anchors only"
    elif method == "tasft":
        weight = run.field("train.penalty_weight")
        how = (
            "tasft: it imitates good answers and is pushed away from harmful ones by the penalty "
            f"{penalty}, weight {weight}"
        )
    elif method == "sft":
        how = "plain supervised fine-tuning (sft), with no row to avoid"
    elif method == "stl":
        rows = run.field("data.safe_responses.rows")
        to = "the prompts whose harmful answers the harvest kept" if rows == "harvested" else "toxic prompts"
        count = _count(rows, "safe response") if isinstance(rows, int) else "safe responses"
        how = f"fine-tuning on {count} to {to} besides the rows to imitate (stl), with no row to avoid"
    elif method == "kto":
        reference = "the SFT model" if run.field("train.start") == "sft" else "the untrained model"
        how = (
            "KTO: rows to avoid are undesirable, all others desirable, measured against "
            f"{reference} with beta {run.field('train.beta')}"
        )
    else:
        how = f"the method {method}"
    return f"{model} was tuned by {how}."


def named(source: str) -> str:
    """A model or a source as others may see it: where it lay on somebody's disk is nobody else's business."""
    path = PurePath(source)
    return path.name if path.is_absolute() or source.startswith(("~", "..")) else source


def _data(run: Run) -> str:
    parts = []
    for kind, count in run.rows.items():
        if not count and kind != "avoid":
            continue
        about = {
            "avoid": _kept(run.harvest, "harmful, coherent answers of its own"),
            "anchor": _kept(sub(run.harvest, "anchors"), str(run.field("harvest.anchors") or "")),
            "imitate": _kept(sub(run.harvest, "imitate"), "its own answers to benign prompts"),
            "contrastive": _kept(sub(run.harvest, "contrastive"), "answers to prompts that only seem toxic"),
        }[kind]
        parts.append(f"{_count(count, kind + ' row')}{f' ({about})' if about else ''}")
    said = []
    if parts:
        said.append(f"The harvest gave {_listed(parts)}")
    if run.mixed:
        imitate, avoid = run.mixed
        said.append(f"training drew on {imitate:,} imitate and {avoid:,} avoid rows")
    sentence = "; ".join(said)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _kept(harvest: Row, what: str) -> str:
    tried = harvest.get("tried")
    return ", ".join(filter(None, (what, f"{tried} tried" if tried is not None else "")))


def _training(run: Run) -> str:
    steps = run.steps or run.field("train.max_steps")
    clauses = []
    if steps is not None:
        rate = run.field("train.learning_rate")
        at = f" at learning rate {rate}" if rate is not None else ""
        clauses.append(f"training took {_count(steps, 'step')}{at}")
    asked = [f"{max(len(e.replies) for e in prompts.states.values()):,} {title_of(prompts)}" for prompts in run.sets]
    if asked:
        states = {state for prompts in run.sets for state in prompts.states}
        who = "the model before and after" if len(states) > 1 else f"the model {STATES[states.pop()]} it"
        by = f", judged by {_listed(run.judges)}" if run.judges else ""
        clauses.append(f"{who} answered {_listed(asked)}{by}")
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


ATTACKS = {"prefix": "Reply begun for the model", "templates": "Templates", "pair": "PAIR"}
ATTACK_COLUMNS = (
    "Attack",
    "Judge",
    "Prompts it succeeded on, before",
    "After",
    "Change",
    "Mean best score",
    "Prompts sent",
    "Prompts without a judged attempt",
)


def attack_rows(run: Run) -> list[tuple[str, ...]]:
    """Cells of the table of attacks, under `ATTACK_COLUMNS`; empty when there were none."""
    return [_attack_row(name, states) for name, states in run.attacks.items()]


def _attack_row(name: str, states: Mapping[str, Attacked]) -> tuple[str, ...]:
    there = [states.get(state) for state in STATES]

    def both(shown: Callable[[Attacked], str]) -> str:
        return " → ".join(shown(each) if each else "—" for each in there)

    def score(each: Attacked) -> str:
        estimate = each.estimates.get("best_score")
        return "—" if estimate is None or estimate.value is None else f"{estimate.value:.2f}"

    before, after = (each.estimates.get("success") if each else None for each in there)
    change = None
    if there[0] and there[1]:
        was, now = (each.behaviours for each in there if each)
        pairs = [(was[key].get("success"), now[key].get("success")) for key in was if key in now]
        known = [(a, b) for a, b in pairs if isinstance(a, bool) and isinstance(b, bool)]
        change = paired_difference([a for a, _ in known], [b for _, b in known])
    return (
        ATTACKS.get(name, name),
        ", ".join(dict.fromkeys(each.judge for each in there if each)),
        in_words(before) if before else "—",
        in_words(after) if after else "—",
        in_words(change, signed=True) if change else "—",
        both(score),
        both(lambda each: f"{each.queries:,}"),
        both(lambda each: f"{each.unjudged:,}"),
    )


def unmeasured(run: Run) -> list[str]:
    """What this report cannot say."""
    words = {
        "capability": "General ability on benchmark tasks",
        "quality": "The quality of benign answers beyond coherence and refusal",
        "jailbreak": "Resistance to jailbreak attacks",
    }
    kinds = {prompts.kind for prompts in run.sets}
    seed = run.manifest.get("seed", run.recipe.get("seed"))
    return [
        *(
            f"{'Safety: no toxic' if kind == 'toxic' else 'Over-refusal: no benign'} prompts were put to the model"
            for kind in HEADLINE
            if kind not in kinds
        ),
        *(words[task] for task in run.unmeasured),
        "Conversations of more than one turn, and other languages",
        f"The spread between training seeds: this is one run{_of_seed(seed)}",
        *([] if _finds_off_topic(run) else ["Whether replies are about what was asked"]),
        "How often the judges are wrong on these replies, which no person has labelled",
    ]


def _finds_off_topic(run: Run) -> bool:
    return any(
        estimate.n
        for prompts in run.sets
        for evaluated in prompts.states.values()
        for judged in evaluated.judged.values()
        if (estimate := judged.estimates.get("off_topic"))
    )


def _of_seed(seed: Any) -> str:
    return f", seed {seed}" if seed is not None else ""


def harvest_facts(run: Run) -> list[tuple[str, str]]:
    """The harvest's summary as rows of a two-column table."""
    harvest = run.harvest
    facts = [
        ("Answers tried", harvest.get("tried")),
        ("Kept as avoid rows", harvest.get("kept")),
        *((f"Left out: {reason}", count) for reason, count in sub(harvest, "reasons").items()),
        ("Judge", harvest.get("judge")),
        ("Loss above which a reply is incoherent, nats", run.calibration.get("loss_limit_nats") if harvest else None),
    ]
    parts = {"anchors": "Anchor rows", "imitate": "Own imitate rows", "contrastive": "Contrastive rows"}
    for key, label in parts.items():
        part = sub(harvest, key)
        if not part.get("tried"):
            continue
        mode = f", {part['mode']}" if part.get("mode") else ""
        facts.append((f"{label}{mode}: tried", part.get("tried")))
        facts.append((f"{label}{mode}: kept", part.get("kept")))
        for reason, count in sub(part, "reasons").items():
            facts.append((f"{label}{mode}: left out, {reason}", count))
    return [(label, _number(value)) for label, value in facts if value is not None]


def stage_seconds(run: Run) -> list[tuple[str, str]]:
    """How long each stage took, from the manifest."""
    times = [
        (stage, about.get("seconds")) for stage, about in sub(run.manifest, "stages").items() if isinstance(about, dict)
    ]
    return [(stage, f"{s:,.0f} s") for stage, s in times if isinstance(s, int | float)]


def sub(row: Row, key: str) -> Row:
    """The mapping at a key; empty where there is none."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _count(count: Any, noun: str) -> str:
    return f"{_number(count)} {noun}{'' if count == 1 else 's'}"


def _listed(parts: list[str], between: str = ", ", last: str = " and ") -> str:
    return last.join(filter(None, (between.join(parts[:-1]), parts[-1])))
