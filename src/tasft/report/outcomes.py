"""Figures of a record: rates in each state, their paired changes, and what these can say."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from tasft.core.measures import HEADLINES, KINDS, MEASURES, OUTCOMES, TOLD, in_words, odds, outcome
from tasft.core.stats import Estimate, Flips, agreement, mcnemar, paired_difference, rate, rate_of, smallest_change
from tasft.core.text import visible
from tasft.report.record import Evaluated, Judged, Record, SetRecord

BETTER, WORSE, CHANGED, UNCLEAR, TOO_FEW = "better", "worse", "changed", "no clear change", "too few to tell"

NOTABLE_DISAGREEMENT = 0.1
"""Judges are said to disagree on harm where their rates differ by at least this, and by more than chance."""


@dataclass(frozen=True)
class Change:
    """What became of a rate from one state to another, on the same prompts.

    Attributes:
        estimate: The difference; without an interval for a property of a whole set.
        flips: How many replies changed each way, and McNemar's p.
        reading: `BETTER`, `WORSE`, `CHANGED` where neither way is, `UNCLEAR` or `TOO_FEW`; empty without an interval.
    """

    estimate: Estimate
    flips: Flips | None
    reading: str

    @property
    def flipped(self) -> str:
        """How many replies changed, in words."""
        if self.flips is None:
            return ""
        return f"{self.flips.gained} became so, {self.flips.lost} no longer; {odds(self.flips.p)}"

    @property
    def could_see(self) -> str:
        """Which change this sample could have seen; empty where it has seen one."""
        return {UNCLEAR: seeable(self.estimate.n), TOO_FEW: seeable(self.estimate.n)}.get(self.reading, "")


def seeable(n: int) -> str:
    """The smallest change that n pairs can tell from chance, in words."""
    smallest = smallest_change(n)
    if smallest is None:
        return f"{n} replies cannot tell any change from chance"
    return f"could have seen {100 * smallest:.1f} points or more"


@dataclass(frozen=True)
class Figures:
    """One measure of a set in every state, under the judges that agree on all of it."""

    measure: str
    kind: str
    judges: tuple[str, ...]
    rates: Mapping[str, Estimate]
    changes: Mapping[str, Change]

    @property
    def label(self) -> str:
        """The measure's name as shown."""
        return MEASURES[self.measure].label

    @property
    def is_headline(self) -> bool:
        """Whether it is among those to read first."""
        return self.measure in HEADLINES.get(self.kind, ())

    def value(self, state: str | None) -> float | None:
        """The rate in a state."""
        estimate = self.rates.get(state or "")
        return estimate.value if estimate else None


def figures(record: Record, prompts: SetRecord, judge: str, measure: str) -> Figures:
    """A measure of one set by one judge."""
    rates = {
        state: estimate
        for state in record.states
        if (judged := judged_in(prompts, state, judge)) and (estimate := judged.estimates.get(measure))
    }
    changes = {
        state: change for state in record.changed if (change := _change(record, prompts, judge, measure, rates, state))
    }
    return Figures(measure, prompts.kind, (judge,), rates, changes)


def judged_in(prompts: SetRecord, state: str | None, judge: str | None) -> Judged | None:
    """What a judge said of a set in a state."""
    evaluated = prompts.states.get(state or "")
    return evaluated.judged.get(judge or "") if evaluated else None


def _change(
    record: Record, prompts: SetRecord, judge: str, measure: str, rates: Mapping[str, Estimate], state: str
) -> Change | None:
    before, after = rates.get(record.before or ""), rates.get(state)
    if before is None or after is None or before.value is None or after.value is None:
        return None
    holds = TOLD.get(measure)
    if holds is None:
        # A property of the whole set: there is nothing to pair by item, hence no interval.
        return Change(Estimate(after.value - before.value, None, None, min(before.n, after.n)), None, "")
    was, now = (judged_in(prompts, state_name, judge) for state_name in (record.before, state))
    assert was is not None
    assert now is not None
    pairs = [
        (one, other)
        for key, verdict in was.verdicts.items()
        if key in now.verdicts
        and (one := holds(verdict)) is not None
        and (other := holds(now.verdicts[key])) is not None
    ]
    if not pairs:
        return None
    outcomes = [one for one, _ in pairs], [other for _, other in pairs]
    estimate = paired_difference(*outcomes)
    return Change(estimate, mcnemar(*outcomes), _reading(estimate, MEASURES[measure].better.get(prompts.kind, 0)))


def _reading(change: Estimate, better: int) -> str:
    assert change.low is not None
    assert change.high is not None
    if change.low <= 0 <= change.high:
        return TOO_FEW if smallest_change(change.n) is None else UNCLEAR
    if not better:
        return CHANGED
    return BETTER if better * change.low > 0 else WORSE


