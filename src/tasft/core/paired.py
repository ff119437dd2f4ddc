"""Evaluations besides prompt sets: which of them count, and the same items of two states, paired.

Items are rows of `items.jsonl` or `behaviours.jsonl`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tasft.core.stats import Estimate, Flips, mcnemar, mean, paired_difference

Row = Mapping[str, Any]

PREFERENCES = {"win_rate": "preference", "length_controlled_win_rate": ""}
"""What items call the win rates; the second has no item."""

_Outcomes = dict[str, tuple[float, object]]


@dataclass(frozen=True)
class Paired:
    """What changed on items that both states have.

    Attributes:
        difference: Second less first: `paired_difference` of shares, else the mean with Student's interval.
        flips: McNemar's test, for outcomes that are true or false.
        unpaired: Items that only one state has.
    """

    difference: Estimate
    flips: Flips | None
    unpaired: int


def is_asked(evaluate: Row, kind: str, name: str) -> bool:
    """Whether a recipe asks for a result; others were left behind by an earlier form of it.

    Args:
        evaluate: The recipe's section of that name.
        kind: capability, quality or jailbreak.
        name: Of a task, `reference` or `annotator`, or of an attack.
    """
    wanted = evaluate.get(kind)
    if not isinstance(wanted, Mapping):
        return False
    if kind == "capability":
        tasks = wanted.get("tasks")
        return not isinstance(tasks, list) or name in tasks
    # Likelihoods are always measured.
    return name == "reference" or wanted.get(name) is not None


def is_share(metric: str, *states: Iterable[Row]) -> bool:
    """Whether a metric is in [0, 1], to be shown in percent: all its items are 0 or 1, or it is a win rate."""
    outcomes = [_outcomes(rows, metric) for rows in states]
    return metric in PREFERENCES or _are_outcomes(*outcomes)


def paired(metric: str, first: Iterable[Row], second: Iterable[Row], values: tuple[float, float]) -> Paired | None:
    """The change of a metric, item by item.

    Args:
        metric: Of lm-eval, with its filter if it has one, or a figure of another summary.
        first: Items of one state. What has another `doc_hash` is another item.
        second: Of the other.
        values: What the summaries say. A metric that is no mean over its items, as a perplexity, cannot be paired.

    Returns:
        None when there is nothing to pair.
    """
    was, now = _outcomes(first, metric), _outcomes(second, metric)
    if not all(_is_mean(*state) for state in zip((was, now), values, strict=True)):
        return None
    pairs = [(was[key][0], now[key][0]) for key in was if key in now and was[key][1] == now[key][1]]
    if not pairs:
        return None
    unpaired = len(was) + len(now) - 2 * len(pairs)
    if metric in PREFERENCES or not _are_outcomes(was, now):
        return Paired(mean([after - before for before, after in pairs]), None, unpaired)
    before, after = [value == 1 for value, _ in pairs], [value == 1 for _, value in pairs]
    return Paired(paired_difference(before, after), mcnemar(before, after), unpaired)


def _outcomes(rows: Iterable[Row], metric: str) -> _Outcomes:
    """Of each item its outcome, and what tells that it is the same item."""
    name, _, chosen = PREFERENCES.get(metric, metric).partition(",")
    return {
        str(row["id"]): (float(row[name]), row.get("doc_hash"))
        for row in rows
        if isinstance(row.get(name), int | float) and row.get("filter", "none") == (chosen or "none")
    }


def _are_outcomes(*states: _Outcomes) -> bool:
    return any(states) and all(value in (0.0, 1.0) for state in states for value, _ in state.values())


def _is_mean(items: _Outcomes, value: float) -> bool:
    return bool(items) and math.isclose(fmean(item for item, _ in items.values()), value, rel_tol=1e-6, abs_tol=1e-9)
