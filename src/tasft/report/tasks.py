"""Capability and quality before and after: rows of a table, as plain text."""

import math
from collections.abc import Mapping
from itertools import chain
from statistics import fmean

from tasft.report.facts import in_words, odds
from tasft.report.read import STATES, Measured, Row, Run
from tasft.stats import Estimate, mcnemar, mean, paired_difference

TASK_COLUMNS = ("Measured", "Before", "After", "Change", "Items that changed")
NOTE = (
    "Capability: tasks of lm-eval with its own prompts, without a chat template. "
    "Quality: reference_nll is the mean loss of somebody else's answers, kl_to_before how far the predictions on them "
    "have moved, both in nats per token; neither says how good an answer is. A win rate is an annotator's preference "
    "for the model's answers. Changes are of the same items: paired bootstrap for shares, Student's interval otherwise."
)
_Outcomes = dict[str, tuple[float, object]]
_PREFERENCES = {"win_rate": "preference", "length_controlled_win_rate": ""}  # What items call it.


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
    was, now = (_outcomes(each, metric) for each in (before, after))
    pairs = _pairs(was, now)
    return paired_difference(*zip(*pairs, strict=True)) if pairs and _are_shares(was, now) else None


def _pairs(was: _Outcomes, now: _Outcomes) -> list[tuple[float, float]]:
    return [(was[key][0], now[key][0]) for key in was if key in now and was[key][1] == now[key][1]]


def _is_mean(measured: Measured | None, metric: str, items: _Outcomes) -> bool:
    value = measured.estimates[metric].value if measured and metric in measured.estimates else None
    return (
        bool(items)
        and value is not None
        and math.isclose(fmean(each for each, _ in items.values()), value, rel_tol=1e-6)
    )


def _are_shares(*states: _Outcomes) -> bool:
    return any(states) and all(value in (0.0, 1.0) for state in states for value, _ in state.values())


def _row(label: str, metric: str, before: Measured | None, after: Measured | None) -> tuple[str, ...]:
    was, now = (_outcomes(each, metric) for each in (before, after))
    # A metric that is no mean over items, as perplexity, cannot be paired by them.
    are_means = all(_is_mean(each, metric, items) for each, items in ((before, was), (after, now)))
    pairs = _pairs(was, now) if are_means else []
    is_share = metric in _PREFERENCES or _are_shares(was, now)
    moved, changed = "—", "—"
    if pairs and is_share and metric not in _PREFERENCES:
        moved = in_words(paired_difference(*zip(*pairs, strict=True)), signed=True)
        flips = mcnemar([a == 1 for a, _ in pairs], [b == 1 for _, b in pairs])
        changed = f"{flips.gained} right now, {flips.lost} no longer; {odds(flips.p)}"
    elif pairs:
        mean_move = mean([b - a for a, b in pairs])
        moved = in_words(mean_move, signed=True) if is_share else _number(mean_move, "+")
    shown = in_words if is_share else _number
    cells = [each.estimates.get(metric) if each else None for each in (before, after)]
    return (label, *(shown(cell) if cell and cell.n else "—" for cell in cells), moved, changed)


def _outcomes(measured: Measured | None, metric: str) -> _Outcomes:
    """Of each item its outcome, and what tells that it is the same item."""
    name, _, chosen = _PREFERENCES.get(metric, metric).partition(",")
    rows: list[Row] = list(measured.items) if measured else []
    return {
        str(row["id"]): (float(row[name]), row.get("doc_hash"))
        for row in rows
        if isinstance(row.get(name), int | float) and row.get("filter", "none") == (chosen or "none")
    }


def _number(estimate: Estimate, sign: str = "") -> str:
    if estimate.value is None:
        return "—"
    low, high = estimate.low, estimate.high
    within = f"{low:{sign}.3g} to {high:{sign}.3g}; " if low is not None and high is not None else ""
    return f"{estimate.value:{sign}.3g} ({within}n = {estimate.n})".replace("-", "−")
