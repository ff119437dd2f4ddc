import asyncio
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.request import urlopen

import pytest
from conftest import tiny_tokenizer
from loopback import Handler, Loopback, completion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatBody
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextBody
from pydantic import TypeAdapter, ValidationError
from transformers import GenerationConfig

from tasft.core.errors import UserError
from tasft.data.rows import Prompt
from tasft.models import requests
from tasft.models.engine import Sampling, collect, requests_for, thoughts
from tasft.models.load import load_model
from tasft.models.local import TransformersEngine
from tasft.models.server import ServerEngine
from tasft.models.server_settings import Server

PROMPTS = [Prompt(f"p{index}", f"How do I <forbidden act {index}>?") for index in range(24)]
DRAWN = Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=5)
CANARY = "sk-canary-3141592653589793"


class Speaker(Loopback):
    """Speaks the documented schema; for each prompt, `plan` says what goes wrong at its first requests."""

    def __init__(self, plan=None, delay=lambda: 0.0):
        super().__init__(Planned)
        self.plan = {prompt: list(faults) for prompt, faults in (plan or {}).items()}
        self.delay, self.seen, self.at_a_time, self.most = delay, [], 0, 0
        self.lock = threading.Lock()

    @property
    def asked(self):
        return Counter(prompt_of(body) for _, _, body, _ in self.seen)


def prompt_of(body):
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


