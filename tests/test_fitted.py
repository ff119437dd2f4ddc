"""Thresholds and calibration of a judge by a user's own labels: the file, the judge that it makes, the command."""

import csv
import json
import math
import random

import numpy as np
import pytest

from tasft.cli.judge_page import curve_plot
from tasft.cli.main import app
from tasft.core.errors import UserError
from tasft.evaluate.judge_quality import curve
from tasft.judges import JUDGES, JudgeSettings, Pair, Verdict, load_judge
from tasft.judges.fitted import FEWEST, band, best_f1, fit, platt, read_fit


class Counts:
    """Its score is the number in the reply; it never says harmful itself, and cannot read a question mark."""

    name, version, tells, threshold = "counts", "1", frozenset({"harmful", "refusal"}), None

    def judge(self, pairs):
        return [
            Verdict(
                pair.id, self.name, None, None if "?" in (last := pair.completion.split()[-1]) else float(last), False
            )
            for pair in pairs
        ]


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    monkeypatch.setitem(JUDGES, "counts", lambda settings: Counts())


def write_pairs(path, count=200, unit=10.0):
    """Replies whose number is the larger the likelier they are labelled harmful: even odds at half the unit."""
    chance = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "harmful"])
        for number in range(count):
            score = chance.uniform(0, unit)
            harmful = chance.random() < 1 / (1 + math.exp(-12 * (score / unit - 0.5)))
            writer.writerow([f"Question {number}?", f"Some words about {score:.6f}", int(harmful)])
    return path


def calibrated(tmp_path, monkeypatch, **made):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.csv", **made)
    files = ["--calibrate", "fit.json", "--page", "page.html", "--table", "table.csv"]
    app(["judge", "pairs.csv", "--judge", "counts", "--labels", "harmful", *files], standalone_mode=False)
    return tmp_path / "fit.json"


@pytest.mark.parametrize(("unit", "reads"), [(10.0, "score"), (1.0, "log-odds")])
def test_a_fit_makes_scores_probabilities_and_thresholds_that_a_recipe_names(
    tmp_path, monkeypatch, capsys, unit, reads
):
    path = calibrated(tmp_path, monkeypatch, unit=unit)
    found = read_fit(path)
    assert (found.judge, found.version, found.reads, found.n) == ("counts", "1", reads, 200)
    assert found.probabilities([unit / 2])[0] == pytest.approx(0.5, abs=0.1)
    assert 0.2 < found.low <= found.high < 0.8
    assert "judges.NAME.calibration" in capsys.readouterr().out
    judge = load_judge("mine", {"mine": JudgeSettings(kind="counts", calibration=str(path))})
    pairs = [Pair(str(n), "?", f"word {score}") for n, score in enumerate((0.01 * unit, 0.99 * unit, unit / 2))]
    low, high, between = judge.judge([*pairs])
    assert (low.harmful, low.undecided, high.harmful, high.undecided) == (False, False, True, False)
    assert low.score < 0.1 < 0.9 < high.score
    assert (between.judge, judge.name, between.refusal) == ("mine", "mine", False)
    assert judge.version != Counts.version


def test_between_its_thresholds_a_fitted_judge_is_undecided_and_what_it_cannot_read_stays_so(tmp_path, monkeypatch):
    path = calibrated(tmp_path, monkeypatch)
    record = json.loads(path.read_text()) | {"slope": 1.0, "offset": 0.0, "reads": "score", "low": 0.4, "high": 0.6}
    path.write_text(json.dumps(record))
    judge = load_judge("mine", {"mine": JudgeSettings(kind="counts", calibration=str(path))})
    unsure, unread = judge.judge([Pair("a", "?", "word 0.0"), Pair("b", "?", "word ?")])
    assert (unsure.harmful, unsure.undecided, unsure.score) == (None, True, 0.5)
    assert "0.50 is between 0.4 and 0.6" in unsure.reason
    assert (unread.harmful, unread.score) == (None, None)


