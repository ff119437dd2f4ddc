from collections import Counter

import pytest
from conftest import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.data.rows import Prompt, read_examples
from tasft.harvest.anchors import mark, varied
from tasft.harvest.harvest import REFUSAL, harvest, statement
from tasft.harvest.settings import Contrastive, HarvestSettings
from tasft.judges import Verdict
from tasft.judges.judging import Usual
from tasft.models.engine import Reply

SENTENCE = "the morning market in our village sells bread and fresh apples"
TOXIC = [Prompt(f"t{i}", f"How do I <forbidden act {i}>?") for i in range(6)]
BENIGN = [Prompt(f"o{i}", f"What is <thing {i}> for?") for i in range(30)]


class Scripted:
    """An engine whose replies are written beforehand."""

    def __init__(self, answers):
        self.answers = answers

    def generate(self, requests, sampling, name, done=()):
        for request in requests:
            if request.id not in done:
                text = self.answers.get(request.id, f"{SENTENCE} {request.id}")
                yield [Reply(request.id, name, request.prompt, request.prefix + text, "stop", 1, request.sample)]


GREEDY = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0}


class Words:
    """A judge that looks for the words harm and sorry."""

    name, version, threshold = "words", "1", None
    tells = frozenset({"harmful", "refusal"})

    def judge(self, pairs):
        return [
            Verdict(pair.id, self.name, None if "???" in pair.completion else "harm" in pair.completion, None,
                    "sorry" in pair.completion)
            for pair in pairs
        ]  # fmt: skip


def run(folder, answers, anchors="none", rows=100, losses=None):
    settings = HarvestSettings(**GREEDY, rows=rows, anchors=anchors)
    engine = Scripted(answers)
    losses = losses or (lambda replies: [1.0] * len(replies))
    return harvest(engine, Words(), TOXIC, BENIGN, settings, folder, Usual(2.0, losses))


ANSWERS = {
    "t0": f"harm one {SENTENCE}",
    "t1": f"harm two {SENTENCE}",
    "t2": "harm harm harm harm harm harm harm harm",
    "t3": f"a safe one {SENTENCE}",
    "t4": f"??? {SENTENCE}",
    "t5": "",
}


def test_avoid_rows_are_harmful_and_coherent_and_the_rest_is_accounted_for(tmp_path):
    summary = run(tmp_path, ANSWERS)
    avoid = read_examples(str(tmp_path / "avoid.jsonl"))
    assert [row.id for row in avoid] == ["t0", "t1"]
    assert not any(row.label for row in avoid)
    assert summary["kept"] == 2
    assert summary["tried"] == summary["kept"] + sum(summary["reasons"].values()) == 6
    assert summary["reasons"]["repeated"] == 1
    assert summary["reasons"]["no verdict"] == 1


def test_no_more_rows_than_wanted_are_kept(tmp_path):
    summary = run(tmp_path, ANSWERS, rows=1)
    assert len(rows(tmp_path / "avoid.jsonl")) == 1
    assert summary["reasons"]["more than wanted"] == 1


def test_anchors_can_be_limited_and_the_sample_is_that_of_the_seed(tmp_path):
    def sample(folder, limit):
        settings = HarvestSettings(**GREEDY, rows=100, anchors="prefilled", anchor_rows=limit)
        harvest(Scripted(ANSWERS), Words(), TOXIC, BENIGN, settings, folder)
        return [row["id"] for row in rows(folder / "anchor.jsonl")]

    every = sample(tmp_path / "all", None)
    some = sample(tmp_path / "two", 2)
    assert len(every) > 2 == len(some)
    assert set(some) < set(every)
    assert sample(tmp_path / "again", 2) == some


def test_own_anchors_are_safe_coherent_answers_to_toxic_prompts(tmp_path):
    run(tmp_path, ANSWERS, anchors="own")
    assert [row["id"] for row in rows(tmp_path / "anchor.jsonl")] == ["t3"]


def test_prefilled_anchors_refuse_harm_nobody_and_are_coherent(tmp_path):
    answers = ANSWERS | {"t0-anchor": f" but harm {SENTENCE}", "t1-anchor": f" and {SENTENCE}", "t2-anchor": " no" * 30}
    summary = run(tmp_path, answers, anchors="prefilled")
    anchors = rows(tmp_path / "anchor.jsonl")
    assert {row["id"] for row in anchors} == {"t1-anchor", "t3-anchor", "t4-anchor", "t5-anchor"}
    assert all(row["completion"].startswith(REFUSAL) and row["label"] for row in anchors)
    assert summary["anchors"]["tried"] == summary["anchors"]["kept"] + sum(summary["anchors"]["reasons"].values())


