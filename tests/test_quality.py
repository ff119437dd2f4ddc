"""Likelihood of reference answers, and AlpacaEval against a loopback server."""

import json
import math

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from loopback import Handler, Loopback, completion
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from tasft.core.errors import UserError
from tasft.data.template import encode_prompt
from tasft.evaluate import quality
from tasft.evaluate.references import Reference, read_references
from tasft.models.engine import Reply
from tasft.models.local import TransformersEngine
from tasft.models.server_settings import Server

CONFIG = "weighted_alpaca_eval_gpt-4o-mini-2024-07-18"
REFERENCES = [Reference(str(k), f"Explain <matter {k}>.", f"It is {'so ' * k}plain.", "somebody") for k in range(12)]


def engine(model):
    return TransformersEngine(model, tiny_tokenizer(), "chat", batch_size=16)


def adapted():
    """The tiny model with an adapter that changes what it says."""
    torch.manual_seed(3)
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, lora_alpha=400, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    return model.eval()


@torch.inference_mode()
def answer_logits(model, row):
    """Log-probabilities where the answer's tokens are predicted, and these tokens."""
    tokenizer = tiny_tokenizer()
    prompt = encode_prompt(tokenizer, row.instruction, "chat")
    answer = tokenizer(row.output, add_special_tokens=False).input_ids
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1), answer


def test_likelihood_and_divergence_are_what_their_names_say(tmp_path):
    rows = [*REFERENCES, Reference("empty", "Say nothing.", "", "somebody")]
    before, now = tiny_model(), adapted()
    found = quality.measure(engine(now), rows, tmp_path, {"commit": "x"}, quality.remember(engine(before), rows))
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert items.pop() == {"id": "empty", "tokens": 0, "reference_nll": None, "kl_to_before": None}
    for row, item in zip(REFERENCES, items, strict=True):
        log_q, answer = answer_logits(now, row)
        log_q0, _ = answer_logits(before, row)
        assert item["tokens"] == len(answer)
        assert item["reference_nll"] == pytest.approx(float(F.nll_loss(log_q, torch.tensor(answer))), rel=1e-4)
        moved = F.kl_div(log_q, log_q0, reduction="none", log_target=True).sum(1).mean()
        assert item["kl_to_before"] == pytest.approx(float(moved), rel=1e-3)
        assert item["kl_to_before"] > 1e-4
    for name in ("reference_nll", "kl_to_before"):
        assert found[name]["n"] == len(REFERENCES)
        assert found[name]["value"] == pytest.approx(sum(item[name] for item in items) / len(items))
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    likely, perplexity = found["reference_nll"], found["reference_perplexity"]
    assert [math.log(perplexity[key]) for key in ("value", "low", "high")] == pytest.approx(
        [likely[key] for key in ("value", "low", "high")]
    )
    assert perplexity["n"] == likely["n"]
    assert json.loads((tmp_path / "summary.json").read_text()) == found


def test_a_model_has_not_moved_from_itself_and_without_another_nothing_is_said(tmp_path):
    model = tiny_model()
    same = quality.measure(engine(model), REFERENCES, tmp_path, {}, quality.remember(engine(model), REFERENCES))
    assert same["kl_to_before"]["value"] == pytest.approx(0, abs=1e-6)
    alone = quality.measure(engine(model), REFERENCES, tmp_path, {})
    assert alone["kl_to_before"] == {"value": None, "low": None, "high": None, "n": 0}
    assert alone["reference_nll"] == same["reference_nll"]


def test_references_are_read_by_alpaca_evals_names_or_ours_and_every_bad_row_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{"instruction": "a", "output": "", "generator": "g"}, {"prompt": "b", "completion": "c"}])
    )
    assert read_references(str(path)) == [Reference("1", "a", "", "g"), Reference("2", "b", "c", "reference")]
    assert len(read_references(str(path), 1)) == 1
    path.write_text(json.dumps([{"instruction": " ", "output": 3}, {"output": "x"}]))
    with pytest.raises(UserError) as caught:
        read_references(str(path))
    assert len(caught.value.faults) == 3


class Annotator(Loopback):
    """Likes a reply with the word `good`, and says so by the log-probabilities of `m` and `M`."""

    def __init__(self, tells=True):
        super().__init__(Annotating)
        self.seen, self.tells = [], tells

    def __enter__(self):
        super().__enter__()
        return Server(urls=[self.url], model="inert", key_env="CANARY_KEY")


class Annotating(Handler):
    def do_POST(self):
        body = json.loads(self.asked())
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        first, second = body["messages"][-1]["content"].split('"model_identifier": "M"')
        p = 0.9 if "good" in first else 0.1 if "good" in second else 0.5
        top = [{"token": t, "logprob": math.log(q), "bytes": None} for t, q in (("m", p), ("M", 1 - p))]
        logprobs = {"content": [{**top[0], "top_logprobs": top}]} if self.server.tells else None
        self.send(completion(body, "m", logprobs=logprobs))