class Planned(Handler):
    def do_POST(self):
        body = json.loads(self.asked())
        server = self.server
        with server.lock:
            server.seen.append((self.path, self.headers, body, time.monotonic()))
            server.at_a_time += 1
            server.most = max(server.most, server.at_a_time)
            faults = server.plan.get(prompt_of(body)) or server.plan.get("every") or [None]
            fault = faults.pop(0)
        time.sleep(server.delay())
        with server.lock:
            server.at_a_time -= 1
        self.answer(body, fault)

    def answer(self, body, fault):
        found = completion(body, f"answer to {prompt_of(body)} by {body['seed']}")
        (choice,) = found["choices"]
        match fault:
            case None:
                self.send(found)
            case "drop":
                self.close_connection = True
            case "slow":
                time.sleep(5.0)
                self.send(found)
            case "drop by drop":
                self.send(found, pause=0.02)
            case "half a body":
                self.send(found, share=0.5)
            case "half a JSON":
                self.send(json.dumps(found).encode()[:60])
            case "a page":
                self.send(b"<html>welcome</html>", headers={"Content-Type": "text/html"})
            case "no choice":
                self.send(found | {"choices": []})
            case "no message":
                self.send(found | {"choices": [{"index": 0, "finish_reason": "stop"}]})
            case "no content":
                choice["message"]["content"] = None
                self.send(found)
            case "cut while thinking":
                choice["message"]["content"] = None
                self.send(found | {"choices": [choice | {"finish_reason": "length"}]})
            case "at its limit":
                self.send(found | {"choices": [choice | {"finish_reason": "length"}]})
            case (status, after):
                self.send({"error": {"message": "slowly, please"}}, int(status), {"Retry-After": after})
            case status:
                said = f"refused for {self.headers['Authorization']}\x1b[2J, it said"
                self.send({"error": {"message": said, "type": "x", "code": None}}, int(status))


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(requests, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def engine_for(*servers, style="chat", **settings):
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return ServerEngine(Server(urls=urls, model="m", **{"timeout_s": 5.0, **settings}), style)


def replies(engine, sampling=DRAWN, done=(), prompts=PROMPTS, **settings):
    requests = requests_for(prompts, **settings)
    return [reply for batch in engine.generate(requests, sampling, "s", done) for reply in batch]


def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


PASSING = [
    "drop",
    "slow",
    "half a body",
    "half a JSON",
    "a page",
    "no choice",
    "no message",
    "408",
    "409",
    "429",
    "500",
    "503",
    ("429", "0.05"),
    ("503", "soon"),
]


def test_whatever_fails_in_passing_each_reply_comes_once_and_to_its_own_prompt():
    rng = random.Random(0)
    plan = {
        prompt.prompt: [PASSING[(index + 5 * k) % len(PASSING)] for k in range(2)]
        for index, prompt in enumerate(PROMPTS)
    }
    assert {fault for faults in plan.values() for fault in faults} == set(PASSING)
    with Speaker(plan, delay=lambda: rng.uniform(0, 0.03)) as server:
        found = replies(engine_for(server, concurrency=8, timeout_s=3.0))
        assert list(server.asked.values()) == [3] * len(PROMPTS)
    assert sorted(reply.id for reply in found) == sorted(prompt.id for prompt in PROMPTS)
    assert [reply.id for reply in found] != [prompt.id for prompt in PROMPTS]  # As they came.
    for reply in found:
        assert reply.completion == f"answer to {reply.prompt} by {reply.seed}"
        assert (reply.set, reply.finish) == ("s", "stop")


def test_what_was_done_is_not_asked_and_does_not_change_the_rest():
    with Speaker() as server:
        whole = {reply.id: reply for reply in replies(engine_for(server))}
        server.seen.clear()
        done = ["p0", "p7", "p10"]
        rest = {reply.id: reply for reply in replies(engine_for(server, concurrency=3), done=done)}
        assert len(server.seen) == len(PROMPTS) - 3
        other = replies(engine_for(server), Sampling(8, 1.0, 0.9, seed=6))
    assert rest == {name: reply for name, reply in whole.items() if name not in done}
    assert len({reply.seed for reply in whole.values()} | {reply.seed for reply in other}) == 2 * len(PROMPTS)


@pytest.mark.parametrize("status", ["401", "402", "403", "404", "405"])
def test_a_refusal_of_all_is_told_at_once_in_the_servers_own_words(status):
    with Speaker({PROMPTS[3].prompt: [status] * 9}) as server:
        with pytest.raises(UserError) as caught:
            replies(engine_for(server, concurrency=1))
        assert server.asked[PROMPTS[3].prompt] == 1
    said = str(caught.value)
    assert said.startswith(f"{server.url}: status {status} (refused for Bearer *** [2J, it said)")
    assert said.endswith("(request p3)")
    hints = {"401": "OPENAI_API_KEY", "403": "OPENAI_API_KEY", "404": "a model 'm'"}
    assert hints.get(status, "") in said


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("500", "status 500"),
        ("drop", "no connection (Server disconnected"),
        ("slow", "no reply within 1 s"),
        ("drop by drop", "no reply within 1 s"),
        ("half a JSON", "a reply that cannot be read (not JSON)"),
        ("a page", "a reply that cannot be read (no choice in it)"),
    ],
)
def test_what_fails_for_good_ends_in_one_sentence(fault, sentence):
    limit = 1.0 if "within" in sentence else 60.0
    with Speaker({PROMPTS[0].prompt: [fault] * 20}) as server:
        with pytest.raises(UserError) as caught:
            replies(engine_for(server, retries=2, timeout_s=limit), prompts=PROMPTS[:1])
        assert server.asked[PROMPTS[0].prompt] == 3
    assert len(caught.value.faults) == 1
    assert str(caught.value).startswith(f"{server.url}: {sentence}")
    assert str(caught.value).endswith("(tries: 3)")


# One item -----------------------------------------------------------------------------------------------------------

FILTERED = {"error": {"message": "filtered by the content management policy", "code": "content_filter"}}


class Odd(Speaker):
    """Answers as `odd` says to prompts in which its word is."""

    def __init__(self, odd, word="act 3>", **settings):
        super().__init__(**settings)
        self.odd, self.word = odd, word
        self.RequestHandlerClass = OddHandler


class OddHandler(Planned):
    def answer(self, body, fault):
        if self.server.word not in prompt_of(body):
            super().answer(body, fault)
            return
        odd = self.server.odd(body) if callable(self.server.odd) else self.server.odd
        if isinstance(odd, str):
            super().answer(body, odd)
        else:
            status, found = odd
            self.send(found, status)