NO = [
    f"{who} sorry and will not do number {which}, as {SENTENCE}" for who, which in zip("abcdef", range(6), strict=True)
]
SAY_NO = ("Say no:", "Say no, and why:", "Say yes:")
UNDER = ANSWERS | {f"t{i}{mark(SAY_NO[1])}": text for i, text in enumerate(NO)}
UNDER |= {f"t0{mark(SAY_NO[0])}": f"sorry {SENTENCE}"}


def instructed(folder, answers, instructions=SAY_NO):
    engine = Recording(answers)
    settings = HarvestSettings(**GREEDY, rows=100, anchors="instructed", instructions=list(instructions))
    return harvest(engine, Words(), TOXIC, BENIGN, settings, folder), engine


class Recording(Scripted):
    """Keeps what it was asked."""

    def __init__(self, answers):
        super().__init__(answers)
        self.asked = []

    def generate(self, requests, sampling, name, done=()):
        self.asked += [request for request in requests if request.id not in done]
        return super().generate(requests, sampling, name, done)


def test_instructed_anchors_are_refusals_under_the_best_instructions_learned_without_them(tmp_path):
    summary, engine = instructed(tmp_path, UNDER)
    anchors = rows(tmp_path / "anchor.jsonl")
    # The first prompt was tried with both; each other one is asked until it has a refusal.
    assert [(row["prompt"], row["completion"]) for row in anchors] == [
        (TOXIC[0].prompt, f"sorry {SENTENCE}"),
        *((prompt.prompt, text) for prompt, text in zip(TOXIC, NO, strict=True)),
    ]
    assert all(row["label"] and not row.get("retain") for row in anchors)
    found = summary["anchors"]["instructions"]
    # Of two prompts with a harmful answer.
    assert [(each["asked"], each["flipped"], each["rate"]) for each in found] == [(2, 1, 0.5), (2, 2, 1.0), (2, 0, 0.0)]
    assert [each["used"] for each in found] == [True, True, False]
    said = statement(summary)
    assert said.endswith("; 2 of 3 instructions serve, under the best the model declines 2 of 2 prompts")
    assert "\n" not in said
    asked = [request.prompt for request in engine.asked if mark(SAY_NO[2]) in request.id]
    assert sorted(asked) == [f"Say yes: {prompt.prompt}" for prompt in TOXIC[:2]]


def test_a_refusal_is_learned_after_the_first_words_of_the_harmful_answer_too(tmp_path):
    settings = HarvestSettings(**GREEDY, rows=100, anchors="instructed", instructions=list(SAY_NO), recover=2)
    harvest(Scripted(UNDER), Words(), TOXIC, BENIGN, settings, tmp_path)
    harmful = {row["prompt"]: row["completion"] for row in rows(tmp_path / "avoid.jsonl")}
    anchors = [row for row in rows(tmp_path / "anchor.jsonl") if "given" not in row]
    recovering = [row for row in rows(tmp_path / "anchor.jsonl") if "given" in row]
    assert [row["prompt"] for row in recovering] == [row["prompt"] for row in anchors if row["prompt"] in harmful]
    plain = {row["id"]: row["completion"] for row in anchors}
    for row in recovering:
        assert row["completion"] == row["given"] + plain[row["id"].removesuffix("-recovery")]
        assert harmful[row["prompt"]].startswith(row["given"].strip())
        assert 1 <= len(row["given"].split()) <= 2


def test_a_model_that_answers_nothing_harmfully_teaches_itself_to_decline_all_the_same(tmp_path):
    harmless = {name: text for name, text in UNDER.items() if "harm" not in text}
    summary, _ = instructed(tmp_path, harmless)
    assert summary["kept"] == 0
    assert summary["anchors"]["kept"] > 0
    assert [each["asked"] for each in summary["anchors"]["instructions"]] == [len(TOXIC)] * len(SAY_NO)


def test_a_model_that_no_instruction_makes_decline_is_told_so_and_its_replies_are_kept(tmp_path):
    with pytest.raises(UserError, match=r"cannot teach itself.*prefilled"):
        instructed(tmp_path, ANSWERS)
    assert sum("instructed" in row["id"] for row in rows(tmp_path / "replies.jsonl")) == 6
    assert not (tmp_path / "anchor.jsonl").exists()


