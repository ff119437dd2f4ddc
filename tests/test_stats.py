import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn import metrics

from tasft.core.stats import (
    Estimate,
    _difference,
    _mcnemar_p,
    _newcombe,
    agreement,
    auroc,
    clustered,
    mcnemar,
    mean_of_independent,
    paired_difference,
    rate,
    smallest_change,
)


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


def test_the_mean_of_tasks_is_as_wide_as_drawing_them_anew_is():
    sizes, chances = (300, 200, 400), (0.62, 0.35, 0.21)
    tasks = [rate([True] * round(n * p) + [False] * (n - round(n * p))) for n, p in zip(sizes, chances, strict=True)]
    found = mean_of_independent(tasks)
    assert (found.value, found.n) == (pytest.approx(sum(chances) / 3, abs=1e-12), 900)
    drawn = np.random.default_rng(0)
    means = sum(drawn.binomial(n, p, 200_000) / n for n, p in zip(sizes, chances, strict=True)) / 3
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.003)
    assert mean_of_independent(tasks[:1]) == Estimate(*(pytest.approx(part) for part in vars(tasks[0]).values()))
    assert mean_of_independent([tasks[0], Estimate(0.5, None, None, 1)]).low is None
    assert mean_of_independent([]).value is None


def test_paired_difference_cancels_what_items_share():
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 55
    estimate = paired_difference(before, after)
    assert estimate.value == pytest.approx(-0.05)
    # Of two samples of their own the interval would be -0.18 to 0.09. McNemar's p of 5 changes one way is 0.0625.
    assert -0.1 < estimate.low < 0 < estimate.high < 0.005


def test_paired_difference_of_equal_answers_still_has_width():
    estimate = paired_difference([True] * 40, [True] * 40)
    assert estimate.value == 0
    assert estimate.low < -0.05 < 0.05 < estimate.high


def test_mcnemar_is_a_coin_toss_over_what_changed():
    before, after = [True] * 9 + [False] + [True] * 30, [False] * 9 + [True] + [True] * 30
    flips = mcnemar(before, after)
    # Of ten coins at most one falls the other way: 2 (1 + 10) / 1024.
    assert (flips.gained, flips.lost, flips.p) == (1, 9, pytest.approx(22 / 1024))
    assert mcnemar([True, False], [True, False]).p == 1
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [])


def test_paired_difference_of_many_items_is_narrow():
    estimate = paired_difference([False] * 20_000, [True] * 200 + [False] * 19_800)
    assert 0.0085 < estimate.low < 0.01 < estimate.high < 0.0116


def paired_counts(both, gained, lost, neither):
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return before, [True] * (both + gained) + [False] * (lost + neither)


def test_the_score_interval_is_that_of_the_paper():
    """Newcombe 1998, of 36, 12, 2 and 0 pairs; a shift within equal margins has no correlation to count on."""
    assert _newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert _newcombe(36, 2, 12, 0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def agree(counts):
    """Whether the interval leaves out 0 exactly when McNemar's p is at most 0.05, and holds its own value."""
    found, p = _difference(*counts), _mcnemar_p(counts[1], counts[2])
    assert -1 <= found.low <= found.value <= found.high <= 1, counts
    return (found.low > 0 or found.high < 0) == (p <= 0.05)


def test_interval_and_mcnemar_agree_in_every_table_of_up_to_40_pairs():
    tables = (
        (both, gained, lost, n - both - gained - lost)
        for n in range(1, 41)
        for gained in range(n + 1)
        for lost in range(gained, n + 1 - gained)  # The other half is the same with its sign turned.
        for both in range(n + 1 - gained - lost)
    )
    wrong = [counts for counts in tables if not agree(counts)]
    assert not wrong


def test_interval_and_mcnemar_agree_in_tables_of_any_size():
    drawn = np.random.default_rng(0)
    for n in (60, 200, 518, 2_000):
        for shares in drawn.dirichlet((0.6, 0.2, 0.2, 0.6), 100):
            counts = drawn.multinomial(n, shares)
            assert agree(counts.tolist()), counts
    assert agree((0, 0, 5, 513))


def test_counts_are_those_of_the_outcomes():
    outcomes = paired_counts(3, 9, 2, 6)
    assert paired_difference(*outcomes) == _difference(3, 9, 2, 6)
    assert mcnemar(*outcomes).p == _mcnemar_p(9, 2)
    assert paired_difference(*outcomes).value == pytest.approx(7 / 20)


def test_the_smallest_change_that_can_be_told_is_one_that_the_test_tells():
    for n in (6, 7, 40):
        changed = round(smallest_change(n) * n)
        assert mcnemar(*paired_counts(0, changed, 0, n - changed)).p <= 0.05
        assert mcnemar(*paired_counts(0, changed - 1, 0, n - changed + 1)).p > 0.05
    assert smallest_change(5) is None
    assert mcnemar(*paired_counts(0, 5, 0, 0)).p > 0.05


def test_different_items_are_refused():
    with pytest.raises(ValueError, match="not the same items"):
        paired_difference([True], [True, False])


def test_agreement_is_what_a_pencil_gives():
    # 20 true positives, 5 false ones, 10 false negatives, 15 true ones: Cohen's kappa is (0.7 - 0.5) / (1 - 0.5).
    labels = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    decisions = [True] * 25 + [False] * 25
    found = agreement(labels, decisions, [str(row) for row in range(50)])
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {"accuracy": 0.7, "precision": 0.8, "recall": 2 / 3, "f1": 8 / 11, "kappa": 0.4}
    )
    assert {estimate.n for estimate in found.values()} == {50}
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high
    # Wilson's interval of 35 in 50 is 0.562 to 0.809.
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx((0.57, 0.82), abs=0.03)