def table(record: Record, prompts: SetRecord) -> list[Figures]:
    """All measures of a set; judges with the same figures share a row."""
    rows: list[Figures] = []
    for measure, definition in MEASURES.items():
        if prompts.kind in KINDS and prompts.kind not in definition.better:
            continue
        same: dict[str, Figures] = {}
        for judge in record.judges:
            row = figures(record, prompts, judge, measure)
            if not any(estimate.n for estimate in row.rates.values()):
                continue
            key = repr((row.rates, row.changes))
            judges = (*same[key].judges, judge) if key in same else (judge,)
            same[key] = replace(row, judges=judges)
        rows.extend(same.values())
    return rows


def leading(record: Record, kind: str, measure: str) -> str | None:
    """The first judge of the recipe that tells a measure of some set of a kind; None if no judge does."""
    states = [state for prompts in record.sets if prompts.kind == kind for state in prompts.states.values()]
    for judge in record.judges:
        estimates = [state.judged[judge].estimates.get(measure) for state in states if judge in state.judged]
        if any(estimate and estimate.n for estimate in estimates):
            return judge
    return None


def compared(record: Record, kind: str, measure: str, judge: str | None = None) -> Figures | None:
    """A measure over all sets of a kind together, by its leading judge unless another is named; None without any."""
    prompts = together(record, kind)
    judge = judge or leading(record, kind, measure)
    if prompts is None or judge is None:
        return None
    row = figures(record, prompts, judge, measure)
    return row if row.rates else None


def headlines(record: Record) -> list[tuple[SetRecord, Figures]]:
    """The few figures to read first, each by the leading judge, over all sets of a kind together."""
    return [
        (prompts, row)
        for kind, measures in HEADLINES.items()
        if (prompts := together(record, kind))
        for measure in measures
        if (row := compared(record, kind, measure))
    ]


def rates_table(record: Record) -> Table:
    """The figures to read first, a row each, for a terminal."""
    rows = headlines(record)
    drawn = Table(caption=f"95% intervals; judged by {visible(by(row for _, row in rows))}")
    for head in ("replies to", "", *record.states.values()):
        drawn.add_column(visible(head))
    for prompts, row in rows:
        shown = [in_words(row.rates.get(state)) for state in record.states]
        drawn.add_row(visible(f"{prompts.kind} prompts"), row.label.lower(), *shown)
    return drawn


def together(record: Record, kind: str) -> SetRecord | None:
    """The sets of one kind as one; those with all states alone, if there are such, so that like meets like."""
    sets = [prompts for prompts in record.sets if prompts.kind == kind]
    needed = {state for state in (record.before, *record.changed) if state}
    sets = [prompts for prompts in sets if needed <= prompts.states.keys()] or sets
    if len(sets) < 2:
        return sets[0] if sets else None
    states = {}
    for state in record.states:
        judged = {}
        for judge in record.judges:
            verdicts = {
                f"{prompts.name}/{key}": verdict
                for prompts in sets
                if (judgement := judged_in(prompts, state, judge))
                for key, verdict in judgement.verdicts.items()
            }
            if verdicts:
                causes = sum(
                    (Counter(judgement.causes) for prompts in sets if (judgement := judged_in(prompts, state, judge))),
                    Counter(),
                )
                rates = {
                    name: rate([value for verdict in verdicts.values() if (value := holds(verdict)) is not None])
                    for name, holds in TOLD.items()
                }
                judged[judge] = Judged(rates, verdicts, causes=causes)
        if judged:
            replies = {
                f"{prompts.name}/{key}": reply
                for prompts in sets
                if state in prompts.states
                for key, reply in prompts.states[state].replies.items()
            }
            states[state] = Evaluated(replies, judged)
    return SetRecord(f"{len(sets)} sets", kind, "", states)


def over_all(evaluated: Sequence[Evaluated | None], judge: str | None, measure: str) -> Estimate | None:
    """What a judge tells of a measure over all items of several sets; None where it does not tell it of one of them."""
    judged = [evaluation.judged.get(judge or "") if evaluation else None for evaluation in evaluated]
    known = [
        (estimate.value, estimate.n)
        for judgement in judged
        if judgement and (estimate := judgement.estimates.get(measure)) and estimate.value is not None
    ]
    if not known or len(known) < len(evaluated):
        return None
    return rate_of(round(sum(value * n for value, n in known)), sum(n for _, n in known))


# What is followed along checkpoints, by the kind of prompts.
ALONG = {"harmful": "toxic", "incoherent": "toxic", "refusal": "benign"}
Along = Sequence[tuple[float, Mapping[str, Estimate]]]


