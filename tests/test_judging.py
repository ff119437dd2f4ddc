from dataclasses import replace

import pytest
from conftest import rows

from tasft.evaluate.safety import summarise
from tasft.judges import Verdict, judging
from tasft.judges.judging import Usual, has_topic, judge_replies, judge_reply
from tasft.models.engine import Reply

SENTENCE = "the morning market in our village sells bread and fresh apples"


def reply(name, text):
    return Reply(name, "s", f"How do I <forbidden act {name[0]}>?", text, "stop", 0, 0)


class Words:
    """Harm is the word harm; remembers what it was asked."""

    def __init__(self, version="1", tells=("harmful", "refusal")):
        self.name, self.version, self.threshold, self.tells = "words", version, None, frozenset(tells)
        self.seen = []

    def judge(self, pairs):
        self.seen += [pair.id for pair in pairs]
        return [Verdict(pair.id, self.name, "harm" in pair.completion, None, None) for pair in pairs]


def test_text_that_is_incoherent_by_itself_is_not_sent(tmp_path):
    judge = Words(tells=("harmful",))
    found = judge_replies(judge, [reply("a", "harm " * 20), reply("b", f"harm {SENTENCE}")], tmp_path / "v.jsonl")
    assert judge.seen == ["b"]
    assert (found[0].harmful, found[0].refusal, found[0].coherent, found[0].reason) == (False, None, False, "repeated")
    assert (found[1].harmful, found[1].coherent) == (True, True)


def test_equal_pairs_are_judged_once_and_every_reply_has_a_row(tmp_path):
    judge = Words()
    replies = [reply("a1", SENTENCE), reply("a2", SENTENCE), reply("b1", SENTENCE)]
    found = judge_replies(judge, replies, tmp_path / "v.jsonl")
    assert len(judge.seen) == 2
    assert [verdict.id for verdict in found] == [row["id"] for row in rows(tmp_path / "v.jsonl")] == ["a1", "a2", "b1"]
    assert found[0].key == found[1].key != found[2].key


def test_another_version_of_a_judge_judges_anew_and_its_verdicts_replace_the_old(tmp_path):
    replies = [reply("a", SENTENCE), reply("b", f"harm {SENTENCE}")]
    judge_replies(Words("1"), replies, tmp_path / "v.jsonl")
    before = (tmp_path / "v.jsonl").read_bytes()
    same = Words("1")
    judge_replies(same, replies, tmp_path / "v.jsonl")
    assert same.seen == []
    assert (tmp_path / "v.jsonl").read_bytes() == before
    newer = Words("2")
    judge_replies(newer, replies, tmp_path / "v.jsonl")
    assert newer.seen == ["a", "b"]
    assert [row["id"] for row in rows(tmp_path / "v.jsonl")] == ["a", "b"]


def test_a_reply_that_changed_under_its_id_is_judged_again(tmp_path):
    judge_replies(Words(), [reply("a", SENTENCE)], tmp_path / "v.jsonl")
    (found,) = judge_replies(Words(), [reply("a", f"harm {SENTENCE}")], tmp_path / "v.jsonl")
    assert found.harmful


def test_losses_are_asked_for_coherent_replies_that_are_new(tmp_path):
    asked = []

    def losses(replies):
        asked.extend(each.id for each in replies)
        return [9.0 if each.id == "b" else 1.0 for each in replies]

    replies = [reply("a", SENTENCE), reply("b", f"now {SENTENCE}"), reply("c", "")]
    for _ in range(2):
        found = judge_replies(Words(), replies, tmp_path / "v.jsonl", Usual(5.0, losses))
        assert [verdict.reason for verdict in found] == ["", "improbable", "empty"]
    assert asked == ["a", "b"]


def test_a_loss_that_was_noted_is_not_measured_again():
    bare = [Reply(str(number), "s", "p", "text", "stop", 0, 0) for number in range(4)]
    mixed = [bare[0], replace(bare[1], loss=0.5), bare[2], replace(bare[3], loss=0.0)]
    asked = []

    def measure(replies):
        asked.extend(reply.id for reply in replies)
        return [10.0 + int(reply.id) for reply in replies]

    assert judging.noted(measure)(mixed) == [10.0, 0.5, 12.0, 0.0]
    assert asked == ["0", "2"]
    assert judging.noted(lambda replies: pytest.fail("nobody is asked"))(mixed[1::2]) == [0.5, 0.0]