def replies(texts):
    return [
        Reply(row.id, "quality", row.instruction, text, "stop", 0, 0)
        for row, text in zip(REFERENCES, texts, strict=False)
    ]


def test_the_win_rate_is_the_annotators_preference_whatever_the_order_it_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", "sk-canary-2718281828")
    # Nine good replies, one that is the reference's own, two that are neither.
    texts = ["a good one"] * 9 + [REFERENCES[9].output, "it is", "it is not"]
    annotator = Annotator()
    with annotator as server:
        found = quality.annotate(REFERENCES, replies(texts), CONFIG, server, tmp_path, {"commit": "x"})
        asked = len(annotator.seen)
        again = quality.annotate(REFERENCES, replies(texts), CONFIG, server, tmp_path, {"commit": "x"})
    assert again == found
    assert len(annotator.seen) == asked == 11  # Not of equal answers, and nothing twice.
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["preference"] for item in items] == pytest.approx([0.9] * 9 + [0.5] * 3)
    assert found["win_rate"]["value"] == pytest.approx((9 * 0.9 + 3 * 0.5) / 12)
    assert found["win_rate"]["n"] == 12
    assert (found["annotator_model"], found["reference"], found["unreadable"]) == ("inert", "somebody", 0)
    # Both orders were shown, or the annotator's taste for the first would count.
    firsts = ["good" in body["messages"][-1]["content"].split('"M"')[0] for _, _, body in annotator.seen]
    assert {*firsts} == {True, False}
    path, key, body = annotator.seen[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sk-canary-2718281828", "inert")
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"sk-canary" in file.read_bytes()]
    # What the regression needs is on the hub.
    assert found["length_controlled_win_rate"]["n"] == 0
    assert "length-controlled" in found["note"]


def test_answers_without_what_the_annotator_is_read_by_are_counted_and_leave_n(tmp_path):
    with Annotator(tells=False) as server:
        found = quality.annotate(REFERENCES[:4], replies(["a good one"] * 4), CONFIG, server, tmp_path, {})
    assert found["unreadable"] == 4
    assert found["win_rate"] == {"value": None, "low": None, "high": None, "n": 0}


def test_annotators_that_there_are_not_and_servers_that_cannot_be_asked_are_refused():
    server = Server(urls=["http://127.0.0.1:9/v1"], model="inert")
    with pytest.raises(UserError, match=r"nobody.*weighted_alpaca_eval_gpt4_turbo"):
        quality.annotator_config("nobody", None)
    with pytest.raises(UserError, match="one address"):
        quality.annotator_config(CONFIG, Server(urls=["http://a/v1", "http://b/v1"], model="inert"))
    with pytest.raises(UserError, match="does not speak OpenAI's protocol"):
        quality.annotator_config("claude", server)


def test_an_annotator_that_does_not_answer_is_the_users_to_see_to(tmp_path):
    server = Server(urls=["http://127.0.0.1:9/v1"], model="inert", retries=0, timeout_s=2)
    with pytest.raises(UserError, match=r"evaluate\.quality\.annotator"):
        quality.annotate(REFERENCES[:2], replies(["x", "y"]), CONFIG, server, tmp_path, {})


def test_the_length_controlled_win_rate_takes_out_what_length_alone_has_won(tmp_path, monkeypatch):
    """With a table of the form that alpaca_eval reads from the hub, in the hub's cache."""
    place = tmp_path / "datasets--tatsu-lab--alpaca_eval"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    lines = ["index,preference,model,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, length in (("short", 1.0), ("long", -1.0)):
        lines += [f"{k},{0.4 - 0.1 * length},{model},{length},{(k % 5 - 2) / 4},False" for k in range(60)]
    (place / "snapshots" / "abc" / "df_gamed.csv").write_text("\n".join(lines))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    rows = []
    for k in range(60):
        longer = k % 4 / 3  # Up to twice as long, and liked for that alone.
        rows.append(
            {
                "instruction": f"Explain <matter {k}>.",
                "output_1": "x" * 100,
                "output_2": "x" * int(100 * (1 + longer)),
                "generator_1": "reference",
                "generator_2": "model",
                "annotator": "annotator",
                "preference": 1.5 + 0.4 * longer,
            }
        )
    raw = sum(row["preference"] - 1 for row in rows) / len(rows)
    found, note = quality._length_controlled(rows)
    assert note == ""
    assert found.n == 60
    assert 0.5 < found.value < raw - 0.05
    assert (found.low, found.high) == (None, None)