def chat(content, **choice):
    def answer(body):
        message = choice.pop("message", {}) if "message" in choice else {}
        found = completion(body, content, **choice)
        if "messages" in body:
            found["choices"][0]["message"] |= message
        return 200, found

    return answer


ONE = {
    "a content filter": ((400, FILTERED), 1, "status 400 (filtered by the content"),
    "another status": ((413, {"error": {"message": "too large"}}), 1, "status 413 (too large"),
    "OpenRouter's moderation": ((403, {"error": {"message": "Input was flagged"}}), 1, "status 403 (Input was flagged"),
    "a filter in a success": ((200, {"choices": None, **FILTERED}), 1, "in place of a reply (filtered by the"),
    "a refusal": (chat(None, message={"refusal": "I cannot."}), 1, "no reply (refusal: I cannot.)"),
    "a refusal beside nothing": (chat("", message={"refusal": "I cannot."}), 1, "no reply (refusal: I cannot.)"),
    "a thought": (chat(None, message={"reasoning_content": "hmm"}), 1, "no reply (a thought and no answer)"),
    "another's thought": (chat(None, message={"reasoning": "hmm"}), 1, "no reply (a thought and no answer)"),
    "a call of a tool": (chat(None, message={"tool_calls": [{"id": "a"}]}), 1, "no reply (a call of a tool and no"),
    "nothing": (chat(None), 1, "no reply (content null, finish_reason stop)"),
    "withheld": (chat(None, finish_reason="content_filter"), 1, "no reply (content null, finish_reason content_filter"),
    "withheld, with no text": (
        chat("", finish_reason="content_filter"),
        1,
        "content empty, finish_reason content_filter",
    ),
    "nothing, for no reason": (chat("", finish_reason=None), 1, "content empty, finish_reason None"),
    "a thought beside nothing": (
        chat("", message={"reasoning_content": "hmm"}),
        1,
        "no reply (a thought and no answer)",
    ),
    "a call beside nothing": (chat("", message={"tool_calls": [{"id": "a"}]}), 1, "no reply (a call of a tool and no"),
    "a fault at this one": ("500", 3, "status 500"),
    "half a JSON": ("half a JSON", 3, "a reply that cannot be read (not JSON)"),
    "no choice": ("no choice", 3, "a reply that cannot be read (no choice in it)"),
    "a fault in a success": ((200, {"error": {"message": "boom", "code": 500}}), 3, "in place of a reply (boom)"),
}


@pytest.mark.parametrize("name", ONE)
def test_a_request_that_is_refused_for_itself_has_an_empty_reply_with_the_words_and_all_others_are_kept(name):
    odd, times, words = ONE[name]
    with Odd(odd) as server:
        found = {reply.id: reply for reply in replies(engine_for(server, retries=2))}
        assert server.asked[PROMPTS[3].prompt] == times
    assert (found["p3"].completion, found["p3"].finish) == ("", "withheld")
    assert words in found["p3"].note
    others = [reply for reply in found.values() if reply.id != "p3"]
    assert len(others) == len(PROMPTS) - 1
    assert all(reply.completion.startswith("answer to") and not reply.note for reply in others)


def test_a_prompt_that_breaks_a_server_costs_no_address_its_place():
    def breaks(body):
        return "drop"

    # Enough others that some are sent, and answered, while it is tried again.
    prompts = [*PROMPTS, *(Prompt(f"more{number}", f"What is <matter {number}>?") for number in range(40))]
    with Odd(breaks, delay=lambda: 0.02) as one, Odd(breaks, delay=lambda: 0.02) as two:
        found = {reply.id: reply for reply in replies(engine_for(one, two, concurrency=2, retries=5), prompts=prompts)}
    assert found["p3"].note.endswith("(tries: 6)")
    assert sum(not reply.note for reply in found.values()) == len(prompts) - 1


