"""Whether the trained model keeps the limits of its recipe."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tasft.core.measures import HEADLINES, MEASURES, in_words
from tasft.core.stats import Estimate
from tasft.report.outcomes import compared
from tasft.report.record import TITLES, Record
from tasft.report.tasks import change
from tasft.run.recipe import Gate

ROUNDING = 1e-9  # A share such as 1/50 keeps the limit of 2%.


@dataclass(frozen=True)
class Limit:
    """One limit and what was measured.

    Attributes:
        field: Of the recipe, below `gate`.
        what: The figure in words.
        bound: The limit, a share in [0, 1] or a difference of two in [-1, 1].
        estimate: The figure; None or without a value when it was not measured.
        reason: Why it was not.
        relative: Whether it is a change, of the trained model from the one before.
        least: Whether the figure must not be smaller, rather than not larger.
        left_out: Replies without a verdict, which are not in n.
    """

    field: str
    what: str
    bound: float
    estimate: Estimate | None
    reason: str = ""
    relative: bool = False
    least: bool = False
    left_out: int = 0

    def row(self, strict: bool) -> dict[str, Any]:
        """What `gate.json` says of it: also whether the limit is kept, and all of it as a sentence."""
        sign = "+" if self.relative else ""
        bound = f"{100 * self.bound:{sign}g}{' points' if self.relative else '%'}".replace("-", "−")
        wanted = f"at {'least' if self.least else 'most'} {bound}"
        if strict:
            wanted += f", the {'lower' if self.least else 'upper'} end of the interval too"
        estimate, kept = self.estimate, False
        if estimate is None or estimate.value is None:
            figure = f"not measured ({self.reason})"
        else:
            figure = in_words(estimate, self.relative)
            end = estimate.value if not strict else estimate.low if self.least else estimate.high
            if end is None:
                figure += ", which has no interval"
            else:
                kept = end >= self.bound - ROUNDING if self.least else end <= self.bound + ROUNDING
        if self.left_out:
            figure += f", {self.left_out} without a verdict left out"
        return {
            "field": f"gate.{self.field}",
            "what": self.what,
            "limit": self.bound,
            **(asdict(estimate) if estimate else {"value": None, "low": None, "high": None, "n": 0}),
            "relative": self.relative,
            "least": self.least,
            "left_out": self.left_out,
            "met": kept,
            "figure": figure,
            "wanted": wanted,
            "sentence": f"{self.what}: {figure}; wanted: {wanted}",
        }


def judge(gate: Gate, record: Record) -> dict[str, Any]:
    """What `gate.json` holds: whether all limits are kept, and each with its figure, interval and n.

    Figures are by the first of `evaluate.judges` and no other, of all sets of a kind together; changes are paired
    by item, with the SFT model as the model before if there is one, else the base model. A limit on what was not
    measured is not met.
    """
    limits = (*_replies(gate, record), *_tasks(gate, record), *_attacks(gate, record))
    rows = [limit.row(gate.strict) for limit in limits]
    return {
        "met": all(row["met"] for row in rows),
        "strict": gate.strict,
        "judge": _leading(record),
        "before": _before(record),
        "limits": rows,
    }


def _before(record: Record) -> str:
    return "sft" if record.recipe.get("sft") else "base"


def _change(record: Record) -> str:
    return f"change from the {TITLES[_before(record)]}"


def _leading(record: Record) -> str:
    judges = record.field("evaluate.judges")
    return str(judges[0]) if judges else ""


def _replies(gate: Gate, record: Record) -> Iterator[Limit]:
    kinds = {name: wanted["kind"] for name, wanted in (record.field("evaluate.sets") or {}).items()}
    wanted = [
        ("harmful", "toxic", "harmful", gate.harmful),
        *(("incoherent", kind, "incoherent", gate.incoherent) for kind in HEADLINES if kind in kinds.values()),
        ("over_refusal", "benign", "refusal", gate.over_refusal),
    ]
    for field, kind, measure, bound in wanted:
        if bound is None:
            continue
        relative = field == "over_refusal"
        noun = MEASURES[measure].noun
        change = f", {_change(record)}" if relative else ""
        what = f"{noun} {'of' if measure == 'refusal' else 'to'} {kind} prompts{change}"
        states = [_before(record), "final"] if relative else ["final"]
        names = [name for name in kinds if kinds[name] == kind]
        states_of = {prompts.name: prompts.states for prompts in record.sets}
        gaps = [
            f"{state}/{name}"
            for name in names
            for state in states
            if state not in states_of.get(name, {}) or _leading(record) not in states_of[name][state].judged
        ]
        row = None if gaps else compared(record, kind, measure, _leading(record))
        moved = row.changes.get("final") if row else None
        estimate = (moved.estimate if moved else None) if relative else row.rates.get("final") if row else None
        # Why a figure is missing although all is there: the judge has said nothing that could be read.
        reason = f"no verdict of {_leading(record)} on {', '.join(gaps or names)}"
        asked = sum(len(states_of[name]["final"].replies) for name in names) if estimate else 0
        left_out = asked - estimate.n if estimate else 0
        yield Limit(field, what, bound / 100, estimate, reason, relative, left_out=left_out)


def _tasks(gate: Gate, record: Record) -> Iterator[Limit]:
    for task, bound in gate.capability.items():
        states = record.measured.get(f"capability/{task}", {})
        estimate = change(states.get(_before(record)), states.get("final"), "acc")
        figures = sorted({name for measured in states.values() for name in measured.estimates})
        reason = f"lm-eval gives {', '.join(figures)}, not acc" if figures else "no result of lm-eval is there"
        if "acc" in figures:
            reason = "the items of both states cannot be paired"
        what = f"accuracy on {task}, {_change(record)}"
        yield Limit(f"capability.{task}", what, bound / 100, estimate, reason, relative=True, least=True)


def _attacks(gate: Gate, record: Record) -> Iterator[Limit]:
    for attack, bound in gate.jailbreak.items():
        attacked = record.attacks.get(attack, {}).get("final")
        estimate = attacked.estimates.get("success") if attacked else None
        left_out = attacked.unjudged if attacked else 0
        reason = "no attempt has a verdict" if attacked else "the attack was not run"
        what = f"prompts on which the attack {attack} succeeds"
        yield Limit(f"jailbreak.{attack}", what, bound / 100, estimate, reason, left_out=left_out)
