import json

import pytest
import torch
from conftest import tiny_tokenizer

from tasft.data import Prompt
from tasft.engines import Reply, Sampling, TransformersEngine, collect, requests_for
from tasft.model import load_model

PROMPTS = [Prompt(f"p{index}", "What about " + "this " * (index % 5) + f"{index}?") for index in range(11)]
DRAWN = Sampling(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def engine(tiny):
    return TransformersEngine(load_model(str(tiny)), tiny_tokenizer(), "chat", batch_size=4)


def replies(engine, sampling, done=()):
    return {reply.id: reply for batch in engine.generate(requests_for(PROMPTS), sampling, "s", done) for reply in batch}


def test_every_request_is_answered_once_and_the_seed_decides(engine):
    first = replies(engine, DRAWN)
    assert sorted(first) == sorted(prompt.id for prompt in PROMPTS)
    assert replies(engine, DRAWN) == first
    other = replies(engine, Sampling(6, 1.0, 0.9, seed=6))
    assert [reply.completion for reply in other.values()] != [reply.completion for reply in first.values()]


def test_what_was_done_does_not_change_the_rest(engine):
    whole = replies(engine, DRAWN)
    done = ["p0", "p7", "p10"]
    rest = replies(engine, DRAWN, done)
    assert rest == {name: reply for name, reply in whole.items() if name not in done}


def test_greedy_replies_in_a_batch_are_those_of_each_prompt_alone(engine):
    greedy = Sampling(6)
    together = replies(engine, greedy)
    alone = TransformersEngine(engine.model, engine.tokenizer, "chat", batch_size=1)
    assert {name: reply.completion for name, reply in replies(alone, greedy).items()} == {
        name: reply.completion for name, reply in together.items()
    }


def test_a_reply_begins_with_the_prefix_it_was_given(engine):
    requests = requests_for(PROMPTS, prefix="I will not.", mark="-a")
    for batch in engine.generate(requests, DRAWN, "s"):
        for reply in batch:
            assert reply.completion.startswith("I will not.")
            assert len(reply.completion) > len("I will not.")


def test_finish_says_whether_the_model_ended(engine):
    assert {reply.finish for reply in replies(engine, DRAWN).values()} <= {"stop", "length"}
    weight = engine.model.get_output_embeddings().weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            # Every other token's score is 0, the end token's is the hidden state's own square.
            weight.zero_()
        ended = replies(engine, Sampling(3))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    # All scores are equal: greedy takes token 0, which is the end token.
    assert {(reply.completion, reply.finish) for reply in ended.values()} == {("", "stop")}


def test_the_global_random_state_is_left_alone(engine):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    replies(engine, DRAWN)
    assert torch.rand(1) == expected


def test_mean_losses_are_those_of_one_row_at_a_time(engine):
    texts = ["a", "river of letters", "", "no"]
    rows = [Reply(str(i), "s", "Why?" * (i + 1), text, "stop", 0, 0) for i, text in enumerate(texts)]
    losses = engine.mean_losses(rows)
    for reply, loss in zip(rows, losses, strict=True):
        prompt = engine._ids(reply.prompt, "")
        tokens = engine.tokenizer(reply.completion, add_special_tokens=False).input_ids
        if not tokens:
            assert loss == 0
            continue
        logits = engine.model(input_ids=torch.tensor([prompt + tokens])).logits[0]
        scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = -scores.gather(1, torch.tensor(tokens)[:, None]).mean()
        assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_collect_takes_up_where_it_was_cut(engine, tmp_path):
    path = tmp_path / "replies.jsonl"
    whole = collect(engine, requests_for(PROMPTS), DRAWN, tmp_path / "whole.jsonl", "s")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    # Killed in the middle of writing the sixth reply.
    path.write_text("".join(lines[:5]) + lines[5][:20])
    assert collect(engine, requests_for(PROMPTS), DRAWN, path, "s") == whole
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(PROMPTS)
    assert "".join(lines[:5]) == "".join(path.read_text().splitlines(keepends=True)[:5])


def test_sets_in_one_file_do_not_mix(engine, tmp_path):
    path = tmp_path / "replies.jsonl"
    collect(engine, requests_for(PROMPTS[:3]), DRAWN, path, "one")
    two = collect(engine, requests_for(PROMPTS[:3], mark="-two"), DRAWN, path, "two")
    assert {reply.set for reply in two} == {"two"}
    assert len(path.read_text().splitlines()) == 6