def test_no_request_is_blamed_for_a_rate_limit():
    with Odd("429") as server, pytest.raises(UserError, match=r"status 429 .*\(tries: 2\)"):
        replies(engine_for(server, retries=1))


def test_a_provider_that_refuses_too_many_ends_the_call_and_they_are_asked_again(monkeypatch):
    with Odd((400, FILTERED), word="forbidden") as server:
        engine = engine_for(server, concurrency=2)
        got = []
        with pytest.raises(UserError, match=r"8 of 8 requests were refused .* more than max_refused 0\.5 allows"):
            got += replies(engine)
        assert got == []
        assert len(server.seen) < 12
    # A few are below the limit, and come last.
    monkeypatch.setattr(requests, "ENOUGH_REFUSED", 3)
    with Odd((400, FILTERED), word="2") as server:
        found = replies(engine_for(server))
        refused = [bool(reply.note) for reply in found]
        assert sum(refused) == 6
        assert refused == sorted(refused)
        with pytest.raises(UserError, match=r"max_refused 0\.2"):
            replies(engine_for(server, max_refused=0.2))


@pytest.mark.parametrize("count", [1, 5])
def test_where_nothing_is_ever_answered_a_refusal_is_taken_for_one_of_all(count):
    sentence = r"status 400 \(no such field: top_k\) \(request p\d\)"
    wrong = (400, {"error": {"message": "no such field: top_k"}})
    with Odd(wrong, word="forbidden") as server, pytest.raises(UserError, match=sentence):
        replies(engine_for(server), prompts=PROMPTS[:count])
    with Odd((400, FILTERED), word="forbidden") as server:
        assert all(reply.note for reply in replies(engine_for(server), prompts=PROMPTS[:count]))


