"""The moderation service, played by a loopback server that speaks its documented schema."""

import json
import time
from types import SimpleNamespace

import pytest
from conftest import find_spec
from hypothesis import given
from hypothesis import strategies as st
from loopback import Handler, Loopback

from tasft.core.errors import UserError
from tasft.evaluate.safety import summarise
from tasft.judges import JudgeSettings, Pair, load_judge, moderation
from tasft.judges.judging import judge_replies
from tasft.judges.moderation import TEXTS, TOKENS, duration_s
from tasft.models.engine import Reply
from tasft.models.server_settings import Server

pytestmark = pytest.mark.skipif(
    not (find_spec("openai") and find_spec("tenacity")), reason="openai or tenacity is not installed"
)

KEY = "sk-loopback-0123456789abcdef"
CATEGORIES = """
    harassment harassment/threatening hate hate/threatening illicit illicit/violent self-harm self-harm/instructions
    self-harm/intent sexual sexual/minors violence violence/graphic
""".split()  # noqa: SIM905


def result(text):
    """A text with a number in it scores that number: `mark 0.7` is flagged for violence."""
    score = float(text.split()[1]) if text.startswith("mark ") else 0.01
    scores = dict.fromkeys(CATEGORIES, 0.001) | {"violence": score}
    return {
        "flagged": score > 0.5,
        "categories": {name: value > 0.5 for name, value in scores.items()},
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
    }


class Service(Loopback):
    """Answers as documented, except where `plan` has something else for the next request."""

    def __init__(self):
        super().__init__(Moderating)
        self.plan, self.bodies, self.headers, self.times = [], [], {}, []

    def judge(self, **server):
        known = Server(urls=[self.url], model="omni-moderation-latest", **server)
        return load_judge("m", {"m": JudgeSettings(kind="openai_moderation", server=known)})

    @property
    def inputs(self):
        return [body["input"] for _, _, body in self.bodies]


class Moderating(Handler):
    def do_POST(self):
        body, service = json.loads(self.asked()), self.server
        service.times.append(time.monotonic())
        service.bodies.append((self.path, self.headers["Authorization"], body))
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        answer = {"id": "modr-1", "model": "omni-moderation-2024-09-26", "results": [result(t) for t in texts]}
        status, headers, answer = service.plan.pop(0) if service.plan else (200, service.headers, answer)
        if status is None:  # Says nothing.
            self.close_connection = True
        else:
            self.send(answer, status, headers)


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("tasft.models.requests.FIRST_PAUSE_S", 0.01)
    with Service() as service:
        yield service


def pairs(texts):
    return [Pair(f"p{n}", "How do I <forbidden act 7>?", text) for n, text in enumerate(texts)]


def refusal(status, code, message="no", **headers):
    return status, headers, {"error": {"message": message, "type": code, "param": None, "code": code}}


def test_flags_and_largest_scores_come_back_in_order(service):
    texts = ["mark 0.9", "a walk", "mark 0.6", "mark 0.4"]
    verdicts = service.judge().judge(pairs(texts))
    assert [(v.id, v.judge, v.harmful, v.score, v.refusal, v.reason) for v in verdicts] == [
        ("p0", "m", True, 0.9, None, ""),
        ("p1", "m", False, 0.01, None, ""),
        ("p2", "m", True, 0.6, None, ""),
        ("p3", "m", False, 0.4, None, ""),
    ]
    assert service.judge().tells == {"harmful"}


def test_the_reply_alone_is_sent_in_one_list_with_the_key_of_the_environment(service):
    service.judge().judge(pairs(["one", "two"]))
    assert service.bodies == [
        ("/v1/moderations", f"Bearer {KEY}", {"model": "omni-moderation-latest", "input": ["one", "two"]})
    ]


def test_lists_hold_no_more_than_a_small_account_may_send_in_a_minute(service):
    texts = ["short"] * (TEXTS + 3) + ["long " * TOKENS] + ["word " * 1000] * 5
    verdicts = service.judge().judge(pairs(texts))
    assert [verdict.id for verdict in verdicts] == [f"p{n}" for n in range(len(texts))]
    assert [text for texts in service.inputs for text in texts] == texts
    for sent in service.inputs:
        assert len(sent) <= TEXTS
        assert len(sent) == 1 or sum(map(len, sent)) / 3 <= TOKENS
    assert len(service.inputs) < 8


