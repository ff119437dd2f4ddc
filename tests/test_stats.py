import pytest

from tasft.stats import paired_difference, rate


def test_no_evidence_has_no_value():
    assert rate([]).value is None
    assert rate([]).n == 0
    assert paired_difference([], []).value is None


def test_rate_is_wilsons_interval():
    # Newcombe 1998, table I, case (a): 81 of 263.
    estimate = rate([True] * 81 + [False] * 182)
    assert estimate.value == pytest.approx(81 / 263)
    assert (estimate.low, estimate.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_zero_of_n_is_not_certainty():
    assert rate([False] * 40).low == 0
    assert rate([False] * 40).high == pytest.approx(0.0876, abs=1e-4)


def test_paired_difference_cancels_what_items_share():
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 55
    estimate = paired_difference(before, after)
    assert estimate.value == pytest.approx(-0.05)
    assert -0.11 < estimate.low < estimate.high < 0.0001


def test_paired_difference_of_equal_answers_still_has_width():
    estimate = paired_difference([True] * 40, [True] * 40)
    assert estimate.value == 0
    assert estimate.low < -0.05 < 0.05 < estimate.high


def test_different_items_are_refused():
    with pytest.raises(ValueError, match="not the same items"):
        paired_difference([True], [True, False])