@pytest.mark.parametrize(
    ("found", "times", "words"),
    [
        ({"choices": None, "error": {"message": "insufficient credits", "code": 402}}, 1, "insufficient credits"),
        ({"error": "You exceeded your current quota"}, 1, "exceeded your current quota"),
        ({"object": "error", "message": "Incorrect API key", "code": 40101}, 1, "Incorrect API key"),
        ({"choices": [{"index": 0, "error": {"message": "no model m", "code": 404}}]}, 1, "no model m"),
        ({"code": 1113, "msg": "Insufficient balance, please recharge"}, 1, "Insufficient balance"),
        ({"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, 1, "insufficient balance"),
        ({"error_code": 401, "error_msg": "Invalid signature"}, 1, "Invalid signature"),
        ({"errors": [{"message": "Unauthorized"}]}, 1, "Unauthorized"),
        ({"detail": "The server is overloaded"}, 3, "The server is overloaded"),
        ({"error": {"message": "Rate limit reached", "code": "rate_limit"}}, 3, "Rate limit reached"),
        ({"error": {"message": "Overloaded", "type": "overloaded_error"}}, 3, "Overloaded"),
        ({"error": {"message": "something went wrong"}}, 3, "something went wrong"),
    ],
)
def test_an_error_in_a_success_is_told_and_asked_again_only_where_that_can_help(found, times, words):
    with Odd((200, found), word="forbidden") as server:
        with pytest.raises(UserError, match=words):
            replies(engine_for(server, retries=2, concurrency=1), prompts=PROMPTS[:1])
        assert len(server.seen) == times


@pytest.mark.parametrize("style", ["chat", "alpaca"])
@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        *((word, "stop") for word in ("stop", "STOP", "eos", "eos_token", "end_turn", "COMPLETE", "stop_sequence")),
        *((word, "stop") for word in ("FinishReason.STOP", "FINISH_REASON_STOP", "endTurn", "end-turn", "end_id")),
        ({"type": "stop", "matched": 2}, "stop"),
        *((word, "length") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length", "maxTokens", "limit")),
        ({"type": "length", "length": 48}, "length"),
        *((word, word) for word in ("content_filter", "recitation", "error", "insufficient_system_resource", "abort")),
        (None, "unknown"),
    ],
)
def test_what_is_not_known_to_be_an_end_is_not_one(reason, finish, style):
    with Odd(chat("a text", finish_reason=reason), word="forbidden") as server:
        (reply,) = replies(engine_for(server, style=style), prompts=PROMPTS[:1])
    assert (reply.completion, reply.finish, reply.note) == ("a text", finish, "")


def test_a_text_at_which_a_request_asks_to_stop_is_no_end():
    stop = {"body": {"stop": ["\n\n"]}}
    for choice, finish in (({"stop_reason": "\n\n"}, "stop_sequence"), ({"stop_reason": 7}, "stop"), ({}, "stop")):
        with Odd(chat("a text", **choice), word="forbidden") as server:
            assert replies(engine_for(server, **stop), prompts=PROMPTS[:1])[0].finish == finish


def test_a_reply_in_parts_is_their_text():
    parts = [
        {"type": "thinking", "thinking": "hmm"},
        {"type": "text", "text": "First "},
        {"type": "text", "text": "so."},
    ]
    with Odd(chat(parts), word="forbidden") as server:
        (reply,) = replies(engine_for(server), prompts=PROMPTS[:1])
    assert (reply.completion, reply.thought) == ("First so.", "hmm")


@pytest.mark.parametrize(("text", "finish"), [("First so.", "stop"), ("", "length"), (None, "length")])
def test_a_thought_that_comes_apart_is_kept_and_counted(text, finish):
    told = chat(text, finish_reason=finish, message={"reasoning_content": "hmm"})
    with Odd(told, word="forbidden") as server:
        (reply,) = replies(engine_for(server), prompts=PROMPTS[:1])
    assert (reply.completion, reply.finish, reply.thought) == (text or "", finish, "hmm")
    assert thoughts([reply]) == {"n": 1, "unfinished": int(not text)}


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_for_time_gets_it(form):
    date = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3)
    after = "0.4" if form == "seconds" else format_datetime(date, usegmt=True)
    with Speaker({PROMPTS[0].prompt: [("429", after)]}) as server:
        replies(engine_for(server), prompts=PROMPTS[:1])
        ended = datetime.now(UTC)
        first, second = (moment for *_, moment in server.seen)
    assert second - first > 0.4 if form == "seconds" else ended >= date


def test_a_server_that_asks_for_a_day_is_asked_again_before(monkeypatch):
    monkeypatch.setattr(requests, "LONGEST_PAUSE_ASKED_S", 0.2)
    with Speaker({PROMPTS[0].prompt: [("429", "86400"), ("429", "nan"), ("429", "-3")]}) as server:
        assert len(replies(engine_for(server), prompts=PROMPTS[:1])) == 1


def test_addresses_share_the_work_and_a_dead_one_is_left_out(caplog):
    dead = f"http://127.0.0.1:{unused_port()}/v1"
    with Speaker(delay=lambda: 0.02) as one, Speaker(delay=lambda: 0.02) as two:
        found = replies(engine_for(dead, one, two, concurrency=4, retries=1))
        assert len(one.seen) + len(two.seen) == len(PROMPTS)
        assert one.seen
        assert two.seen
    assert sorted(reply.id for reply in found) == sorted(prompt.id for prompt in PROMPTS)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith(f"{dead}: no connection (")
    assert warned[0].endswith("left out, other addresses go on: 2")


def test_an_address_that_dies_on_the_way_gives_its_requests_to_the_others():
    with Speaker({"every": [None] * 5 + ["drop"] * 999}) as one, Speaker(delay=lambda: 0.05) as two:
        found = replies(engine_for(one, two, concurrency=2, retries=2))
        # Of what the first had answered, two may have been under way when it was given up.
        assert len(PROMPTS) - 5 <= len(two.seen) <= len(PROMPTS) - 3
    assert sorted(reply.id for reply in found) == sorted(prompt.id for prompt in PROMPTS)


