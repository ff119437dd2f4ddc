"""Rates and their uncertainty: pure functions of counts, no model in sight."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval and the number of observations behind it.

    With n = 0 there is no evidence, which is not a perfect score: value, low and high are None.
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
    k = sum(outcomes)
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return Estimate(k / n, float(interval.low), float(interval.high), n)


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
    difference = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if (difference == difference[0]).all():
        edge = float(stats.binomtest(0, n).proportion_ci(method="wilson").high)
        value = float(difference[0])
        return Estimate(value, max(-1.0, value - edge), min(1.0, value + edge), n)
    interval = stats.bootstrap(
        (difference,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Estimate(float(difference.mean()), float(interval.low), float(interval.high), n)