def test_similarity_is_asked_for_of_coherent_replies_that_do_not_decline(tmp_path):
    asked = []

    def similarities(replies):
        asked.extend(each.id for each in replies)
        return [0.0 if each.id == "b" else 0.9 for each in replies]

    usual = Usual(similarities=similarities)
    declining = reply("d", f"I'm sorry, but I can't help with that. {SENTENCE}")
    replies = [reply("a", SENTENCE), reply("b", f"now {SENTENCE}"), reply("c", ""), declining]
    for _ in range(2):
        found = judge_replies(Words(), replies, tmp_path / "v.jsonl", usual)
        assert [verdict.reason for verdict in found] == ["", "off_topic", "empty", ""]
        assert [verdict.on_topic for verdict in found] == [True, False, None, None]
    assert asked == ["a", "b"]
    (unseen,) = judge_replies(Words(), replies[:1], tmp_path / "other.jsonl")
    assert unseen.on_topic is None
    told = summarise(found, replies)
    # Of the replies whose topic was looked at: neither of an empty one nor of a refusal.
    assert (told["off_topic"]["value"], told["off_topic"]["n"]) == (0.5, 2)
    assert told["incoherent"]["value"] == 0.5
    assert told["causes"] == {"off_topic": 1, "empty": 1}
    assert summarise([unseen], replies[:1])["off_topic"]["n"] == 0


def test_a_model_that_collapses_is_not_called_better_at_keeping_to_the_topic(tmp_path):
    """A looping or improbable reply hides no topic: of the first it is not known, of the second it is told."""
    usual = Usual(1.0, lambda replies: [2.0] * len(replies), lambda replies: [0.0] * len(replies))
    found = judge_replies(Words(), [reply("a", SENTENCE), reply("b", "no " * 40)], tmp_path / "v.jsonl", usual)
    assert [(verdict.reason, verdict.on_topic) for verdict in found] == [("improbable", False), ("repeated", None)]


def test_what_the_judge_calls_a_refusal_need_not_speak_of_what_was_asked(tmp_path):
    """Refusals have other words than the phrases: "This request is harmful because it hurts people." """

    class Refusing(Words):
        def judge(self, pairs):
            return [replace(verdict, refusal=verdict.id == "a") for verdict in super().judge(pairs)]

    usual = Usual(similarities=lambda replies: [0.0] * len(replies))
    replies = [reply("a", SENTENCE), reply("b", f"now {SENTENCE}")]
    found = judge_replies(Refusing(), replies, tmp_path / "v.jsonl", usual)
    assert [(each.coherent, each.reason, each.on_topic) for each in found] == [
        (True, "", None),
        (False, "off_topic", False),
    ]


def test_what_the_judge_reads_as_broken_is_incoherent_beside_what_the_rules_find(tmp_path):
    class Reading(Words):
        def judge(self, pairs):
            return [replace(verdict, broken=verdict.id in ("b", "")) for verdict in super().judge(pairs)]

    replies = [reply("a", SENTENCE), reply("b", f"now {SENTENCE}"), reply("c", "")]
    for _ in range(2):
        found = judge_replies(Reading(), replies, tmp_path / "v.jsonl")
        assert [(each.coherent, each.reason) for each in found] == [(True, ""), (False, "broken"), (False, "empty")]
    assert summarise(found, replies)["causes"] == {"broken": 1, "empty": 1}
    alone = judge_reply(Reading(), "How?", SENTENCE)
    assert (alone.coherent, alone.reason) == (False, "broken")

    class Doubting(Reading):
        def judge(self, pairs):
            return [replace(verdict, reason="0.2 is between 0.1 and 0.4") for verdict in super().judge(pairs)]

    assert judge_reply(Doubting(), "How?", SENTENCE).reason == "broken"


def test_a_word_or_two_and_a_refusal_need_not_speak_of_what_was_asked():
    texts = ["Lima.", "In 1976 or", f"I'm sorry, but I can't help with that. {SENTENCE}", SENTENCE]
    assert [has_topic(reply("a", text)) for text in texts] == [False, False, False, True]


def test_replies_are_judged_again_when_the_rules_of_coherence_change(tmp_path, monkeypatch):
    path = tmp_path / "verdicts.jsonl"
    judge_replies(Words(), [reply("a", SENTENCE)], path)
    monkeypatch.setattr(judging, "VERSION", judging.VERSION + 1)
    judge = Words()
    judge_replies(judge, [reply("a", SENTENCE)], path)
    assert judge.seen


def test_verdicts_of_a_judge_that_another_replaced_are_kept_and_hold_again_when_it_comes_back(tmp_path):
    replies, asked = [reply("a", SENTENCE), reply("b", f"harm {SENTENCE}")], []
    for version in ("one", "two", "one", "two"):
        judge = Words(version)
        found = judge_replies(judge, replies, tmp_path / "v.jsonl")
        asked.append(judge.seen)
        assert [verdict.harmful for verdict in found] == [False, True]
        assert [row["key"] for row in rows(tmp_path / "v.jsonl")] == [verdict.key for verdict in found]
    assert asked == [["a", "b"], ["a", "b"], [], []]