def test_when_all_addresses_are_dead_each_is_named():
    dead = [f"http://127.0.0.1:{unused_port()}/v1" for _ in range(2)]
    with pytest.raises(UserError) as caught:
        replies(engine_for(*dead, retries=1))
    assert sorted(fault.split(": ")[0] for fault in caught.value.faults) == sorted(dead)


def test_no_address_gets_more_at_a_time_than_it_may_have():
    def until_there_are_five():
        deadline = time.monotonic() + 60
        while server.most < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        return 0.03

    with Speaker(delay=until_there_are_five) as server:
        replies(engine_for(server, concurrency=5, timeout_s=120.0))
        assert server.most == 5


def test_an_interrupted_call_loses_nothing_that_came(tmp_path):
    class Interrupted:
        def generate(self, *args):
            for count, batch in enumerate(whole.generate(*args)):
                if count == 7:
                    raise KeyboardInterrupt
                yield batch

    path, requests = tmp_path / "replies.jsonl", requests_for(PROMPTS)
    with Speaker(delay=lambda: 0.01) as server:
        whole = engine_for(server, concurrency=2)
        with pytest.raises(KeyboardInterrupt):
            collect(Interrupted(), requests, DRAWN, path, "s")
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(kept) == 7
        assert not [thread for thread in threading.enumerate() if thread.name == "requests"]
        found = collect(whole, requests, DRAWN, path, "s")
        assert all(server.asked[row["prompt"]] == 1 for row in kept)
    assert [reply.id for reply in found] == [prompt.id for prompt in PROMPTS]
    assert len(path.read_text().splitlines()) == len(PROMPTS)


def test_it_works_inside_a_running_event_loop():
    async def notebook():
        with Speaker() as server:
            return replies(engine_for(server))

    assert len(asyncio.run(notebook())) == len(PROMPTS)