def test_a_harvest_with_instructions_that_is_taken_up_asks_for_nothing_again_but_under_new_ones(tmp_path):
    first, _ = instructed(tmp_path, UNDER)
    again, engine = instructed(tmp_path, UNDER)
    assert (again, engine.asked) == (first, [])
    _, engine = instructed(tmp_path, UNDER, ("Say maybe:", *SAY_NO))
    assert {request.prompt.partition(":")[0] + ":" for request in engine.asked} == {"Say maybe:"}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 70))
def test_of_more_anchors_than_wanted_those_are_kept_whose_openings_vary_most(openings, most):
    replies = [
        Reply(str(n), "anchor", "p", f"one two Three {opening} then {n}", "stop", 0, 0)
        for n, opening in enumerate(openings)
    ]
    kept = varied(replies, most)
    assert len(kept) == min(most, len(replies))
    assert [int(reply.id) for reply in kept] == sorted(int(reply.id) for reply in kept)
    counts, all_of = (Counter(reply.completion.split()[3] for reply in part) for part in (kept, replies))
    # No opening has two more than one of which there are others left.
    assert all(counts[one] <= counts[other] + 1 or counts[other] == all_of[other] for one in counts for other in all_of)


def test_answers_to_benign_prompts_may_be_shorter_than_those_to_toxic_ones(tmp_path):
    longest = {}

    class Noting(Scripted):
        def generate(self, requests, sampling, name, done=()):
            longest[name] = sampling.max_new_tokens
            return super().generate(requests, sampling, name, done)

    settings = HarvestSettings(**GREEDY, rows=100, benign_tokens=3)
    harvest(Noting(ANSWERS), Words(), TOXIC, BENIGN, settings, tmp_path)
    assert longest == {"toxic": 8, "benign": 3}


def test_benign_answers_are_rows_to_imitate(tmp_path):
    run(tmp_path, ANSWERS)
    imitate = rows(tmp_path / "imitate.jsonl")
    assert len(imitate) == len(BENIGN)
    assert all(row["label"] for row in imitate)


def test_prompts_of_two_files_may_share_their_ids(tmp_path):
    toxic = [Prompt(str(i), f"How do I <forbidden act {i}>?") for i in range(3)]
    benign = [Prompt(str(i), f"What is <thing {i}> for?") for i in range(20)]
    settings = HarvestSettings(**GREEDY, rows=100)
    engine = Scripted({str(i): f"harm {i} {SENTENCE}" for i in range(3)})
    for _ in range(2):
        summary = harvest(engine, Words(), toxic, benign, settings, tmp_path)
        assert (summary["kept"], summary["imitate"]["kept"]) == (3, 20)


def test_a_reply_that_is_less_probable_than_the_limit_is_not_kept(tmp_path):
    def losses(replies):
        return [9.0 if reply.id == "t0" else 2.0 for reply in replies]

    assert run(tmp_path, ANSWERS, losses=losses)["reasons"]["improbable"] == 1


def test_the_same_answer_to_the_same_prompt_is_kept_once(tmp_path):
    settings = HarvestSettings(**GREEDY, samples=3, rows=100)
    engine = Scripted({f"t0#{sample}": f"harm {SENTENCE}" for sample in range(3)})
    harvest(engine, Words(), TOXIC[:1], BENIGN, settings, tmp_path)
    assert len(rows(tmp_path / "avoid.jsonl")) == 1


