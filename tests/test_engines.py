import json
import os
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from test_server import Speaker
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    RwkvConfig,
)

from tasft.data.rows import Prompt
from tasft.models import local
from tasft.models.engine import Reply, Sampling, collect, requests_for
from tasft.models.generation import common_beginning
from tasft.models.load import load_model
from tasft.models.local import TransformersEngine
from tasft.models.server import ServerEngine
from tasft.models.server_settings import Server
from tasft.run import launch

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


@pytest.mark.parametrize("worth", [0, 10**6])
def test_mean_losses_are_those_of_one_row_at_a_time(monkeypatch, worth, engine):
    monkeypatch.setattr(local, "_WORTH", worth)
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


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=0.8, top_p=0.9)])
def test_a_reply_bears_the_loss_that_is_measured_of_it(sampling):
    engine = TransformersEngine(tiny_model(tied=False), tiny_tokenizer(), "chat")
    # Letters that are the same tokens however they come together.
    others = torch.full((SIZES["vocab_size"],), -1e4)
    others[engine.tokenizer.convert_tokens_to_ids(["!", "a"])] = 0
    engine.model.get_output_embeddings().register_forward_hook(lambda *args: args[2] + others)
    requests = requests_for(PROMPTS, samples=4)
    told = [reply for batch in engine.generate(requests, sampling, "s") for reply in batch]
    bare = [replace(reply, loss=None) for reply in told]
    compared = [
        (reply.loss, measured)
        for reply, measured in zip(told, engine.mean_losses(bare), strict=True)
        if reply.loss is not None
    ]
    assert len(compared) == len(told)
    assert len({round(measured, 4) for _, measured in compared}) > 5
    assert [loss for loss, _ in compared] == pytest.approx([measured for _, measured in compared], abs=1e-4)


def test_a_reply_that_is_not_read_as_the_tokens_that_were_drawn_bears_no_loss(engine):
    request = requests_for(PROMPTS)[0]
    ids = engine._ids(request.prompt, "")

    def loss(*tokens):
        return engine._reply(request, "s", ids, len(ids), local._Drawn(list(tokens), "length", 2.0), 0).loss

    word = engine.tokenizer("no", add_special_tokens=False).input_ids
    assert loss(*word) == 2.0
    assert loss(*word, engine.tokenizer.pad_token_id) is None  # A mark that is not shown.
    assert loss(*engine.tokenizer("no \n", add_special_tokens=False).input_ids) is None


def test_no_loss_is_known_of_a_prefix_nor_given_another_prompt(engine):
    begun = [reply for batch in engine.generate(requests_for(PROMPTS, prefix="I "), DRAWN, "s") for reply in batch]
    assert {reply.loss for reply in begun} == {None}
    reply = Reply("a", "s", "What?", "Water.", "stop", 0, 0, loss=1.5)
    assert reply.to("What else?") == replace(reply, prompt="What else?", loss=None)


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


# --- Batches that shrink ----------------------------------------------------------------------

SIZES = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
IN_TURN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
# What each carries from step to step.
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral, a window of 6": MistralConfig(**SIZES, sliding_window=6),
    "gemma3, windows of 8 and none": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8, layer_types=IN_TURN),
    # Wider than what the sharing of a beginning is tried on.
    "gpt-neo, windows of 40 and none": GPTNeoConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=40,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    ),
    "lfm2, convolutions": Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "rwkv, a state of its own": RwkvConfig(
        vocab_size=SIZES["vocab_size"], hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=0
    ),
}
LENGTHS = (3, 17, 9, 9, 5, 21, 12, 4, 30, 7, 7, 2)


def ending(model, share=25):
    """The model with random logits, of which every so many-th token ends a reply: some end at once, some never."""
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))
    model.generation_config.eos_token_id = list(range(0, SIZES["vocab_size"], share))
    model.generation_config.pad_token_id = 0
    return model.double().eval()


def prompts_of(lengths=LENGTHS):
    chance = torch.Generator().manual_seed(2)
    return [torch.randint(4, SIZES["vocab_size"], (length,), generator=chance).tolist() for length in lengths]


def drawn(engine, prompts, sampling):
    """Tokens and ends of replies."""
    return [each[:2] for each in engine._generate(prompts, sampling, 3)]


def both_ways(model, sampling, monkeypatch):
    """What the engine says, what transformers' own loop says, and the rows of each forward pass of the first."""
    engine = TransformersEngine(model, tiny_tokenizer(), "chat")
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ours = drawn(engine, prompts_of(), sampling)
    hook.remove()
    monkeypatch.setattr(local, "_shrinking", None)
    return ours, drawn(engine, prompts_of(), sampling), sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_replies_are_those_of_transformers_own_loop(family, monkeypatch):
    torch.manual_seed(0)
    model = ending(AutoModelForCausalLM.from_config(FAMILIES[family]))
    ours, theirs, sizes = both_ways(model, Sampling(40), monkeypatch)
    assert ours == theirs
    finishes = [finish for _, finish in ours]
    assert "stop" in finishes
    assert sizes == sorted(sizes, reverse=True)
    # A state that is no cache cannot be cut: the batch stays whole.
    assert (sizes[-1] < len(LENGTHS)) == (not family.startswith("rwkv"))