def test_a_fault_of_ours_is_raised_as_it_is(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(requests, "read", broken)
    with Speaker() as server, pytest.raises(ZeroDivisionError):
        replies(engine_for(server))


def test_what_is_sent_is_in_the_documented_schema():
    with Speaker() as server:
        engine = engine_for(server)
        replies(engine, prompts=PROMPTS[:1])
        replies(engine, prompts=PROMPTS[:1], prefix="I will not.")
        replies(engine_for(server, style="alpaca"), prompts=PROMPTS[:1], prefix="I will not.")
        engine.complete([[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]], DRAWN)
        engine.complete(["Once upon"], Sampling(8))
        chat, prefixed, alpaca, messages, text = server.seen
    sampled = {"model": "m", "max_tokens": 8, "temperature": 1.0, "top_p": 0.9}

    def fields(seen):
        return {name: value for name, value in seen[2].items() if name != "seed"}

    user = {"role": "user", "content": PROMPTS[0].prompt}
    assert [each[0] for each in (chat, prefixed, messages)] == ["/v1/chat/completions"] * 3
    assert [each[0] for each in (alpaca, text)] == ["/v1/completions"] * 2
    assert fields(chat) == sampled | {"messages": [user]}
    assert fields(prefixed) == sampled | {
        "messages": [user, {"role": "assistant", "content": "I will not."}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    assert fields(alpaca).keys() == sampled.keys() | {"prompt"}
    assert fields(alpaca)["prompt"].endswith(f"### Instruction:\n{PROMPTS[0].prompt}\n\n### Response:\nI will not.")
    assert fields(messages)["messages"][0] == {"role": "system", "content": "Be brief."}
    assert fields(text) == sampled | {"prompt": "Once upon", "temperature": 0.0, "top_p": 1.0}
    for seen, schema in ((chat, ChatBody), (messages, ChatBody), (alpaca, TextBody), (text, TextBody)):
        TypeAdapter(schema).validate_python(seen[2])
        assert seen[2].keys() <= schema.__annotations__.keys() | {"stream"} | schema.__mro__[0].__annotations__.keys()
        assert 0 <= seen[2]["seed"] < 2**31


def test_fields_can_be_added_and_taken_away():
    with Speaker() as server:
        replies(
            engine_for(server, body={"top_k": 20, "max_tokens": None, "max_completion_tokens": 9}), prompts=PROMPTS[:1]
        )
        body = server.seen[0][2]
    assert (body["top_k"], body["max_completion_tokens"]) == (20, 9)
    assert "max_tokens" not in body


def test_half_a_letter_in_a_prompt_is_replaced():
    with Speaker() as server:
        engine_for(server).complete(["a\ud800b"], DRAWN)
        assert server.seen[0][2]["prompt"] == "a?b"


def test_completions_come_in_the_order_of_the_prompts():
    rng = random.Random(0)
    with Speaker(delay=lambda: rng.uniform(0, 0.05)) as server:
        asked = [
            f"text {index}" if index % 2 else [{"role": "user", "content": f"chat {index}"}] for index in range(12)
        ]
        found = engine_for(server).complete(asked, DRAWN)
        assert engine_for(server).complete([], DRAWN) == []
    assert [text.split(" by ")[0] for text in found] == [
        f"answer to {'text' if index % 2 else 'chat'} {index}" for index in range(12)
    ]
    # The same prompt twice is drawn twice.
    with Speaker() as server:
        assert len(set(engine_for(server).complete(["x", "x"], DRAWN))) == 2


def test_a_reply_begins_with_its_prefix_and_says_how_it_ended():
    plan = {PROMPTS[0].prompt: ["at its limit"], PROMPTS[1].prompt: ["cut while thinking"]}
    with Speaker(plan) as server:
        found = {reply.id: reply for reply in replies(engine_for(server), prompts=PROMPTS[:3], prefix="I will not.")}
    assert {reply.id: reply.finish for reply in found.values()} == {"p0": "length", "p1": "length", "p2": "stop"}
    assert found["p0"].completion.startswith("I will not.answer to")
    assert found["p1"].completion == "I will not."


def test_the_key_is_sent_and_appears_nowhere(monkeypatch, caplog, capfd, tmp_path):
    monkeypatch.setenv("MY_KEY", f"{CANARY}\n")
    caplog.set_level(logging.DEBUG)
    path, told = tmp_path / "replies.jsonl", []
    for status in ("401", "500", "429", "drop"):
        with Speaker({prompt.prompt: [status] * 99 for prompt in PROMPTS[3:]}) as server:
            engine = engine_for(server, key_env="MY_KEY", retries=1)
            with pytest.raises(UserError) as caught:
                collect(engine, requests_for(PROMPTS), DRAWN, path, status)
        assert {headers["Authorization"] for _, headers, _, _ in server.seen} == {f"Bearer {CANARY}"}
        told += [*traceback.format_exception(caught.value), repr(caught.value), repr(engine.server), repr(engine)]
        told += [engine.server.model_dump_json(), repr(vars(engine)), repr(engine._asker)]
    assert "refused for Bearer ***" in "".join(told)
    assert caplog.records
    captured = capfd.readouterr()
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    for text in (*told, *written, caplog.text, captured.out, captured.err):
        assert CANARY not in text
        assert CANARY[:14] not in text


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\nX-Other: 1")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds letters that no key has") as caught:
        engine_for("http://127.0.0.1:1/v1")
    assert CANARY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"urls": []}, "at least 1 item"),
        ({"urls": ["localhost:8000/v1"]}, r"is no address: write it as http://localhost:8000/v1"),
        ({"urls": ["ftp://localhost/v1"]}, "is no address"),
        ({"urls": ["http://"]}, "is no address"),
        ({"urls": ["http://localhost:99999/v1"]}, "is no address"),
        ({"urls": ["http://me:secret@localhost/v1"]}, "must hold no user or password"),
        ({"urls": ["me:secret@localhost/v1"]}, "must hold no user or password"),
        ({"urls": ["http://localhost/v1?key=secret"]}, "ends where /chat/completions would go on"),
        ({"urls": ["http://localhost/v1/chat/completions"]}, "ends where /chat/completions would go on"),
        ({"urls": ["http://localhost/v1", "http://localhost/v1/"]}, "named twice"),
        ({"key_env": "sk-secret"}, "not the key itself"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"retries": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_without_repeating_secrets(settings, sentence):
    with pytest.raises(ValidationError, match=sentence) as caught:
        Server(**{"urls": ["http://localhost:8000/v1"], "model": "m", **settings})
    assert "secret" not in str(caught.value)


def test_an_address_may_end_in_a_slash():
    assert Server(urls=["http://localhost:8000/v1/"], model="m").urls == ["http://localhost:8000/v1"]


def test_without_the_packages_it_is_said_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "tasft.models.requests")
    monkeypatch.delattr("tasft.models.requests")
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(UserError, match=r"tenacity, which is missing: pip install '\.\[server\]'"):
        engine_for("http://127.0.0.1:1/v1")


