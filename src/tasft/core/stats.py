"""Rates, agreement and their uncertainty: pure functions of outcomes, no model in sight."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval and the number of observations behind it.

    With n = 0 there is no evidence, which is not a perfect score: value, low and high are None. They are so too where
    a figure is not defined, such as the precision of one who never says yes.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def rate(outcomes: Sequence[bool]) -> Estimate:
    """Share of true outcomes, as `rate_of`."""
    return rate_of(sum(map(bool, outcomes)), len(outcomes))


def rate_of(k: int, n: int) -> Estimate:
    """The share k of n with Wilson's score interval, all in [0, 1].

    Source: Wilson 1927; through `scipy.stats.binomtest`.
    """
    return Estimate(*_wilson(k, n), n) if n else Estimate(None, None, None, 0)


@cache
def _wilson(k: int, n: int) -> tuple[float, float, float]:
    from scipy import stats  # takes a second

    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return k / n, float(interval.low), float(interval.high)


def mean(values: Sequence[float]) -> Estimate:
    """Mean with Student's interval, in the unit of the values.

    The interval is None for a single value and for values that are all the same: they show no spread to judge by.

    Source: Student 1908; through `scipy.stats.t`.
    """
    n = len(values)
    if n == 0:
        return Estimate(None, None, None, 0)
    value = float(np.mean(values))
    if min(values) == max(values):
        return Estimate(value, None, None, n)
    from scipy import stats  # takes a second

    low, high = stats.t.interval(0.95, n - 1, loc=value, scale=stats.sem(values))
    return Estimate(value, float(low), float(high), n)


def mean_of_independent(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of figures of different items, each counting the same, in their unit; n is that of all items together.

    Each half of the interval is the root of the summed squares of those of the figures, over their number. There is
    none where a figure has none.

    Source: Zou, Donner 2008 (method of variance estimates recovery).
    """
    values = [estimate.value for estimate in estimates if estimate.value is not None]
    if not values:
        return Estimate(None, None, None, 0)
    value, n = sum(values) / len(values), sum(estimate.n for estimate in estimates)
    halves = [
        (estimate.value - estimate.low, estimate.high - estimate.value)
        for estimate in estimates
        if estimate.value is not None and estimate.low is not None and estimate.high is not None
    ]
    if len(halves) < len(values):
        return Estimate(value, None, None, n)
    below, above = (math.hypot(*side) / len(values) for side in zip(*halves, strict=True))
    return Estimate(value, value - below, value + above, n)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Estimate:
    """Change of a rate on the same items, `mean(after) - mean(before)`, in [-1, 1].

    The interval is the smallest that holds two others: Newcombe's hybrid score interval with continuity correction
    (his method 10), and the exact one for the count of changes one way among all changes (Clopper and Pearson), times
    the share of items that changed. The first keeps its coverage where few items changed, the second leaves out 0
    exactly when McNemar's exact test has p at most 0.05: interval and p never contradict each other.

    Raises:
        ValueError: The two sequences are not of the same length.

    Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17:2635; Clopper and Pearson 1934, through `scipy.stats.binomtest`.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} outcomes before, {len(after)} after: not the same items")
    both = sum(1 for was, now in zip(before, after, strict=True) if was and now)
    gained, lost = sum(map(bool, after)) - both, sum(map(bool, before)) - both
    return _difference(both, gained, lost, len(before) - both - gained - lost)


def _difference(both: int, gained: int, lost: int, neither: int) -> Estimate:
    """`paired_difference` from the four counts of pairs."""
    n = both + gained + lost + neither
    if n == 0:
        return Estimate(None, None, None, 0)
    low, high = _newcombe(both, gained, lost, neither)
    fewest, most = _exact(gained, gained + lost)
    return Estimate((gained - lost) / n, min(low, fewest / n), max(high, most / n), n)


@cache
def _exact(gained: int, changed: int) -> tuple[float, float]:
    """How many more items were gained than lost, of those that changed: Clopper and Pearson's interval, as counts."""
    if not changed:
        return 0.0, 0.0
    from scipy import stats

    share = stats.binomtest(gained, changed).proportion_ci(method="exact")
    return (2 * float(share.low) - 1) * changed, (2 * float(share.high) - 1) * changed