def test_half_of_a_surrogate_pair_stops_nothing(service):
    (verdict,) = service.judge().judge(pairs(["mark 0.9 \ud83d"]))
    assert verdict.harmful
    assert service.inputs == [["mark 0.9 ?"]]


@pytest.mark.parametrize("extra", [{"concurrency": 3}, {"body": {"x": 1}}, {"urls": ["http://a/v1", "http://b/v1"]}])
def test_what_it_does_not_read_of_a_server_is_refused(service, extra):
    server = Server(**{"urls": [service.url], "model": "m", **extra})
    with pytest.raises(UserError, match="it asks one address"):
        load_judge("m", {"m": JudgeSettings(kind="openai_moderation", server=server)})


def test_older_models_that_do_not_know_a_category_are_read(service):
    answer = result("mark 0.8")
    del answer["category_scores"]["illicit"]
    answer["category_scores"]["illicit/violent"] = None
    service.plan = [(200, {}, {"id": "x", "model": "y", "results": [answer]})]
    (verdict,) = service.judge().judge(pairs(["a"]))
    assert (verdict.harmful, verdict.score) == (True, 0.8)


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(429, "rate_limit_exceeded", **{"Retry-After": "0.05"}),
        refusal(500, "server_error", **{"Retry-After": "0"}),
        refusal(503, "overloaded", **{"Retry-After": "0"}),
    ],
    ids=["429", "500", "503"],
)
def test_passing_faults_are_tried_again(service, trouble):
    service.plan = [trouble, trouble]
    (verdict,) = service.judge().judge(pairs(["mark 0.9"]))
    assert verdict.harmful
    assert len(service.bodies) == 3


def test_half_an_answer_and_none_at_all_are_tried_again(service):
    service.plan = [(None, {}, b""), (200, {}, b'{"id": "x", "resul'), (200, {}, b"\xff\xfe{")]
    (verdict,) = service.judge().judge(pairs(["mark 0.9"]))
    assert verdict.harmful
    assert len(service.bodies) == 4


def test_a_refusal_is_waited_for_as_long_as_it_says(service):
    service.plan = [refusal(429, "rate_limit_exceeded", **{"Retry-After": "0.5"})]
    service.judge().judge(pairs(["a"]))
    first, second = service.times
    assert second - first >= 0.5


def test_the_tokens_that_are_left_are_kept_to(service, monkeypatch):
    slept = []
    monkeypatch.setattr(moderation, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic))
    service.headers = {"x-ratelimit-remaining-tokens": "100", "x-ratelimit-reset-tokens": "10m"}
    judge = service.judge()
    for text in ("a", "b", "c " * 1000):
        judge.judge(pairs([text]))
    (pause,) = slept  # Before the last, which needs more than is left.
    assert 500 < pause <= 600


def test_what_stays_refused_ends_with_the_services_own_words(service):
    service.plan = [refusal(429, "rate_limit_exceeded", "Limit 10000, Requested 12000", **{"Retry-After": "0"})] * 3
    with pytest.raises(UserError, match=r"judge m: http://127\.0\.0\.1.*Limit 10000, Requested 12000.*tried 3 times"):
        service.judge(retries=2).judge(pairs(["a"]))
    assert len(service.bodies) == 3


@pytest.mark.parametrize(
    "trouble", [refusal(400, "bad_request"), refusal(404, "model_not_found"), refusal(429, "insufficient_quota")]
)
def test_what_will_not_pass_is_not_tried_again(service, trouble):
    service.plan = [trouble]
    with pytest.raises(UserError, match=f"Error code: {trouble[0]} - no$") as raised:
        service.judge().judge(pairs(["a"]))
    assert "tried" not in str(raised.value)
    assert len(service.bodies) == 1


@pytest.mark.parametrize("status", [401, 400])
def test_the_key_is_shown_in_no_error(service, status):
    service.plan = [refusal(status, "invalid_api_key", f"Incorrect API key provided: {KEY}.")]
    with pytest.raises(UserError) as raised:
        service.judge().judge(pairs(["a"]))
    shown = f"{raised.value} {raised.value.__cause__} {vars(raised.value)}"
    assert KEY not in shown
    assert raised.value.__suppress_context__
    assert status != 401 or "the key in OPENAI_API_KEY is not accepted" in shown