def test_the_engines_are_imported_without_them():
    code = "import sys, tasft.models.server, tasft.models.local\n"
    code += "sys.exit(bool({'openai', 'tenacity'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- A real server: `transformers serve` -----------------------------------------------------


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """Address, model name and folder of the tiny model under `transformers serve`."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    folder.mkdir()
    for file in Path(tiny).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    # Without this it takes the likeliest token whatever the temperature.
    GenerationConfig(do_sample=True, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    port = unused_port()
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    log = (folder.parent / "log").open("wb")
    with subprocess.Popen(
        [*command, "--device", "cpu"], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None, (folder.parent / "log").read_text()
                assert time.monotonic() < deadline, (folder.parent / "log").read_text()
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.kill()


def engines_of(real, style="chat", **settings):
    url, folder = real
    model, tokenizer = load_model(folder), tiny_tokenizer()
    served = ServerEngine(Server(urls=[url], model=folder, **settings), style)
    return served, TransformersEngine(model, tokenizer, style, batch_size=1)


@pytest.mark.parametrize("style", ["chat", "alpaca"])
def test_a_real_server_says_what_the_model_says_here(real, style):
    served, local = engines_of(real, style)
    there, here = ({reply.id: reply for reply in replies(engine, Sampling(12))} for engine in (served, local))
    assert {name: (reply.completion, reply.finish) for name, reply in there.items()} == {
        name: (reply.completion, reply.finish) for name, reply in here.items()
    }
    assert all(len(reply.completion.split()) > 5 for reply in there.values())


def test_a_real_server_completes_text_and_messages(real):
    served, local = engines_of(real)
    asked = ["The river", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "A"]
    assert served.complete(asked, Sampling(12)) == local.complete(asked, Sampling(12))


def test_a_real_server_draws_by_the_seed(real):
    # It seeds all threads at once: only one request at a time is its own.
    served, _ = engines_of(real, concurrency=1)
    first = {reply.id: reply.completion for reply in replies(served, prompts=PROMPTS[:6])}
    again = {reply.id: reply.completion for reply in replies(served, done=["p0", "p3"], prompts=PROMPTS[:6])}
    assert again == {name: text for name, text in first.items() if name not in ("p0", "p3")}
    other = replies(served, Sampling(8, 1.0, 0.9, seed=6), prompts=PROMPTS[:6])
    assert {reply.id: reply.completion for reply in other} != first


def test_a_real_server_that_cannot_go_on_from_a_prefix_says_so(real):
    served, _ = engines_of(real)
    with pytest.raises(UserError, match=r"status 422 \(Unexpected fields in the request: .*continue_final_message"):
        replies(served, prompts=PROMPTS[:1], prefix="I will not.")


def test_a_real_server_refuses_another_model(real):
    engine = ServerEngine(Server(urls=[real[0]], model="another"))
    with pytest.raises(UserError, match=r"status 400 .*another"):
        replies(engine, prompts=PROMPTS[:1])