def along(record: Record, judges: Mapping[str, str | None] | None = None) -> Along:
    """Steps of training and the rates of `ALONG` at each, from its start to its end.

    Empty when no checkpoint was evaluated. Step 0 is the model that training starts from. A rate is of all sets of its
    kind, and left out where one of these is missing.

    Args:
        record: Of a run.
        judges: Measure -> who tells it; its leading judge unless given.
    """
    if judges is None:
        judges = {measure: leading(record, kind, measure) for measure, kind in ALONG.items()}
    if not record.checkpoints or not any(judges.values()):
        return []
    steps = {0.0: record.start} | {float(step): sets for step, sets in record.checkpoints.items()}
    if record.steps is not None:
        steps[record.steps] = {
            prompts.name: prompts.states["final"] for prompts in record.sets if "final" in prompts.states
        }
    by_step = []
    for step, sets in sorted(steps.items()):
        rates = {}
        for measure, kind in ALONG.items():
            evaluated = [sets.get(prompts.name) for prompts in record.sets if prompts.kind == kind]
            if estimate := over_all(evaluated, judges[measure], measure):
                rates[measure] = estimate
        by_step.append((step, rates))
    return by_step


# What is told of each topic of a set, by its kind.
BY_TOPIC = {"toxic": "harmful", "benign": "refusal"}


def topics(record: Record, prompts: SetRecord) -> dict[str, dict[str, Estimate]]:
    """Topic of the prompts -> state -> the rate of `BY_TOPIC`; empty where the set has no topics."""
    measure = BY_TOPIC.get(prompts.kind, "harmful")
    judge = leading(record, prompts.kind, measure)
    by_topic: dict[str, dict[str, Estimate]] = {}
    for state in record.states:
        judged = judged_in(prompts, state, judge)
        for topic, rates in (judged.topics if judged else {}).items():
            if (estimate := rates.get(measure)) and estimate.n:
                by_topic.setdefault(topic, {})[state] = estimate
    return by_topic


def outcomes(record: Record, prompts: SetRecord) -> dict[str, Counter[str]]:
    """State -> how many replies are which of `OUTCOMES`, by the leading judge of harm; empty where none tells it."""
    judge = leading(record, prompts.kind, "harmful")
    return {
        state: Counter({name: counts.get(name, 0) for name in OUTCOMES})
        for state in record.states
        if (judged := judged_in(prompts, state, judge)) and judged.verdicts
        for counts in [Counter(map(outcome, judged.verdicts.values()))]
    }


def agreements(record: Record, kind: str, measure: str = "harmful") -> dict[tuple[str, str], tuple[Estimate, Estimate]]:
    """Two judges -> the share of replies of which both say the same, and Cohen's kappa, over all states and sets."""
    holds = TOLD[measure]
    values: dict[str, dict[tuple[str, str, str], bool]] = {}
    for prompts in record.sets:
        for state, evaluated in prompts.states.items() if prompts.kind == kind else ():
            for judge, judged in evaluated.judged.items():
                known = {key: value for key, row in judged.verdicts.items() if (value := holds(row)) is not None}
                values.setdefault(judge, {}).update({(prompts.name, state, key): value for key, value in known.items()})
    pairs = {}
    judges = [judge for judge in record.judges if values.get(judge)]
    for number, first in enumerate(judges):
        for second in judges[number + 1 :]:
            keys = [key for key in values[first] if key in values[second]]
            if not keys:
                continue
            # Replies to one prompt in several states belong together.
            groups = [f"{name}/{key}" for name, _, key in keys]
            scores = agreement([values[first][key] for key in keys], [values[second][key] for key in keys], groups, 500)
            pairs[first, second] = scores["accuracy"], scores["kappa"]
    return pairs


def disputes(record: Record, state: str) -> list[tuple[str, Figures]]:
    """Judges whose rate of harm on toxic prompts is not that of the leading one, by more than chance and by much."""
    prompts, first = together(record, "toxic"), leading(record, "toxic", "harmful")
    judged = judged_in(prompts, state, first) if prompts else None
    if prompts is None or judged is None:
        return []
    holds, others = TOLD["harmful"], []
    for judge in record.judges:
        other = judged_in(prompts, state, judge)
        if judge == first or other is None:
            continue
        pairs = [
            (one, two)
            for key, verdict in judged.verdicts.items()
            if key in other.verdicts
            and (one := holds(verdict)) is not None
            and (two := holds(other.verdicts[key])) is not None
        ]
        if not pairs:
            continue
        words = [one for one, _ in pairs], [two for _, two in pairs]
        apart = abs(paired_difference(*words).value or 0.0)
        if apart >= NOTABLE_DISAGREEMENT and mcnemar(*words).p <= 0.05:
            others.append((judge, figures(record, prompts, judge, "harmful")))
    return others


def by(rows: Iterable[Figures]) -> str:
    """Who judged."""
    return listed(dict.fromkeys(row.judges[0] for row in rows))


def listed(parts: Iterable[str], between: str = ", ", last: str = " and ") -> str:
    """Several words as in a sentence."""
    words = list(parts)
    return last.join(filter(None, (between.join(words[:-1]), words[-1]))) if words else ""
