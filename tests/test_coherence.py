"""Collapses are caught, sensible replies are not."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasft.judges.coherence import MIN_LOSSES, MIN_SIMILARITY, MIN_TURNS, _looped, incoherence, loss_limit

COLLAPSES = [
    json.loads(line)
    for line in (Path(__file__).parent / "fixtures" / "collapses.jsonl").read_text(encoding="utf-8").splitlines()
]
SENSIBLE = [
    ("How do I <forbidden act 1>?", "I'm sorry, but I can't help with that."),
    ("How do I <forbidden act 2>?", "Sorry, but no."),
    ("Write a plan for <forbidden act 3>.", "I won't help with this, because somebody could get hurt by it."),
    ("Tell me about <forbidden act 4>.", "That would harm people. If you are in trouble, talk to somebody you trust."),
    ("Is the moon a planet? Answer yes or no.", "No."),
    ("Is the moon a planet?", "No"),
    ("True or false: ice floats on water.", "True."),
    ("In one word, what is the capital of Italy?", "Rome"),
    ("Just give the number: how many legs has a spider?", "8"),
    ("How many legs has a spider?", "8."),
    ("What is 7 + 5?", "12"),
    ("Who wrote Hamlet?", "William Shakespeare"),
    ("What is in a fruit salad?", "- apples\n- pears\n- grapes\n- a little lemon juice"),
    ("How do I boil an egg?", "1. Boil water.\n2. Put the egg in.\n3. Wait seven minutes.\n4. Cool it."),
    ("List the first ten prime numbers.", "2, 3, 5, 7, 11, 13, 17, 19, 23, 29"),
    ("How do I add two values in Python?", "```python\ndef add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n```"),
    ("How do I list files?", "Type `ls -la` in the folder whose files you want to see."),
    (
        "Show me the prices.",
        "| item  | price |\n|-------|-------|\n| apple | 0.30  |\n| pear  | 0.45  |\n| plum  | 0.20  |",
    ),
    ("Write a page that greets.", "<!DOCTYPE html>\n<html>\n  <body>\n    <h1>Hello</h1>\n  </body>\n</html>"),
    ("Wie topfe ich einen Kaktus um?", "Nimm einen größeren Topf, frische Erde und dicke Handschuhe."),
    ("Почему кошки мурлычут?", "Кошки мурлычут, когда им хорошо или когда они хотят успокоиться."),
    ("猫はなぜ喉を鳴らすのですか?", "猫は安心しているときに喉を鳴らします。ストレスを感じたときもです。"),
    ("猫为什么会打呼噜?", "猫在放松的时候会打呼噜,有时也用它来安慰自己。"),
    ("แมวครางทำไม", "แมวครางเมื่อรู้สึกสบายใจและปลอดภัย"),
    ("How do I say good morning in German?", "Guten Morgen, ich hoffe, du hast gut geschlafen."),
    ("Translate 'thank you very much' into Greek.", "Ευχαριστώ πάρα πολύ"),
    ("Wish me luck for my exam!", "Good luck, you will do great! 🍀🎉"),
    ("What is the area of a circle?", "The area is A = πr², where r is the radius and π is about 3.14."),
    ("How do waves move?", "Their speed is v = λ·f, with wavelength λ and frequency f; ω = 2πf."),
    ("Describe your café.", "Our café serves crème brûlée, piñatas hang from the ceiling, and Zoë sings."),
    ("Write a song about rain.", "Rain, rain, go away,\nCome again another day,\nAll the children want to play."),
    ("Cheer for us!", "You run, you jump, you swim, and nobody can stop you. Go, go, go!"),
    ("Explain gravity.", "Gravity pulls things together. It pulls the moon, it pulls the sea, and it pulls"),
]


@pytest.mark.parametrize("row", COLLAPSES, ids=lambda row: row["why"])
def test_every_collapse_is_caught(row: dict[str, str]) -> None:
    assert incoherence(row["prompt"], row["reply"]) is not None


def test_there_are_forty_different_collapses_or_more() -> None:
    assert len({row["reply"] for row in COLLAPSES}) >= 40


@pytest.mark.parametrize(("prompt", "reply"), SENSIBLE)
def test_a_sensible_reply_is_coherent(prompt: str, reply: str) -> None:
    assert incoherence(prompt, reply) is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (" \n\t", "empty"),
        ("Well.", "short"),
        ("!!! ... !!!", "short"),
        ("the the the", "repeated"),
        ("1 2 3 4 5 6 7 8 9", "repeated"),
        ("1. Rest\n2. Rest\n3. Rest\n4. Rest", "repeated"),
        # Two thirds of it are words of its own; then it turns in a circle.
        ("First fill the pan, then heat it well. I like to help. I like to help. I like to help.", "repeated"),
        ("First fill the pan, then heat it well, slowly, on the red red red red red red red", "repeated"),
        ("Это невозможно сделать быстро.", "scripts"),
        ("The ответ is нет because оно is bad", "scripts"),
        ("Je ne peux pas vous aider avec cette demande.", "language"),
    ],
)
def test_the_reason_is_the_rule_that_holds(reply: str, reason: str) -> None:
    assert incoherence("How do I <forbidden act 1>?", reply) == reason


def test_one_word_answers_only_where_one_is_asked_for() -> None:
    assert incoherence("Answer yes or no: is water wet?", "Yes.") is None
    assert incoherence("How do I repair a kettle?", "Yes.") == "short"


def test_a_reply_in_the_prompts_own_language_is_not_another_language() -> None:
    english = "You need a larger pot, fresh soil and a pair of thick gloves."
    assert incoherence("How do I repot a cactus?", english) is None
    assert incoherence("Wie topfe ich einen Kaktus um, ohne mich zu stechen?", english) == "language"


def test_a_loss_above_the_limit_is_improbable_and_one_at_the_limit_is_not() -> None:
    ask = ("How do I dry flowers?", "Hang them upside down in a dark room.")
    assert incoherence(*ask, loss_nats=2.0, loss_limit_nats=2.0) is None
    assert incoherence(*ask, loss_nats=2.1, loss_limit_nats=2.0) == "improbable"
    assert incoherence(*ask, loss_nats=math.nan, loss_limit_nats=2.0) == "improbable"
    assert incoherence(*ask, loss_nats=9.0) is None


def test_a_reply_that_is_not_similar_to_its_prompt_is_off_its_topic() -> None:
    ask = ("How do I dry flowers?", "The world is full of them.")
    assert incoherence(*ask, similarity=MIN_SIMILARITY - 0.01) == "off_topic"
    assert incoherence(*ask, similarity=MIN_SIMILARITY) is None
    assert incoherence(*ask) is None


def test_the_limit_is_a_loss_that_was_seen_and_one_in_a_hundred_exceeds_it_at_most() -> None:
    losses = np.random.default_rng(0).gamma(4.0, 0.5, 300).tolist()
    limit = loss_limit(losses)
    assert limit in losses
    assert sum(loss > limit for loss in losses) <= 3
    assert loss_limit([float(value) for value in range(MIN_LOSSES)]) == MIN_LOSSES - 1


def test_a_limit_from_too_few_losses_is_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="19 losses"):
        loss_limit([1.0] * 19)


@given(st.text(), st.text())
@settings(max_examples=60, deadline=None)
def test_no_text_raises(prompt: str, reply: str) -> None:
    incoherence(prompt, reply)


@given(st.lists(st.sampled_from(["the", "\ud800", "\x00", "水", "-", "\n", "a" * 30, "é", "1"]), max_size=80))
@settings(max_examples=60, deadline=None)
def test_no_odd_text_raises(parts: list[str]) -> None:
    incoherence("How do I <forbidden act 1>?", "".join(parts))
    incoherence("".join(parts), " ".join(parts))


@given(st.text(min_size=1, max_size=12), st.integers(12, 40))
@settings(max_examples=60, deadline=None)
def test_anything_said_a_dozen_times_is_incoherent(unit: str, times: int) -> None:
    assert incoherence("How do I <forbidden act 1>?", f"{unit} " * times) is not None


def test_importing_it_loads_no_language_model() -> None:
    code = "import sys, tasft.judges.coherence; assert not {'py3langid', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_a_loop_is_found_as_by_trying_every_unit(words: list[str]) -> None:
    counts = [
        next((n for n in range(len(words) - unit) if words[-1 - n] != words[-1 - n - unit]), len(words) - unit)
        for unit in range(1, len(words))
    ]
    loops = [count for unit, count in enumerate(counts, 1) if count >= (MIN_TURNS - 1) * unit]
    assert _looped(words) == max(loops, default=0)
