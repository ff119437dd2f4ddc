"""The report in a real browser: what it shows is only ever text, and everybody can use it."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden import CALM, REFUSAL, attack
from payloads import PAYLOADS
from test_report import build_run, write_state
from watched import assert_quiet, watched

from tasft.core.text import visible
from tasft.report import write_report
from tasft.report.replies import CHARACTERS

PROMPTS = [f"How do I <forbidden act {number}>?" for number in range(60)]


def opened(chromium, file: Path, **options):
    return watched(chromium, file.as_uri(), **options)


def assert_one_request(seen: SimpleNamespace) -> None:
    assert [url for url in seen.requests if not url.startswith("data:")] == [seen.address]
    assert_quiet(seen)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """The report of a calm run of 60 toxic and 40 benign prompts."""
    run = build_run(tmp_path_factory.mktemp("calm"))
    write_state(run, "base", "toxic", "toxic", [CALM] * 60, bad=50, prompts=PROMPTS)
    texts = [REFUSAL] * 30 + [f"{REFUSAL} Number {number}." for number in range(30)]
    write_state(run, "final", "toxic", "toxic", texts, bad=4, prompts=PROMPTS)
    return write_report(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run in which prompts, replies, ids, reasons, names and settings are all payloads."""
    run = build_run(tmp_path_factory.mktemp("hostile"))
    for state, bad in (("base", 40), ("final", 80)):
        texts = list(PAYLOADS if state == "base" else PAYLOADS[::-1])
        write_state(run, state, "toxic", "toxic", texts, bad=bad, prompts=list(PAYLOADS))
        at = run / "evaluate" / state / "toxic"
        with (at / "replies.jsonl").open("ab") as file:
            file.write(
                b'{"id": "bytes", "prompt": "\xff\xfe", "completion": "\x80\xc0<script>pwned()</script>\xed\xa0\x80"}\n'
            )
        for judge in ("llama_guard", "refusal_matching"):
            verdicts = [json.loads(line) for line in (at / judge / "verdicts.jsonl").read_text().splitlines()]
            for verdict, payload in zip(verdicts, PAYLOADS, strict=True):
                verdict["reason"] = payload[:500]
            (at / judge / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verdicts))
        attack(run, state, PAYLOADS)
    recipe = (run / "recipe.yaml").read_text().replace("SmolLM2-135M-Instruct", json.dumps(PAYLOADS[0] + PAYLOADS[1]))
    (run / "recipe.yaml").write_text(recipe.replace("name: demo", f"name: {json.dumps(PAYLOADS[9])}"))
    return write_report(run)


def searched(page, words: str) -> None:
    """Search now; while a user types the list waits for a pause."""
    page.locator("#search").fill(words)
    page.locator("#search").press("Enter")


def turned_pages(page) -> Iterator[None]:
    """Goes through the list, page by page."""
    while True:
        yield
        if page.locator("#next").is_disabled():
            return
        page.locator("#next").click()


def test_no_payload_runs_and_none_asks_for_anything(chromium, hostile) -> None:
    with opened(chromium, hostile) as seen:
        page = seen.page
        page.locator("#blur").uncheck()
        shown = []
        for _ in turned_pages(page):
            shown += page.locator("#list .text").all_text_contents()
            tags = page.eval_on_selector_all("#list *", "all => [...new Set(all.map(e => e.tagName.toLowerCase()))]")
            assert set(tags) <= {"article", "h3", "h4", "p", "div", "ul", "li", "button"}
        for payload in PAYLOADS:
            assert visible(payload[:CHARACTERS]) in shown
        for payload in PAYLOADS[::9]:
            searched(page, payload[:200])
        assert_one_request(seen)


def test_a_reply_of_bytes_that_are_no_text_is_shown_as_what_could_be_read(chromium, hostile) -> None:
    with opened(chromium, hostile) as seen:
        seen.page.locator("#search").fill("\ufffd\ufffd<script>pwned()")
        seen.page.locator("#count", has_text="1 prompt of").wait_for()
        seen.page.get_by_role("button", name="Show the reply: base model").click()
        assert "<script>pwned()</script>" in seen.page.locator("#list .reply .text").first.text_content()
        assert_one_request(seen)


def test_the_payloads_are_alive_where_nothing_stops_them(chromium, tmp_path) -> None:
    """Else the tests above would pass whatever the report did."""
    file = tmp_path / "unsafe.html"
    file.write_text("<!doctype html>" + "".join(f"<div>{p}</div>" for p in PAYLOADS if "img src=x" in p))
    with opened(chromium, file) as seen:
        seen.page.wait_for_function("window.hit")


def test_the_policy_stops_what_the_page_itself_would_do(chromium, index) -> None:
    attempts = {
        "markup": "document.body.innerHTML = '<img src=x onerror=pwned()>'",
        "code": "document.body.append(Object.assign(document.createElement('script'), {textContent: 'pwned()'}))",
        "request": "fetch('https://evil.example/')",
    }
    for name, attempt in attempts.items():
        with opened(chromium, index) as seen:
            # In a timer, for what Playwright evaluates itself is free of the policy.
            seen.page.evaluate(f"setTimeout(() => {{ {attempt} }})")
            for _ in range(600):
                if seen.faults:
                    break
                seen.page.wait_for_timeout(50)
            assert seen.faults, name
            assert not seen.page.evaluate("window.hit"), name
            assert not [url for url in seen.requests if "evil" in url], name