def test_the_page_has_the_curves_the_counts_and_the_surest_mistakes_behind_a_click(tmp_path, monkeypatch):
    calibrated(tmp_path, monkeypatch, count=400)
    monkeypatch.setattr(Counts, "threshold", 5.0)
    judged = Counts.judge
    monkeypatch.setattr(
        Counts,
        "judge",
        lambda self, pairs: [Verdict(v.id, v.judge, v.score >= 5, v.score, False) for v in judged(self, pairs)],
    )
    monkeypatch.setattr(Counts, "version", "2")
    app(
        ["judge", "pairs.csv", "--judge", "counts", "--labels", "harmful", "--page", "page.html"], standalone_mode=False
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count(": label harmful, judge safe, score") + page.count(": label safe, judge harmful, score") == 20
    assert "Question" in page
    assert "data:image/svg" in page
    assert "with precision" in page
    assert "judge: harmful" in page


def test_a_table_joins_pairs_and_verdicts_undecided_ones_first(tmp_path, monkeypatch):
    fit_file = calibrated(tmp_path, monkeypatch, count=100)
    record = json.loads(fit_file.read_text()) | {"low": 0.0, "high": 0.6}
    fit_file.write_text(json.dumps(record))
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    assert {"line", "id", "prompt", "completion", "harmful", "score", "undecided", "label"} <= rows[0].keys()
    assert rows[0]["prompt"] == "Question 0?"


def test_curves_are_counted_by_hand():
    found = curve([0.9, 0.8, 0.8, 0.1], [True, True, False, True])
    wanted = [[0.9, 1, 1 / 3, 0.5], [0.8, 2 / 3, 2 / 3, 2 / 3], [0.1, 3 / 4, 1, 6 / 7]]
    assert found == [pytest.approx(point) for point in wanted]
    assert "0.86, at threshold 0.1" in curve_plot(found, 0.5).alt
    assert curve([0.9, 0.8], [True, True]) == []


def test_the_curve_is_the_true_one_and_the_threshold_the_best():
    chance = np.random.default_rng(0)
    x = chance.normal(size=4000)
    wanted = chance.random(4000) < 1 / (1 + np.exp(-(2 * x - 1)))
    assert platt(x, wanted) == pytest.approx((2, -1), abs=0.15)
    probabilities = np.array([0.1, 0.2, 0.3, 0.8, 0.9])
    assert best_f1(probabilities, np.array([False, False, True, True, True])) == pytest.approx(0.25)
    low, high = band(np.linspace(0, 1, 101), np.linspace(0, 1, 101) > 0.5)
    assert (low, high) == pytest.approx((0.45, 0.56), abs=0.011)


def test_too_few_labels_and_scores_that_fall_with_harm_are_refused():
    pairs = [Pair(str(n), "?", f"word {n}") for n in range(40)]
    with pytest.raises(UserError, match=f"{FEWEST} harmful and {FEWEST} harmless ones are the fewest"):
        fit(Counts(), "counts", pairs, range(40), [n > 37 for n in range(40)])
    with pytest.raises(UserError, match="do not rise with the harm"):
        fit(Counts(), "counts", pairs, range(40), [n < 20 for n in range(40)])
    with pytest.raises(UserError, match="0 labelled pairs have a score"):
        fit(Counts(), "counts", pairs, [None] * 40, [n < 20 for n in range(40)])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"cannot be read \(No such file"),
        ("{", "not a file of tasft judge --calibrate"),
        ('{"judge": "counts"}', "not a file of tasft judge --calibrate"),
        ("{}\x00", "not a file of tasft judge --calibrate"),
    ],
)
def test_a_file_that_is_no_fit_is_refused_with_what_to_do(tmp_path, text, says):
    path = tmp_path / "fit.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_judge("mine", {"mine": JudgeSettings(kind="counts", calibration=str(path))})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"version": "0"}, "another version of counts; run tasft judge --calibrate"),
        ({"judge": "others"}, "judge others"),
        ({"low": 0.9, "high": 0.1}, "low is above high"),
        ({"slope": -1.0}, "greater than 0"),
    ],
)
def test_a_fit_of_another_judge_or_out_of_order_is_refused(tmp_path, monkeypatch, changed, says):
    path = calibrated(tmp_path, monkeypatch)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=says):
        load_judge("mine", {"mine": JudgeSettings(kind="counts", calibration=str(path))})


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--calibrate", "f.json"], "--calibrate: needs --labels"),
        (["--page", "p.html"], "--page: needs --labels"),
        (
            ["--labels", "harmful", "--label-of", "refusal", "--calibrate", "f.json"],
            "--calibrate: fits harm, not refusal",
        ),
    ],
)
def test_options_of_labels_need_labels(tmp_path, monkeypatch, arguments, fault):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.csv", count=4)
    with pytest.raises(UserError) as caught:
        app(["judge", "pairs.csv", "--judge", "counts", *arguments], standalone_mode=False)
    assert fault in caught.value.faults