BEGINNING = [7, 11, 5, 23, 9, 31]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3, a window of 64"])
def test_a_beginning_that_prompts_share_is_read_once_where_that_changes_nothing(family, monkeypatch):
    torch.manual_seed(0)
    wide = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=64, layer_types=IN_TURN)
    model = ending(AutoModelForCausalLM.from_config(FAMILIES.get(family, wide)))
    prompts = [BEGINNING + row for row in prompts_of()]
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine = TransformersEngine(model, tiny_tokenizer(), "chat")
    drawn(engine, prompts, Sampling(20))  # It is tried once.
    read.clear()
    ours = drawn(engine, prompts, Sampling(20))
    hook.remove()
    shares = family in ("llama", "qwen3", "gemma3, a window of 64")
    first = (1, len(BEGINNING)) if shares else (len(prompts), len(BEGINNING) + max(LENGTHS))
    assert read[0] == first
    assert not shares or read[1] == (len(prompts), max(LENGTHS))
    monkeypatch.setattr(local, "_WORTH", 10**6)
    assert ours == drawn(engine, prompts, Sampling(20))
    monkeypatch.setattr(local, "_shrinking", None)
    assert ours == drawn(engine, prompts, Sampling(20))


def test_many_samples_of_one_prompt_read_it_once(monkeypatch):
    prompts, sampling = [BEGINNING] * 12, Sampling(6, temperature=1.0)
    engine = TransformersEngine(ending(tiny_model(tied=False)), tiny_tokenizer(), "chat")
    monkeypatch.setattr(local, "_WORTH", 10**6)
    plain = drawn(engine, prompts, sampling)
    monkeypatch.setattr(local, "_WORTH", 0)
    assert engine._shared(prompts, sampling.max_new_tokens) == len(BEGINNING) - 1
    assert drawn(engine, prompts, sampling) == plain
    assert len({tuple(tokens) for tokens, _ in plain}) > 1


@pytest.mark.parametrize(
    ("rows", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 4]], 1), ([[1, 2], [1, 2]], 1), ([[1], [2]], 0), ([[1, 2, 3]], 0)],
)
def test_the_last_token_of_a_prompt_is_never_shared(rows, shared):
    assert common_beginning(rows) == shared


def test_replies_with_an_adapter_are_those_of_transformers_own_loop(monkeypatch):
    model = get_peft_model(tiny_model(tied=False), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(4))
    ending(model)
    with model.disable_adapter():
        without = drawn(TransformersEngine(model, tiny_tokenizer(), "chat"), prompts_of(), Sampling(40))
    ours, theirs, _ = both_ways(model, Sampling(40), monkeypatch)
    assert ours == theirs != without


def test_draws_are_those_of_transformers_while_no_row_leaves(monkeypatch):
    monkeypatch.setattr(local, "STAY", 0)
    # Out of a nucleus they are drawn otherwise: test_generation.py has it.
    sampling = Sampling(20, temperature=1.3)
    ours, theirs, sizes = both_ways(ending(tiny_model(tied=False), share=50), sampling, monkeypatch)
    assert ours == theirs
    assert set(sizes) == {len(LENGTHS)}
    assert {finish for _, finish in ours} == {"stop", "length"}


def test_rows_leave_when_a_quarter_has_ended(monkeypatch):
    _, _, sizes = both_ways(ending(tiny_model(tied=False)), Sampling(40), monkeypatch)
    left = sorted(set(sizes), reverse=True)
    assert len(left) > 2
    assert all(after <= 0.75 * before for before, after in pairwise(left))
    assert sum(sizes) < 0.75 * len(sizes) * len(LENGTHS)


def test_weights_that_are_spread_are_gathered_by_all_processes_in_step(engine, monkeypatch):
    # Each would wait for ever for one that has another batch, or fewer tokens to go.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(local, "_shrinking", None)
    whole = replies(engine, Sampling(6))
    assert sorted(whole) == sorted(prompt.id for prompt in PROMPTS)
    assert len(engine.complete(["a", "b"], Sampling(6))) == 2
    assert len(engine.mean_losses(list(whole.values()))) == len(PROMPTS)


# --- Text and messages as they stand ----------------------------------------------------------