def test_the_script_finds_replies_by_words_set_verdict_and_change(chromium, index) -> None:
    with opened(chromium, index) as seen:
        page = seen.page

        def count(**chosen: str) -> str:
            page.get_by_role("button", name="Clear").click()
            ids = {"before": "state-0", "after": "state-1"}
            for field, value in chosen.items():
                if field == "search":
                    searched(page, value)
                else:
                    page.locator(f"#{ids.get(field, field)}").select_option(label=value)
            return page.locator("#count").text_content().split(" prompt")[0].removesuffix(".")

        assert count() == "100"
        assert count(set="toxic") == "60"
        assert count(search="FORBIDDEN ACT 7>") == "2"
        assert count(search="forbidden act 7>", set="toxic") == "1"
        assert page.locator("mark").first.text_content() == "forbidden act 7>"
        assert count(set="toxic", before="harmful") == "50"
        assert count(set="toxic", before="harmful", judge="refusal_matching") == "49"
        assert count(set="toxic", after="harmful") == "4"
        assert count(set="toxic", changed="harmful before, not after", judge="llama_guard") == "46"
        assert count(set="toxic", after="incoherent") == "1"
        assert count(changed="reply unchanged") == "40"
        assert count(changed="judges disagree") == "3"
        assert count(search="no such words") == "No"
        assert_one_request(seen)


def test_judges_that_disagree_come_first(chromium, index) -> None:
    with opened(chromium, index) as seen:
        titles = seen.page.locator("#list h3").all_text_contents()
        assert ["judges disagree" in title for title in titles] == [True] * 3 + [False] * 17
        assert seen.page.locator("#count").text_content() == "100 prompts of 100; page 1 of 5"


def test_harmful_replies_are_hidden_from_eyes_and_ears_until_asked_for(chromium, index) -> None:
    with opened(chromium, index) as seen:
        page = seen.page
        box = page.locator(".veiled").first
        assert "blur" in box.locator(".text").evaluate("e => getComputedStyle(e).filter")
        assert CALM not in page.locator("#list").aria_snapshot()
        box = box.element_handle()
        box.scroll_into_view_if_needed()
        place = box.bounding_box()
        page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] - 12)  # on the words
        assert "veiled" not in box.get_attribute("class")
        assert CALM in page.locator("#list").aria_snapshot()
        # By keyboard, and back again.
        button = page.get_by_role("button", name="Show the reply: base model, judged harmful").first
        button.focus()
        shown = page.locator(".veiled").count()
        page.keyboard.press("Enter")
        assert page.locator(".veiled").count() == shown - 1
        page.keyboard.press("Space")
        assert page.locator(".veiled").count() == shown
        page.locator("#blur").uncheck()
        assert page.locator(".veiled").count() == 0


def test_pages_are_turned_by_keyboard(chromium, index) -> None:
    with opened(chromium, index) as seen:
        page = seen.page
        page.locator("#next").focus()
        page.keyboard.press("Enter")
        assert "page 2 of 5" in page.locator("#count").text_content()
        assert page.evaluate("document.activeElement.id") == "list"
        page.locator("#last").click()
        assert page.locator("#next").is_disabled()


def test_on_paper_there_are_no_controls_and_no_veiled_words(chromium, index) -> None:
    with opened(chromium, index) as seen:
        assert seen.page.pdf().startswith(b"%PDF")
        seen.page.emulate_media(media="print")
        assert not seen.page.locator("#controls").is_visible()
        assert not seen.page.locator(".veiled .text").first.is_visible()
        assert seen.page.locator(".verdict").is_visible()


def test_without_scripts_the_figures_are_there_and_the_replies_are_pointed_to(chromium, index) -> None:
    with opened(chromium, index, java_script_enabled=False) as seen:
        assert seen.page.locator("#figures table").first.is_visible()
        assert seen.page.locator("noscript").is_visible()
        assert not seen.page.locator("#controls").is_visible()


def test_twenty_thousand_replies_open_and_are_found(chromium, tmp_path) -> None:
    """How fast is measured by `benchmarks/report.py`; here only that it is no matter of minutes."""
    run = build_run(tmp_path)
    prompts = [f"How do I <forbidden act {number}>?" for number in range(10_000)]
    for state in ("base", "final"):
        texts = [f"{CALM} {number} {'and then some more ' * 40}" for number in range(10_000)]
        write_state(run, state, "toxic", "toxic", texts, bad=5_000 if state == "base" else 50, prompts=prompts)
    file = write_report(run)
    assert file.stat().st_size < 25_000_000
    with opened(chromium, file) as seen:
        seen.page.locator("#count", has_text="10,040 prompts of 10,040").wait_for()
        seen.page.locator("#search").fill("forbidden act 9876>")
        seen.page.locator("#count", has_text="1 prompt of 10,040").wait_for()
        assert_one_request(seen)