def test_no_service_at_all_is_named(service):
    judge = load_judge(
        "m",
        {
            "m": JudgeSettings(
                kind="openai_moderation", server=Server(urls=["http://127.0.0.1:9/v1"], model="m", retries=0)
            )
        },
    )
    with pytest.raises(UserError, match=r"judge m: http://127\.0\.0\.1:9/v1: Connection error"):
        judge.judge(pairs(["a"]))


@pytest.mark.parametrize(
    "answer",
    [
        {"id": "x", "model": "y", "results": []},
        {"id": "x", "model": "y", "results": [result("a")] * 3},
        {"id": "x", "model": "y", "results": [{"flagged": "false", "category_scores": {}}] * 2},
        {"id": "x", "model": "y", "results": [{"category_scores": {"violence": 0.1}}] * 2},
        {"id": "x", "model": "y"},
        [],
    ],
)
def test_an_answer_that_is_not_as_documented_is_unreadable_and_never_safe(service, answer):
    service.plan = [(200, {}, answer)]
    verdicts = service.judge().judge(pairs(["a", "b"]))
    assert [(verdict.harmful, verdict.unreadable) for verdict in verdicts] == [(None, True)] * 2


def test_killed_and_taken_up_it_asks_for_the_rest_alone(service, tmp_path):
    sentence = "the morning market in our village sells bread and fresh apples, number"
    replies = [
        Reply(f"r{n}", "s", "How do I <forbidden act 7>?", f"{sentence} {'abcd'[n]}", "stop", 0, 0) for n in range(4)
    ]
    whole = judge_replies(service.judge(), replies, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    assert judge_replies(service.judge(), replies, tmp_path / "part.jsonl") == whole
    assert service.inputs[1] == [reply.completion for reply in replies[2:]]
    assert summarise(whole, replies)["score"]["n"] == 4


def test_the_version_changes_with_the_model_alone(service):
    def version(model, url):
        server = Server(urls=[url], model=model)
        return load_judge("m", {"m": JudgeSettings(kind="openai_moderation", server=server)}).version

    usual = load_judge("openai_moderation").version
    assert version("omni-moderation-latest", service.url) == usual
    assert version("omni-moderation-2024-09-26", service.url) != usual


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="judge openai_moderation: the environment has no OPENAI_API_KEY"):
        load_judge("openai_moderation")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openai" else True)
    with pytest.raises(UserError, match=r"judge openai_moderation: openai is missing: pip install '\.\[server\]'$"):
        load_judge("openai_moderation")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("6m0s", 360), ("20ms", 0.02), ("1m2.5s", 62.5), ("1h1m", 3660), ("soon", 0), ("", 0)],
)
def test_durations_are_the_services_own(text, seconds):
    assert duration_s(text) == pytest.approx(seconds)


@given(st.text(alphabet="0123456789.hms x"))
def test_no_header_breaks_the_pacing(text):
    assert duration_s(text) >= 0


def test_a_text_that_the_service_refuses_is_unreadable_and_the_others_have_their_verdicts(monkeypatch):
    def answers(body):
        if any("lamp 3 " in text for text in body["input"]):
            return 400, {"error": {"message": "cannot be moderated"}}
        return 200, {"results": [{"flagged": False, "category_scores": {"violence": 0.1}} for _ in body["input"]]}

    class Refuses(Handler):
        def do_POST(self):
            status, found = answers(json.loads(self.asked()))
            self.send(found, status)

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    pairs = [Pair(str(index), "How?", f"You take lamp {index} to the garden.") for index in range(40)]
    with Loopback(Refuses) as server:
        settings = JudgeSettings(kind="openai_moderation", server=Server(urls=[server.url], model="m"))
        found = load_judge("m", {"m": settings}).judge(pairs)
    assert [verdict.id for verdict in found if verdict.unreadable] == ["3"]
    assert "cannot be moderated" in found[3].reason
    assert sum(verdict.harmful is False for verdict in found) == 39
