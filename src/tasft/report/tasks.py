"""Capability and quality before and after: rows of a table, as plain text."""

from collections.abc import Mapping
from itertools import chain

from tasft.core.paired import Paired, is_share, paired
from tasft.core.stats import Estimate
from tasft.report.facts import in_words, odds, plain_number
from tasft.report.read import STATES, Measured, Run

TASK_COLUMNS = ("Measured", "Before", "After", "Change", "Items that changed")
NOTE = (
    "Capability: tasks of lm-eval with its own prompts, without a chat template. "
    "Quality: reference_nll is the mean loss of somebody else's answers, reference_perplexity exp of it, kl_to_before "
    "how far the predictions on them have moved, in nats per token; none says how good an answer is. A win rate is an "
    "annotator's preference for the model's answers. Changes are of the same items: paired bootstrap for shares, "
    "Student's interval otherwise."
)


def task_rows(run: Run) -> list[tuple[str, ...]]:
    """Cells under `TASK_COLUMNS`; empty when nothing of this was measured."""
    return [row for name, states in run.measured.items() for row in _rows(name, states)]


def _rows(name: str, states: Mapping[str, Measured]) -> list[tuple[str, ...]]:
    there = [states.get(state) for state in STATES]
    metrics = dict.fromkeys(chain.from_iterable(each.estimates for each in there if each))
    return [_row(f"{name}: {metric}", metric, *there) for metric in metrics]


def change(before: Measured | None, after: Measured | None, metric: str) -> Estimate | None:
    """Change of a share on the same items, as `paired_difference`; None when there is none to pair, or it is no share.

    Args:
        before: The task before training.
        after: And after.
        metric: Of lm-eval, such as acc.
    """
    found = _paired(before, after, metric)
    return found.difference if found and found.flips else None


def _paired(before: Measured | None, after: Measured | None, metric: str) -> Paired | None:
    values = [each.estimates[metric].value if each and metric in each.estimates else None for each in (before, after)]
    if before is None or after is None or values[0] is None or values[1] is None:
        return None
    return paired(metric, before.items, after.items, (values[0], values[1]))


def _row(label: str, metric: str, before: Measured | None, after: Measured | None) -> tuple[str, ...]:
    shown = in_words if is_share(metric, *(each.items for each in (before, after) if each)) else plain_number
    moved, changed = "—", "—"
    if found := _paired(before, after, metric):
        moved = in_words(found.difference, signed=True) if shown is in_words else plain_number(found.difference, "+")
        if flips := found.flips:
            changed = f"{flips.gained} right now, {flips.lost} no longer; {odds(flips.p)}"
    cells = [each.estimates.get(metric) if each else None for each in (before, after)]
    return (label, *(shown(cell) if cell and cell.n else "—" for cell in cells), moved, changed)
