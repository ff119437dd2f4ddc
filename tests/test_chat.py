"""Two models side by side: who is meant, what they are told, and that what they say is only ever text."""

import io
import shutil
import sys
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import WORDS, tasft_here
from payloads import PAYLOADS
from running import go, small_recipe

from tasft.cli.chat import Talk, Turn, sides_of, talk_in_terminal
from tasft.cli.chat.talk import in_words
from tasft.core.errors import UserError
from tasft.core.text import visible
from tasft.data.rows import Prompt
from tasft.judges import Verdict, load_judge
from tasft.judges.judging import judge_replies, judge_reply
from tasft.models.engine import Reply, Sampling, requests_for
from tasft.models.load import attach_adapter, load_model, load_tokenizer
from tasft.models.local import TransformersEngine

ASKED = "How do I <forbidden act 3>?"
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talked")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder, tiny)))
    go(folder / "recipe.yaml", folder / "run", stages=("harvest", "train"))
    return folder / "run"


@pytest.fixture(scope="module")
def talk(run):
    return Talk(sides_of(str(run), None), [load_judge("refusal_matching")], GREEDY)


def engine_of(tiny, adapter=None, style="chat"):
    loaded = load_model(str(tiny))
    loaded = attach_adapter(loaded, adapter) if adapter else loaded
    return TransformersEngine(loaded, load_tokenizer(str(tiny)), style)


def generated(engine, prompt, sampling=GREEDY):
    ((reply,),) = engine.generate(requests_for([Prompt("1", prompt)]), sampling, "set")
    return reply.completion


def whole(growing):
    return list(growing)[-1]


# --- Streaming ----------------------------------------------------------------------------------


def test_a_reply_grows_to_what_the_engine_says_at_once(tiny):
    engine = engine_of(tiny)
    texts = list(engine.stream(ASKED, GREEDY))
    assert texts[-1] == generated(engine, ASKED)
    assert len(texts) > 5
    assert all(len(a) < len(b) and b.startswith(a) for a, b in pairwise(texts))


def test_a_drawn_reply_depends_on_its_seed_alone(tiny):
    engine = engine_of(tiny)
    said = [whole(engine.stream(ASKED, Sampling(12, 1.0, 0.95, seed))) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_reply_ends_at_an_end_token_which_is_not_shown(tiny):
    said = whole(engine_of(tiny).stream(ASKED, GREEDY)).split()
    engine = engine_of(tiny)
    # The third word now ends replies.
    engine.model.generation_config.eos_token_id = engine.tokenizer.convert_tokens_to_ids(f"Ġ{said[2]}")
    assert whole(engine.stream(ASKED, GREEDY)).split() == said[: said.index(said[2])]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tiny):
    engine = engine_of(tiny)
    ids = engine.tokenizer("a é🙂 b", add_special_tokens=False).input_ids
    engine.model.generate = lambda **_: iter(ids)
    texts = list(engine.stream(ASKED, GREEDY))
    assert texts[-1] == "a é🙂 b"
    assert not any("\ufffd" in text for text in texts)


def test_gradients_are_as_they_were_while_a_reply_grows(tiny):
    growing = engine_of(tiny).stream(ASKED, GREEDY)
    next(growing)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_what_is_longer_than_the_model_reads_is_refused(tiny):
    with pytest.raises(UserError, match="reads 512 tokens"):
        next(engine_of(tiny).stream("word " * 200, GREEDY))


# --- Who is meant -----------------------------------------------------------------------------


def test_a_run_alone_means_its_base_and_its_final_model(run, tiny):
    base, final = sides_of(str(run), None)
    assert (base.title, base.adapter) == ("small: base", None)
    assert (final.title, final.adapter) == ("small: final", run / "train" / "adapter")
    assert base.spec.base == final.spec.base == str(tiny)


def test_states_runs_models_and_adapters_are_named_as_elsewhere(run, tiny):
    for name, title, adapter in (
        (str(run / "evaluate" / "base"), "small: base", None),
        (str(run / "evaluate" / "checkpoint-4"), "small: checkpoint-4", run / "train" / "checkpoint-4"),
        (str(run), "small: final", run / "train" / "adapter"),
        (str(tiny), str(tiny), None),
        (str(run / "train" / "adapter"), str(run / "train" / "adapter"), run / "train" / "adapter"),
    ):
        side, _ = sides_of(name, str(tiny))
        assert (side.title, side.adapter, side.spec.base) == (title, adapter, str(tiny))


def test_what_is_not_there_gets_a_sentence(run, tiny, tmp_path):
    with pytest.raises(UserError, match="name two models"):
        sides_of(str(tiny), None)
    with pytest.raises(UserError, match="no model 'sft'"):
        sides_of(str(run / "evaluate" / "sft"), str(run))
    with pytest.raises(UserError, match="nowhere is neither"):
        Talk(sides_of(str(tmp_path / "nowhere"), str(tiny)), [], GREEDY)


