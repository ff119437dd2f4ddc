"""What was measured by other means than prompt sets: attacks, capability and quality, as rows of tables."""

from collections.abc import Mapping
from itertools import chain

from tasft.core.measures import NONE, in_words, number_in_words, odds
from tasft.core.paired import Paired, is_share, paired
from tasft.core.stats import Estimate, mcnemar, paired_difference
from tasft.report.blocks import Cell
from tasft.report.record import Attacked, Measured, Record

NOTE = (
    "Capability: tasks of lm-eval with its own prompts, without a chat template. "
    "Quality: reference_nll is the mean loss of somebody else's answers, reference_perplexity exp of it, kl_to_before "
    "how far the predictions on them have moved, in nats per token; none says how good an answer is. A win rate is an "
    "annotator's preference for the model's answers. Changes are of the same items: as of replies for shares, "
    "Student's interval otherwise."
)
ATTACKS = {"prefix": "Reply begun for the model", "templates": "Templates", "pair": "PAIR"}


def attack_columns(record: Record) -> tuple[str, ...]:
    """Heads of the table of attacks."""
    states = [f"Succeeded on prompts, {title}" for title in record.states.values()]
    return ("Attack", "Judge", *states, *record.change_heads)


def attack_rows(record: Record) -> list[list[str | Cell]]:
    """The table of attacks; empty when there were none."""
    return [_attack_row(record, name, states) for name, states in record.attacks.items()]


def _attack_row(record: Record, name: str, states: Mapping[str, Attacked]) -> list[str | Cell]:
    cells: list[str | Cell] = []
    for state in record.states:
        attacked = states.get(state)
        best = attacked.estimates.get("best_score") if attacked else None
        score = "" if best is None or best.value is None else f"mean best score {best.value:.2f}"
        sent = f"{attacked.queries:,} prompts sent" if attacked else ""
        missing = f"{attacked.unjudged:,} prompts without a judged attempt" if attacked and attacked.unjudged else ""
        success = attacked.estimates.get("success") if attacked else None
        cells.append(Cell(in_words(success), ", ".join(filter(None, (score, sent, missing)))))
    for state in record.changed:
        before, after = states.get(record.before or ""), states.get(state)
        cells.append(_attack_change(before, after) if before and after else NONE)
    judges = dict.fromkeys(attacked.judge for attacked in states.values())
    return [ATTACKS.get(name, name), ", ".join(judges), *cells]


def _attack_change(before: Attacked, after: Attacked) -> Cell | str:
    pairs = [
        (was.get("success"), after.behaviours[key].get("success"))
        for key, was in before.behaviours.items()
        if key in after.behaviours
    ]
    known = [(one, other) for one, other in pairs if isinstance(one, bool) and isinstance(other, bool)]
    if not known:
        return NONE
    outcomes = [one for one, _ in known], [other for _, other in known]
    return Cell(in_words(paired_difference(*outcomes), signed=True), odds(mcnemar(*outcomes).p))


def task_columns(record: Record) -> tuple[str, ...]:
    """Heads of the table of tasks."""
    return ("Measured", *record.heads, *record.change_heads)


def task_rows(record: Record) -> list[list[str | Cell]]:
    """The table of capability and quality; empty when nothing of this was measured."""
    rows = []
    for name, states in record.measured.items():
        for metric in dict.fromkeys(chain.from_iterable(task.estimates for task in states.values())):
            rows.append(_row(record, f"{name}: {metric}", metric, states))
    return rows


def change(before: Measured | None, after: Measured | None, metric: str) -> Estimate | None:
    """Change of a share on the same items, as `paired_difference`; None when there is none to pair, or it is no share.

    Args:
        before: The task before training.
        after: And after.
        metric: Of lm-eval, such as acc.
    """
    comparison = _paired(before, after, metric)
    return comparison.difference if comparison and comparison.flips else None


def _paired(before: Measured | None, after: Measured | None, metric: str) -> Paired | None:
    values = [task.estimates[metric].value if task and metric in task.estimates else None for task in (before, after)]
    if before is None or after is None or values[0] is None or values[1] is None:
        return None
    return paired(metric, before.items, after.items, (values[0], values[1]))


def _row(record: Record, label: str, metric: str, states: Mapping[str, Measured]) -> list[str | Cell]:
    share = is_share(metric, *(task.items for task in states.values()))
    cells: list[str | Cell] = [label]
    for state in record.states:
        estimate = states[state].estimates.get(metric) if state in states else None
        if estimate is None or not estimate.n:
            cells.append(NONE)
        else:
            cells.append(in_words(estimate) if share else number_in_words(estimate))
    for state in record.changed:
        comparison = _paired(states.get(record.before or ""), states.get(state), metric)
        if comparison is None:
            cells.append(NONE)
            continue
        moved = in_words(comparison.difference, signed=True) if share else number_in_words(comparison.difference, "+")
        flips = comparison.flips
        cells.append(Cell(moved, f"{flips.gained} right now, {flips.lost} no longer; {odds(flips.p)}" if flips else ""))
    return cells