def _newcombe(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Newcombe's method 10 for the second rate less the first, from the four counts of pairs."""
    n = both + gained + lost + neither
    first, first_low, first_high = _wilson(both + lost, n)
    second, second_low, second_high = _wilson(both + gained, n)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    product = both * neither - gained * lost
    correlation = (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    low = second - first - reach(second - second_low, first_high - first)
    high = second - first + reach(second_high - second, first - first_low)
    return max(-1.0, low), min(1.0, high)


SMALLEST_SPLIT = 6
"""Items that have to change, all of them one way, before McNemar's exact test has p at most 0.05: 2 / 2^6."""


def smallest_change(n: int) -> float | None:
    """The smallest change of a rate that n pairs could tell from chance, in [0, 1]; None where no outcome could."""
    return SMALLEST_SPLIT / n if n >= SMALLEST_SPLIT else None


@dataclass(frozen=True)
class Flips:
    """How many items changed their outcome, and the chance of so uneven a count when both ways are as likely.

    Attributes:
        gained: False before and true after.
        lost: True before and false after.
        p: Two-sided; 1 when nothing changed.
    """

    gained: int
    lost: int
    p: float


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> Flips:
    """McNemar's exact test of outcomes on the same items.

    Raises:
        ValueError: The two sequences are not of the same length.

    Source: McNemar 1947; through `scipy.stats.binomtest`.
    """
    pairs = list(zip(before, after, strict=True))
    gained, lost = sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)
    return Flips(gained, lost, _mcnemar_p(gained, lost))


@cache
def _mcnemar_p(gained: int, lost: int) -> float:
    if not gained + lost:
        return 1.0
    from scipy import stats  # takes a second

    return float(stats.binomtest(gained, gained + lost).pvalue)


def clustered(statistic: Callable[[Floats], float], groups: Sequence[str], resamples: int = 2_000) -> Estimate:
    """A statistic of rows of which some belong together, as the replies to one prompt do.

    The interval is the percentile bootstrap over groups: each is drawn with all of its rows, since these are not
    independent. Percentiles and not BCa, because small or one-sided samples leave a statistic undefined in some
    resamples, and those can be passed over; BCa's corrections would be undefined as a whole.

    Args:
        statistic: Of the weights of all rows, which count how often a row was drawn; nan where it is not defined.
        groups: Which group each row belongs to.
        resamples: How many are drawn; the seed is fixed.

    Returns:
        The statistic; n counts rows. No interval where resampling shows no spread: there is some, but unknown.

    Source: Efron 1979; for groups Field and Welsh 2007; through `scipy.stats.bootstrap`.
    """
    names = {name: index for index, name in enumerate(sorted(set(groups)))}
    value = statistic(np.ones(len(groups)))
    if np.isnan(value):
        return Estimate(None, None, None, len(groups))
    if len(names) < 2:
        return Estimate(float(value), None, None, len(groups))
    from scipy import stats

    member = np.array([names[name] for name in groups])
    with warnings.catch_warnings():
        # Of a distribution that holds nan, which is dealt with here.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (np.arange(len(names)),),
            lambda picked: statistic(np.bincount(picked, minlength=len(names))[member].astype(float)),
            n_resamples=resamples,
            batch=100,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size or np.ptp(drawn) < 1e-9:
        return Estimate(float(value), None, None, len(groups))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), len(groups))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else np.nan


# Of the counts of true positives, false positives, false negatives and true negatives.
_MEASURES: dict[str, Callable[[float, float, float, float], float]] = {
    "accuracy": lambda tp, fp, fn, tn: _ratio(tp + tn, tp + fp + fn + tn),
    "precision": lambda tp, fp, fn, tn: _ratio(tp, tp + fp),
    "recall": lambda tp, fp, fn, tn: _ratio(tp, tp + fn),
    "f1": lambda tp, fp, fn, tn: _ratio(2 * tp, 2 * tp + fp + fn),
    "kappa": lambda tp, fp, fn, tn: _ratio(2 * (tp * tn - fp * fn), (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn)),
}


def agreement(
    labels: Sequence[bool], decisions: Sequence[bool], groups: Sequence[str], resamples: int = 2_000
) -> dict[str, Estimate]:
    """Accuracy, precision, recall, F1 and Cohen's kappa of decisions, each as `clustered`.

    Kappa is in [-1, 1], 0 by chance and undefined when both always say the same; the others are in [0, 1].
    Accuracy and kappa do not change when labels and decisions change places.

    Raises:
        ValueError: The sequences are not of the same length.

    Source: Cohen 1960.
    """
    if not len(labels) == len(decisions) == len(groups):
        raise ValueError(f"{len(labels)} labels, {len(decisions)} decisions, {len(groups)} groups")
    decided, true = np.array(decisions, dtype=bool), np.array(labels, dtype=bool)
    cells = np.stack([true & decided, ~true & decided, true & ~decided, ~true & ~decided], axis=1).astype(float)

    def measured(measure: Callable[[float, float, float, float], float]) -> Estimate:
        return clustered(lambda weights: measure(*(weights @ cells).tolist()), groups, resamples)

    return {name: measured(measure) for name, measure in _MEASURES.items()}


def auroc(labels: Sequence[bool], scores: Sequence[float], groups: Sequence[str], resamples: int = 2_000) -> Estimate:
    """Probability that a true row has a higher score than a false one, ties by half, as `clustered`.

    In [0, 1], 0.5 by chance; undefined with one kind of label or one score alone.

    Raises:
        ValueError: The sequences are not of the same length.

    Source: Hanley and McNeil 1982.
    """
    if not len(labels) == len(scores) == len(groups):
        raise ValueError(f"{len(labels)} labels, {len(scores)} scores, {len(groups)} groups")
    true = np.array(labels, dtype=float)
    levels, level = np.unique(np.array(scores, dtype=float), return_inverse=True)
    if len(levels) < 2:
        return Estimate(None, None, None, len(labels))

    def area(weights: Floats) -> float:
        ones = np.bincount(level, weights * true, len(levels))
        zeros = np.bincount(level, weights * (1 - true), len(levels))
        below = zeros.cumsum() - zeros / 2
        return _ratio(float(ones @ below), float(ones.sum() * zeros.sum()))

    return clustered(area, groups, resamples)