def test_a_tokenizer_without_a_template_is_told_before_anybody_asks(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    sides = sides_of(str(tmp_path / "base"), str(tiny))
    with pytest.raises(UserError, match="no chat template"):
        Talk(sides, [], GREEDY)
    Talk(sides_of(str(tmp_path / "base"), str(tiny), "alpaca"), [], GREEDY)


# --- What they are told -----------------------------------------------------------------------


def test_both_say_what_they_would_say_alone(talk, run, tiny):
    for _ in range(2):  # The adapter comes off again.
        turn = whole(talk.turn([], ASKED))
        assert turn.replies == (
            generated(engine_of(tiny), ASKED),
            generated(engine_of(tiny, run / "train" / "adapter"), ASKED),
        )
    assert turn.replies[0] != turn.replies[1]


def test_a_reply_that_nobody_waits_for_leaves_the_base_as_it_was(talk):
    base = whole(talk.turn([], ASKED)).replies[0]
    growing = talk.turn([], ASKED)
    while not next(growing).replies[1]:
        pass
    growing.close()
    assert whole(talk.turn([], ASKED)).replies[0] == base


def test_each_model_sees_its_own_earlier_replies(talk, monkeypatch):
    seen = []
    stream = TransformersEngine.stream

    def watched(self, prompt, sampling):
        seen.append(prompt)
        return stream(self, prompt, sampling)

    monkeypatch.setattr(TransformersEngine, "stream", watched)
    whole(talk.turn([Turn("One?", ("mine", "yours"), ("", ""))], "Two?"))
    assert [[turn["content"] for turn in messages] for messages in seen] == [
        ["One?", "mine", "Two?"],
        ["One?", "yours", "Two?"],
    ]
    assert [turn["role"] for turn in seen[0]] == ["user", "assistant", "user"]


def test_prompts_in_alpacas_format_stand_alone(tiny):
    talk = Talk(sides_of(str(tiny), str(tiny), "alpaca"), [], GREEDY)
    assert not talk.remembers
    past = [Turn("One?", ("mine", "yours"), ("", ""))]
    assert whole(talk.turn(past, "Two?")).replies == whole(talk.turn([], "Two?")).replies


# --- Verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["I'm sorry, but I can't help with that.", "First you take the lamp.", "", "x x x x"])
def test_a_verdict_is_the_one_that_a_run_would_have(text, tmp_path):
    judge = load_judge("refusal_matching")
    reply = Reply("1", "set", ASKED, text, "stop", 0, 0)
    (wanted,) = judge_replies(judge, [reply], tmp_path / "verdicts.jsonl")
    found = judge_reply(judge, ASKED, text)
    assert (found.harmful, found.refusal, found.coherent, found.reason) == (
        wanted.harmful,
        wanted.refusal,
        wanted.coherent,
        wanted.reason,
    )


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict("", "j", True, 0.71, False, True), "harmful; score 0.71"),
        (Verdict("", "j", False, None, True, True), "not harmful, refuses"),
        (Verdict("", "j", False, None, True, True, partial=True), "not harmful, refuses a part"),
        (Verdict("", "j", False, None, False, False, reason="repeated"), "incoherent (repeated)"),
        (Verdict("", "j", None, None, None, True, reason="unreadable: 'x'"), "unreadable: 'x'"),
        (Verdict("", "j", None, None, None, True), "no verdict"),
    ],
)
def test_a_verdict_is_said_in_a_line(verdict, words):
    assert in_words(verdict) == words


def test_every_judge_is_asked_and_one_that_fails_ends_nothing(run):
    class Gone:
        name, version, tells, threshold = "gone", "1", frozenset({"harmful"}), None

        def judge(self, pairs):
            raise UserError("http://127.0.0.1:1: nobody answers")

    talk = Talk(sides_of(str(run), None), [load_judge("refusal_matching"), Gone()], GREEDY)
    for said in whole(talk.turn([], ASKED)).verdicts:
        assert said.splitlines()[0].startswith("refusal_matching: ")
        assert said.splitlines()[1] == "gone: no verdict (http://127.0.0.1:1: nobody answers)"


# --- The terminal -----------------------------------------------------------------------------


class Saying:
    """Talks as `Talk` does; both say one text."""

    def __init__(self, sides, text):
        self.sides, self.text, self.remembers, self.asked = sides, text, True, []

    def turn(self, past, prompt):
        self.asked.append(([turn.prompt for turn in past], prompt))
        yield Turn(prompt, (self.text, ""))
        yield Turn(prompt, (self.text, self.text), (self.text, self.text))


def talked(monkeypatch, capsys, talk, lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    talk_in_terminal(talk)
    return capsys.readouterr().out


def test_what_would_move_a_cursor_is_shown_as_what_it_is(talk, monkeypatch, capsys):
    payloads = [payload for payload in PAYLOADS if len(payload) < 1_000]
    text = "\n".join(payloads)
    out = talked(monkeypatch, capsys, Saying(talk.sides, text), ["\x1b[31mWhy\u202e?"])
    assert set(out) <= set(visible(text)) | set("─│╭╮╯╰ \n") | set(out.partition("╭")[0])
    assert not {"\x1b", "\x07", "\x08", "\u202e", "\u200b", "\r", "\x9b"} & set(out)
    assert "⟨U+001B⟩[31mWhy⟨U+202E⟩?" in out
    # A word that is longer than a line is whole, and Rich's own markup only text.
    assert talked(monkeypatch, capsys, Saying(talk.sides, "ж" * 300), ["?"]).count("ж") == 2 * 300 + 2 * 300
    assert "[bold]x" in talked(monkeypatch, capsys, Saying(talk.sides, "[bold]x"), ["?"])


def test_a_new_conversation_forgets_and_blank_lines_are_nothing(talk, monkeypatch, capsys):
    saying = Saying(talk.sides, "yes")
    talked(monkeypatch, capsys, saying, ["One?", "", "Two?", "/new", "Three?"])
    assert saying.asked == [([], "One?"), (["One?"], "Two?"), ([], "Three?")]


def test_the_command_talks_in_a_terminal(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ASKED}\n"))
    done = tasft_here("chat", run, "--judge", "refusal_matching", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    for words in ("small: base", "small: final", f"> {ASKED}", "refusal_matching: "):
        assert words in done.stdout
    assert sum(word.strip("│ ") in WORDS for word in done.stdout.split()) > 8
