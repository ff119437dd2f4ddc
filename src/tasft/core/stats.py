"""Rates, agreement and their uncertainty: pure functions of outcomes, no model in sight."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Share of true outcomes with Wilson's score interval, all in [0, 1].

    Source: Wilson 1927; through `scipy.stats.binomtest`.
    """
    n = len(outcomes)
    if n == 0:
        return Estimate(None, None, None, 0)
    from scipy import stats  # takes a second

    k = sum(outcomes)
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return Estimate(k / n, float(interval.low), float(interval.high), n)


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
    values = [each.value for each in estimates if each.value is not None]
    if not values:
        return Estimate(None, None, None, 0)
    value, n = sum(values) / len(values), sum(each.n for each in estimates)
    halves = [
        (each.value - each.low, each.high - each.value)
        for each in estimates
        if each.value is not None and each.low is not None and each.high is not None
    ]
    if len(halves) < len(values):
        return Estimate(value, None, None, n)
    below, above = (math.hypot(*side) / len(values) for side in zip(*halves, strict=True))
    return Estimate(value, value - below, value + above, n)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Change of a rate on the same items, `mean(after) - mean(before)`, in [-1, 1].

    An outcome is true or false, or a share in [0, 1] when an item was tried several times.

    The interval is the percentile bootstrap over items (10,000 resamples, fixed seed), so that what is
    common to both answers of an item cancels. When no item changed, resampling sees no spread although
    there is some; the interval is then Wilson's for 0 of n on either side.

    Raises:
        ValueError: The two sequences are not of the same length.

    Source: Efron 1979; through `scipy.stats.bootstrap`.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} outcomes before, {len(after)} after: not the same items")
    n = len(before)
    if n == 0:
        return Estimate(None, None, None, 0)
    from scipy import stats

    difference = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if (difference == difference[0]).all():
        edge = float(stats.binomtest(0, n).proportion_ci(method="wilson").high)
        value = float(difference[0])
        return Estimate(value, max(-1.0, value - edge), min(1.0, value + edge), n)
    interval = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=10_000,
        batch=max(1, 10_000_000 // n),  # 80 MB, however many items
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(difference.mean()), float(interval.low), float(interval.high), n)


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
    if not gained + lost:
        return Flips(0, 0, 1.0)
    from scipy import stats  # takes a second

    return Flips(gained, lost, float(stats.binomtest(gained, gained + lost).pvalue))


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
    said, true = np.array(decisions, dtype=bool), np.array(labels, dtype=bool)
    cells = np.stack([true & said, ~true & said, true & ~said, ~true & ~said], axis=1).astype(float)

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