def test_completions_come_in_the_order_of_the_prompts(engine):
    words = ["The " + "river " * (7 * index % 5) for index in range(9)]
    found = engine.complete(words, Sampling(6))
    alone = TransformersEngine(engine.model, engine.tokenizer, "alpaca", batch_size=1)
    assert [text for word in words for text in alone.complete([word], Sampling(6))] == found
    for word, text in zip(words, found, strict=True):
        ids = torch.tensor([engine.tokenizer(word).input_ids])
        output = engine.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert engine.tokenizer.decode(output, skip_special_tokens=True) == text
    assert engine.complete([], Sampling(6)) == []


def test_messages_are_written_by_the_chat_template(engine):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    written = "<|system|>Be brief.<|end|>\n<|user|>Why?<|end|>\n<|assistant|>"
    mixed = engine.complete([asked, "The river", written], Sampling(6))
    assert mixed[0] == mixed[2] != mixed[1]


def test_the_seed_decides_what_is_completed(engine):
    one, again, other = (engine.complete(["The river"] * 3, Sampling(6, 1.0, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 3


def test_text_begins_once_with_the_first_token(engine):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|system|>"
    first, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", first), ("<|end|>", end)]
    )
    reader = TransformersEngine(engine.model, tokenizer, "chat")
    letters = tokenizer("ab", add_special_tokens=False).input_ids
    assert reader._read("ab") == reader._read("<|system|>ab") == [first, *letters]
    assert reader._read("<|system|>ab<|end|>") == [first, *letters, end]


# --- Several processes ------------------------------------------------------------------------

RANK = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from conftest import tiny_tokenizer
from test_engines import DRAWN, PROMPTS
from tasft.models.engine import collect, requests_for
from tasft.models.local import TransformersEngine
from tasft.models.server import ServerEngine
from tasft.models.server_settings import Server
from tasft.core.ranks import joined
from tasft.models.load import load_model

tiny, url, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
with joined():
    model = load_model(tiny)
    engine = TransformersEngine(model, tiny_tokenizer(), "chat", batch_size=4)
    engine.complete(["a", "b"], DRAWN)  # Once it is tried whether prompts can be answered together.
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    here = collect(engine, requests_for(PROMPTS), DRAWN, folder / "here.jsonl", "s")
    losses = engine.mean_losses(here)
    texts = engine.complete([prompt.prompt for prompt in PROMPTS], DRAWN)
    asker = ServerEngine(Server(urls=[url], model="m", concurrency=4))
    there = collect(asker, requests_for(PROMPTS), DRAWN, folder / "there.jsonl", "s")
    told = {"here": [asdict(reply) for reply in here], "losses": losses, "texts": texts, "passes": len(passes)}
    told["there"] = [asdict(reply) for reply in there]
    (folder / f"rank {os.environ['RANK']}.json").write_text(json.dumps(told))
"""


def test_processes_share_the_work_and_all_have_the_same_as_one(tiny, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    (tmp_path / "rank.py").write_text(RANK)
    with Speaker(delay=lambda: 0.02) as server:
        there = collect(
            ServerEngine(Server(urls=[server.url], model="m")),
            requests_for(PROMPTS),
            DRAWN,
            tmp_path / "one.jsonl",
            "s",
        )
        server.seen.clear()
        server.most = 0
        command = [sys.executable, str(tmp_path / "rank.py"), str(tiny), server.url, str(tmp_path)]
        assert launch.launch(command, "ddp", 2) == 0
        assert list(server.asked.values()) == [1] * len(PROMPTS)
        assert server.most <= 4
    engine.complete(["a", "b"], DRAWN)
    passes = []
    hook = engine.model.register_forward_pre_hook(lambda *_: passes.append(1))
    here = collect(engine, requests_for(PROMPTS), DRAWN, tmp_path / "alone.jsonl", "s")
    losses = engine.mean_losses(here)
    texts = engine.complete([prompt.prompt for prompt in PROMPTS], DRAWN)
    hook.remove()
    first, second = (json.loads((tmp_path / f"rank {rank}.json").read_text()) for rank in (0, 1))
    assert 0 < first["passes"] < len(passes)
    assert first["passes"] + second["passes"] == len(passes)
    for told in (first, second):
        assert told["here"] == [asdict(reply) | {"loss": pytest.approx(reply.loss)} for reply in here]
        assert told["there"] == [asdict(reply) for reply in there]
        assert told["texts"] == texts
        assert told["losses"] == pytest.approx(losses)
    shared, alone = (
        [json.loads(line) | {"loss": None} for line in (tmp_path / name).read_text().splitlines()]
        for name in ("here.jsonl", "alone.jsonl")
    )
    assert shared == alone
    rows = [json.loads(line) for line in (tmp_path / "there.jsonl").read_text().splitlines()]
    assert sorted(rows, key=lambda row: row["id"]) == sorted(first["there"], key=lambda row: row["id"])
