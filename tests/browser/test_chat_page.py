"""The chat in a real browser: replies are only ever text, and nothing leaves this machine."""

import json
import os
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import WORDS, tiny_model, tiny_tokenizer
from tokenizers import pre_tokenizers
from watched import assert_quiet, watched

from tasft.cli.chat import Talk, sides_of
from tasft.core.text import visible
from tasft.judges import load_judge
from tasft.models.engine import Sampling

if not find_spec("gradio"):
    reason = "gradio is not installed: make setup"
    (pytest.fail if os.environ.get("CI") else pytest.skip)(
        reason, **({} if os.environ.get("CI") else {"allow_module_level": True})
    )

from tasft.cli.chat.page import POLICY, server_of

SAYS = (
    "<img src=x onerror=pwned()>",
    "<script>pwned()</script>",
    "</textarea></script><svg/onload=pwned()>",
    "[click](javascript:pwned())",
    "![x](https://evil.example/x.png)",
    "<img src=https://evil.example/x.png>",
    "$$\\href{javascript:pwned()}{x}$$",
    "\u202etxt.exe\x1b[31m",
    "<a href='javascript:pwned()'>here</a>",
    "<iframe srcdoc='<script>parent.pwned()</script>'></iframe>",
)


def token_of(text):
    """The token that is decoded to a text."""
    ((token, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return token


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model with payloads for words."""
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = tiny_tokenizer()
    words = [token_of(f" {text}") for text in SAYS]
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    for old, new in zip(
        sorted(word for word in vocabulary if word[0] == "Ġ" and word[1:] in WORDS), words, strict=False
    ):
        vocabulary[new] = vocabulary.pop(old)
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    model = tiny_model(tied=False)
    model.config.max_position_embeddings = 4096  # It reads its words letter by letter.
    with torch.no_grad():
        model.get_output_embeddings().weight[[vocabulary[word] for word in words]] *= 60
    model.save_pretrained(folder)
    return folder


@contextmanager
def served(talk):
    server, listening, address = server_of(talk)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield address
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def address(hostile, tiny):
    with served(Talk(sides_of(str(hostile), str(tiny)), [load_judge("refusal_matching")], Sampling(6, 1.0))) as address:
        yield address


# What the server says in its stream arrives later than its other answers, as where a proxy holds it back.
SLOW_LINE = """
const real = window.fetch;
window.fetch = async (...given) => {
    const answer = await real(...given);
    if (!String(given[0]?.url ?? given[0]).includes("queue/data")) return answer;
    const late = new TransformStream({
        transform: async (chunk, out) => { await new Promise(then => setTimeout(then, 400)); out.enqueue(chunk); }
    });
    return new Response(answer.body.pipeThrough(late), { status: answer.status, headers: answer.headers });
};
"""


@contextmanager
def opened(chromium, address, script=""):
    with watched(chromium, address, is_fault=lambda message: message.type == "error", script=script) as seen:
        seen.page.get_by_label("Say to both").wait_for()
        yield seen


def submit(page, prompt):
    box = page.get_by_label("Say to both")
    box.fill(prompt)
    deadline = time.monotonic() + 60
    # Nothing is taken while the turn before is on its way out, a moment after its verdicts are there.
    while box.input_value():
        assert time.monotonic() < deadline, "the page takes no prompt"
        box.press("Enter")
        page.wait_for_timeout(300)


def ask(page, prompt, count):
    """Ask, and wait for the prompt and both verdicts of so many turns."""
    submit(page, prompt)
    page.wait_for_function(
        """([prompt, count]) => {
            const shown = [...document.querySelectorAll('textarea')].map(e => e.value);
            const verdicts = shown.filter(text => text.startsWith('refusal_matching: '));
            return shown.at(-1) === '' && shown.includes(prompt) && verdicts.length === count;
        }""",
        arg=[visible(prompt), 2 * count],
    )


def texts(page):
    return page.eval_on_selector_all("textarea", "all => all.map(e => e.value)")


def test_nothing_that_is_said_or_asked_runs_and_no_request_leaves(chromium, address):
    with opened(chromium, address) as seen:
        page = seen.page
        prompts = ["<img src=x onerror=pwned()> <script>pwned()</script>", "What then? \u202e", "And then?"]
        for number, prompt in enumerate(prompts, 1):
            ask(page, prompt, number)
        shown = texts(page)
        for prompt in prompts:
            assert visible(prompt) in shown
        replies = [text for text in shown if sum(visible(said) in text for said in SAYS) > 1]
        assert len(replies) >= 3  # Of the hostile model; the other one says words.
        assert not page.locator("img[src*='evil'], iframe, a[href^='javascript:'], svg[onload]").count()
        assert "\u202e" not in page.content()
        assert_quiet(seen)


def test_a_new_conversation_is_empty(chromium, address):
    with opened(chromium, address, SLOW_LINE) as seen:
        ask(seen.page, "One?", 1)
        ask(seen.page, "Two?", 2)
        seen.page.get_by_role("link", name="New conversation").click()
        seen.page.wait_for_function("() => [...document.querySelectorAll('textarea')].every(e => e.value == '')")
        seen.page.get_by_label("Say to both").wait_for()
        assert "One?" not in seen.page.content()
        ask(seen.page, "Three?", 1)
        assert_quiet(seen)


class Slow(Talk):
    """Takes its time, and says how often it was not let finish."""

    stopped = 0

    def turn(self, past, prompt):
        try:
            for turn in super().turn(past, prompt):
                time.sleep(0.05)
                yield turn
        except GeneratorExit:
            self.stopped += 1
            raise


@pytest.mark.parametrize(("role", "name"), [("button", "Stop"), ("link", "New conversation")])
def test_a_reply_is_stopped_and_the_next_one_comes(chromium, hostile, tiny, role, name):
    talk = Slow(sides_of(str(hostile), str(tiny)), [load_judge("refusal_matching")], Sampling(400, 1.0))
    with served(talk) as address, opened(chromium, address) as seen:
        page = seen.page
        page.get_by_label("Say to both").fill("One?")
        page.get_by_label("Say to both").press("Enter")
        page.wait_for_function("() => [...document.querySelectorAll('textarea')].some(e => e.value.length > 50)")
        # By keyboard: for a mouse it is to stand still, and the reply above it grows.
        page.get_by_role(role, name=name).press("Enter")
        deadline = time.monotonic() + 60
        while not talk.stopped:
            assert time.monotonic() < deadline
            page.wait_for_timeout(100)
        assert not any(text.startswith("refusal_matching: ") for text in texts(page))
        talk.sampling = Sampling(6, 1.0)
        ask(page, "Two?", 1)
        assert talk.stopped == 1


def test_the_policy_is_on_every_answer_and_stops_what_would_leave(chromium, address):
    for path in ("", "config", "theme.css", "gradio_api/info", "nowhere"):
        assert headers_of(f"{address}{path}")["Content-Security-Policy"] == POLICY, path
    with opened(chromium, address) as seen:
        said = seen.page.evaluate(
            "async () => { try { await fetch('https://evil.example/'); return 'went' } catch (e) { return 'stopped' } }"
        )
        assert said == "stopped"
        assert any("Content Security Policy" in fault for fault in seen.faults)


def headers_of(url):
    try:
        with urlopen(url, timeout=60) as answer:
            return answer.headers
    except HTTPError as error:
        return error.headers


def test_a_page_elsewhere_cannot_ask_under_a_name_of_its_own(address):
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(address, headers={"Host": "evil.example"}), timeout=60)
    assert refused.value.code == 400


def test_it_listens_on_loopback_alone_and_keeps_nothing(address):
    assert address.startswith("http://127.0.0.1:")
    with urlopen(f"{address}config", timeout=60) as answer:
        config = json.load(answer)
    assert not config["analytics_enabled"]
    assert not config["run_history"]


def test_everybody_can_use_it(chromium, address):
    from axe_playwright_python.sync_playwright import Axe

    with opened(chromium, address) as seen:
        ask(seen.page, "One?", 1)
        found = Axe().run(seen.page).response["violations"]
        assert [(each["id"], each["help"]) for each in found if each["impact"] in ("serious", "critical")] == []
