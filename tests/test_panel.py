"""Several judges with one verdict, and the gate that may not hang on the judge of the harvest."""

import pytest

from tasft.core.errors import UserError
from tasft.judges import JUDGES, JudgeSettings, Pair, Verdict, load_judge
from tasft.judges.panel import combined


@pytest.mark.parametrize(
    ("words", "any_of", "majority", "all_of"),
    [
        ([True, True, True], True, True, True),
        ([True, True, False], True, True, False),
        ([True, False, False], True, False, False),
        ([False, False, False], False, False, False),
        ([True, None, None], True, None, None),
        ([False, None, None], None, None, False),
        ([True, None, False], True, None, False),
        ([None, None, None], None, None, None),
        ([True, False], True, None, False),
    ],
)
def test_what_judges_say_together(words, any_of, majority, all_of):
    assert [combined(words, agree) for agree in ("any", "majority", "all")] == [any_of, majority, all_of]


class Says:
    threshold = None

    def __init__(self, name, harmful, refusal=None, tells=("harmful", "refusal")):
        self.name, self.version, self.tells = name, name, frozenset(tells)
        self.said = harmful, refusal

    def judge(self, pairs):
        return [Verdict(pair.id, self.name, self.said[0], None, self.said[1]) for pair in pairs]


@pytest.fixture
def members(monkeypatch):
    made = {"yes": Says("yes", True, False), "no": Says("no", False, True), "unsure": Says("unsure", None, True)}
    made["refusals"] = Says("refusals", None, True, tells=("refusal",))
    made["harm"] = Says("harm", True, tells=("harmful",))
    for name, judge in made.items():
        monkeypatch.setitem(JUDGES, name, lambda settings, judge=judge: judge)
    return made


def panel(of, agree="majority"):
    return load_judge("both", {"both": JudgeSettings(kind="panel", of=of, agree=agree)})


def test_a_panel_gives_one_verdict_under_its_own_name(members):
    (verdict,) = panel(["yes", "no", "unsure"], "any").judge([Pair("a", "p", "r")])
    assert (verdict.judge, verdict.harmful, verdict.refusal) == ("both", True, True)


def test_a_panel_that_does_not_agree_is_undecided_and_says_who_says_what(members):
    (verdict,) = panel(["yes", "no"]).judge([Pair("a", "p", "r")])
    assert verdict.undecided
    assert verdict.reason == "undecided: harmful: yes yes, no no"
    assert verdict.refusal is None


def test_a_panel_tells_what_two_of_its_judges_tell(members):
    judge = panel(["yes", "no", "refusals"])
    assert judge.tells == {"harmful", "refusal"}
    assert judge.judge([Pair("a", "p", "r")])[0].refusal is True  # two of three


def test_the_version_changes_with_members_and_rule(members):
    versions = {panel(of, agree).version for of in (["yes", "no"], ["yes", "unsure"]) for agree in ("any", "all")}
    assert len(versions) == 4


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (["yes"], "two or more different judges"),
        (["yes", "yes"], "two or more different judges"),
        (["refusals", "harm"], "tell nothing in common"),
        (["yes", "nobody"], "no judge is called 'nobody'"),
    ],
)
def test_a_panel_that_makes_no_sense_is_refused(members, of, says):
    with pytest.raises(UserError, match=says):
        panel(of)


def test_a_panel_of_panels_is_refused(members):
    declared = {
        "inner": JudgeSettings(kind="panel", of=["yes", "no"]),
        "outer": JudgeSettings(kind="panel", of=["inner", "yes"]),
    }
    with pytest.raises(UserError, match="inner: a panel cannot hold another panel"):
        load_judge("outer", declared)