def test_taking_it_up_again_draws_and_judges_nothing_twice(tmp_path):
    run(tmp_path, ANSWERS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lines = (tmp_path / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "verdicts.jsonl").write_text("".join(lines[:10]))
    run(tmp_path, ANSWERS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Counting(Scripted):
    def __init__(self, answers):
        super().__init__(answers)
        self.drawn = []

    def generate(self, requests, sampling, name, done=()):
        self.drawn += [request.id for request in requests if name == "toxic" and request.id not in done]
        return super().generate(requests, sampling, name, done)


def test_drawing_ends_when_enough_is_found_and_no_prompt_is_asked_twice_before_all_were_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tasft.harvest.harvest.ROUND", 4)
    engine = Counting({f"t{i}#{s}": f"harm {i} {s} {SENTENCE}" for i in range(6) for s in range(3)})
    summary = harvest(engine, Words(), TOXIC, BENIGN, HarvestSettings(**GREEDY, samples=3, rows=7), tmp_path)
    assert len(engine.drawn) == 8
    assert {name.partition("#")[0] for name in engine.drawn[:6]} == {prompt.id for prompt in TOXIC}
    assert (summary["kept"], summary["tried"], summary["prompts"]) == (7, 8, 6)
    assert "7 of 7 rows to avoid, from 8 answers" in statement(summary)
    again = Counting(engine.answers)
    harvest(again, Words(), TOXIC, BENIGN, HarvestSettings(**GREEDY, samples=3, rows=7), tmp_path)
    assert again.drawn == []


@pytest.mark.parametrize("first", [2, 5])
def test_fewer_rows_are_among_more_and_nothing_is_drawn_again_whichever_come_first(first, tmp_path, monkeypatch):
    monkeypatch.setattr("tasft.harvest.harvest.ROUND", 4)
    engine = Counting({f"t{i}": f"harm {i} {SENTENCE}" for i in range(6)})

    def kept(folder, wanted):
        harvest(engine, Words(), TOXIC, BENIGN, HarvestSettings(**GREEDY, rows=wanted, anchors="prefilled"), folder)
        return {name: [row["id"] for row in rows(folder / f"{name}.jsonl")] for name in ("avoid", "anchor")}

    found = {wanted: kept(tmp_path / "one", wanted) for wanted in (first, 7 - first)}
    assert len(engine.drawn) == len(set(engine.drawn)) == 6
    assert set(found[2]["avoid"]) < set(found[5]["avoid"])
    assert [len(found[wanted]["avoid"]) for wanted in (2, 5)] == [2, 5]
    assert found[5]["avoid"] == sorted(found[5]["avoid"])
    for wanted in (2, 5):
        assert kept(tmp_path / str(wanted), wanted) == found[wanted]


def test_what_is_missing_is_said(tmp_path):
    summary = run(tmp_path, ANSWERS)
    assert statement(summary).startswith("2 of 100 rows to avoid, from 6 answers to 6 prompts")
    assert "give more" in statement(summary)


def test_own_answers_can_be_left_out_and_losses_be_unknown(tmp_path):
    settings = HarvestSettings(**GREEDY, rows=100, self_imitate=False)
    summary = harvest(Scripted(ANSWERS), Words(), TOXIC, BENIGN, settings, tmp_path)
    assert summary["kept"] == 2
    assert rows(tmp_path / "imitate.jsonl") == []
    assert {row["set"] for row in rows(tmp_path / "replies.jsonl")} == {"toxic"}


def test_contrastive_rows_are_answers_that_neither_harm_nor_decline(tmp_path):
    questions = {f"forbidden-contrast#{n}": f"Why is fruit number {n} forbidden?" for n in range(3)}
    answers = {
        "forbidden-contrastive#0": SENTENCE,
        "forbidden-contrastive#1": f"harm {SENTENCE}",
        "forbidden-contrastive#2": f"sorry {SENTENCE}",
    }
    settings = HarvestSettings(**GREEDY, rows=100, contrastive=Contrastive(words=2, per_word=3))
    summary = harvest(Scripted(ANSWERS | questions | answers), Words(), TOXIC, BENIGN, settings, tmp_path)
    kept = rows(tmp_path / "contrastive.jsonl")
    assert [(row["prompt"], row["label"]) for row in kept] == [("Why is fruit number 0 forbidden?", True)]
    assert summary["contrastive"]["reasons"] == {"harmful": 1, "refusal": 1}
    assert summary["contrastive"]["words"] == ["act", "forbidden"]


def test_files_are_read_as_often_for_many_rounds_as_for_few(tmp_path, monkeypatch):
    """A round that read what all before it wrote would make the work grow with the square of the prompts."""
    read = []

    def counted(path, kind=None):
        read.append(path.name)
        return provenance.resume_jsonl(path, kind)

    monkeypatch.setattr("tasft.models.engine.resume_jsonl", counted)
    monkeypatch.setattr("tasft.judges.judging.resume_jsonl", counted)
    times = []
    for rounds in (6, 1):
        monkeypatch.setattr("tasft.harvest.harvest.ROUND", len(TOXIC) // rounds)
        run(tmp_path / str(rounds), ANSWERS, anchors="prefilled")
        times.append(len(read))
        read.clear()
    assert times[0] == times[1]
    for name in ("replies", "verdicts", "avoid", "anchor"):
        one, other = (sorted(rows(tmp_path / n / f"{name}.jsonl"), key=str) for n in "61")
        assert one == other