def test_auroc_counts_ties_by_half():
    # Of the 2 x 3 pairs four are in order and one is tied.
    labels, scores = [True, True, False, False, False], [0.9, 0.4, 0.5, 0.4, 0.1]
    assert auroc(labels, scores, list("abcde")).value == pytest.approx(4.5 / 6)
    assert auroc(labels, [-score for score in scores], list("abcde")).value == pytest.approx(1.5 / 6)


def test_measures_and_intervals_are_those_of_scikit_learn_over_the_same_resamples():
    random = np.random.default_rng(1)
    groups = np.repeat([f"p{index:02}" for index in range(40)], 3)
    labels = random.random(120) < 0.3
    scores = (random.random(120) + 0.4 * labels).round(1)
    decided = scores >= 0.7
    found = {**agreement(labels, decided, groups, 200), "auroc": auroc(labels, scores, groups, 200)}
    oracle = {
        "accuracy": metrics.accuracy_score,
        "precision": metrics.precision_score,
        "recall": metrics.recall_score,
        "f1": metrics.f1_score,
        "kappa": metrics.cohen_kappa_score,
        "auroc": metrics.roc_auc_score,
    }
    drawn = np.random.default_rng(0).integers(0, 40, (200, 40))
    for name, metric in oracle.items():
        values = scores if name == "auroc" else decided
        resampled = []
        for picked in drawn:
            rows = np.concatenate([3 * picked, 3 * picked + 1, 3 * picked + 2])
            resampled.append(metric(labels[rows], values[rows]))
        low, high = np.quantile(resampled, [0.025, 0.975])
        estimate = found[name]
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((metric(labels, values), low, high)), name


def test_replies_to_one_prompt_count_together():
    """Ten rows of each prompt that are all alike say no more than one."""
    outcomes = np.random.default_rng(0).random(60) < 0.5
    prompts = [str(index) for index in range(60)]
    often = agreement(np.repeat(outcomes, 10), [True] * 600, np.repeat(prompts, 10))["accuracy"]
    once = agreement(outcomes, [True] * 60, prompts)["accuracy"]
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    alone = agreement(np.repeat(outcomes, 10), [True] * 600, [str(row) for row in range(600)])["accuracy"]
    assert alone.high - alone.low < 0.5 * (often.high - often.low)


@pytest.mark.parametrize(
    ("labels", "decisions", "undefined"),
    [
        ([], [], {"accuracy", "precision", "recall", "f1", "kappa"}),
        ([False, False], [False, False], {"precision", "recall", "f1", "kappa"}),
        ([True, True], [True, True], {"kappa"}),
        ([False, False], [True, False], {"recall"}),
        ([True, False], [False, False], {"precision"}),
    ],
)
def test_what_is_not_defined_is_none_and_no_warning(labels, decisions, undefined):
    groups = [str(row) for row in range(len(labels))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = agreement(labels, decisions, groups)
    n = len(labels)
    assert {name for name, estimate in found.items() if estimate.value is None} == undefined
    assert all(found[name] == Estimate(None, None, None, n) for name in undefined)


@pytest.mark.parametrize(
    ("labels", "scores"), [([], []), ([True, True], [0.1, 0.9]), ([False, False], [0.1, 0.9]), ([True, False], [5, 5])]
)
def test_auroc_of_one_kind_alone_is_not_defined(labels, scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = auroc(labels, scores, [str(row) for row in range(len(labels))])
    assert estimate == Estimate(None, None, None, len(labels))


def test_resamples_in_which_nothing_is_defined_are_passed_over():
    # One positive among four: in a third of the resamples it is not drawn, and there is no recall.
    labels, scores = [True, False, False, False], [0.8, 0.9, 0.2, 0.1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = auroc(labels, scores, list("abcd"))
    assert estimate.value == pytest.approx(2 / 3)
    assert (estimate.low, estimate.high) == (0, 1)


def test_no_interval_is_claimed_where_resampling_sees_no_spread():
    found = agreement([True, False] * 20, [True, False] * 20, [str(row) for row in range(40)])
    assert found["precision"] == Estimate(1.0, None, None, 40)
    assert found["kappa"] == Estimate(1.0, None, None, 40)
    assert clustered(lambda weights: float(weights.sum()), ["a", "a"]) == Estimate(2.0, None, None, 2)


def test_labels_and_decisions_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="1 labels, 2 decisions, 2 groups"):
        agreement([True], [True, False], ["a", "b"])
    with pytest.raises(ValueError, match="1 labels, 2 scores"):
        auroc([True], [0.1, 0.2], ["a", "b"])


def test_importing_the_statistics_takes_no_scipy():
    code = (
        "import sys, tasft; before = set(sys.modules); import tasft.core.stats; added = set(sys.modules) - before; "
        "heavy = {'scipy', 'sklearn', 'torch', 'pandas'} & {name.partition('.')[0] for name in added}; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
