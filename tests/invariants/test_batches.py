"""The gradient of an optimizer step does not depend on how its rows are laid out."""

from dataclasses import replace

import pytest
import torch
from conftest import CHAT, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from tasft import TASFTConfig, TASFTTrainer
from tasft.data.rows import Example
from tasft.loss import PENALTIES

IMITATE = [Example(f"Say {word}?", f"{word} it is" + "!" * 2 * index, True) for index, word in enumerate("abcdefghi")]
AVOID = [Example(f"Do {word}?", f"sure, {word}" + "." * 3 * index, False) for index, word in enumerate("xyz")]
ROWS = IMITATE + AVOID
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MODELS = {
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gemma": GemmaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
}
TOKENIZER = tiny_tokenizer()


def build(name):
    torch.manual_seed(0)
    config = MODELS[name]
    config.vocab_size = len(TOKENIZER)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def settings(folder, **others):
    usual = {"report_to": "none", "use_cpu": True, "kl_rows": 0, "disable_tqdm": True}
    return TASFTConfig(output_dir=str(folder), **usual, **others)


def trainer(folder, model="llama-tied", rows=ROWS, **others):
    return TASFTTrainer(build(model), settings(folder, **others), rows, processing_class=TOKENIZER)


def gradient(subject, batches):
    """Of one optimizer step made of these micro-batches."""
    subject.model.zero_grad()
    collated = [subject.data_collator(batch) for batch in batches]
    counts = subject._get_num_items_in_batch(collated, torch.device("cpu"))
    for batch in collated:
        subject.compute_loss(subject.model, batch, num_items_in_batch=counts).backward()
    return torch.cat([p.grad.flatten() for p in subject.model.parameters() if p.grad is not None])


def same(one, other, atol=1e-10):
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(other, one, atol=atol, rtol=0)


@pytest.mark.parametrize("normalization", ["per_group", "shared"])
@pytest.mark.parametrize("penalty", [*PENALTIES])
def test_cutting_padding_and_order_change_nothing(tmp_path, penalty, normalization):
    asked = {"penalty": penalty, "normalization": normalization}
    subject = trainer(tmp_path, **asked)
    rows = subject.train_dataset
    whole = gradient(subject, [rows])
    same(whole, gradient(subject, [[row] for row in rows]))
    # Imitate and avoid rows apart, so that some micro-batches lack one kind.
    same(whole, gradient(subject, [rows[:4], rows[4:9], rows[9:]]))
    same(whole, gradient(subject, [rows[start::4][::-1] for start in range(4)]))
    packed = trainer(tmp_path, padding_free=True, **asked)
    rows = packed.train_dataset
    assert packed.data_collator(rows)["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    same(whole, gradient(packed, [rows]))
    same(whole, gradient(packed, [rows[:5][::-1], rows[5:]]))


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("model", [*MODELS])
def test_it_holds_for_models_of_other_shapes(tmp_path, model, padding_free):
    whole = gradient(trainer(tmp_path, model), [trainer(tmp_path, model).train_dataset])
    subject = trainer(tmp_path, model, padding_free=padding_free)
    rows = subject.train_dataset
    # The norms of Gemma add up the gradient of their weights in float32; 6e-9 was seen.
    same(whole, gradient(subject, [rows[:3], rows[3:7], rows[7:]]), atol=1e-7 if model == "gemma" else 1e-10)


BEGINNING = "In a few words, and as one who knows: "


@pytest.mark.parametrize("penalty", [*PENALTIES])
@pytest.mark.parametrize("model", ["llama-tied", "qwen"])
def test_a_beginning_that_stands_once_changes_nothing(tmp_path, model, penalty):
    rows = [replace(row, prompt=BEGINNING + row.prompt) for row in ROWS]
    padded = trainer(tmp_path, model, rows, penalty=penalty)
    subject = trainer(tmp_path, model, rows, penalty=penalty, padding_free=True)
    rows = subject.train_dataset
    batch = subject.data_collator(rows)
    assert batch["input_ids"].shape[1] < sum(len(row["input_ids"]) for row in rows) - len(BEGINNING) * (len(rows) - 1)
    whole = gradient(padded, [padded.train_dataset])
    # The gradients of all rows come together before they go through norms in float32; 7e-8 was seen.
    same(whole, gradient(subject, [rows]), atol=3e-7)
    same(whole, gradient(subject, [rows[:4], rows[4:][::-1]]), atol=3e-7)


SHORT = {name: SHAPE[name] for name in ("hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")}
HYBRID = {**SHAPE, "layer_types": ["conv", "full_attention"], "initializer_range": 0.15}
READERS = {
    "window": (lambda: MistralConfig(**SHAPE, sliding_window=256), "end_to_end"),  # Below max_length.
    "eager": (lambda: MistralConfig(**SHAPE, attn_implementation="eager"), "end_to_end"),
    "no positions": (lambda: OPTConfig(**SHORT, ffn_dim=48, num_attention_heads=4, num_hidden_layers=2), "padded"),
    "convolutions": (lambda: Lfm2Config(**HYBRID), "padded"),
    "states": (lambda: MambaConfig(**SHORT, num_hidden_layers=1), "padded"),
}


@pytest.mark.parametrize("name", [*READERS])
def test_rows_are_laid_out_as_the_model_keeps_them_apart(tmp_path, capsys, name):
    rows = [replace(row, prompt=BEGINNING + row.prompt) for row in ROWS]
    made, layout = READERS[name]
    config = made()
    config.vocab_size = len(TOKENIZER)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    subject = TASFTTrainer(model, settings(tmp_path, padding_free=True), rows, processing_class=TOKENIZER)
    lengths = [len(row["input_ids"]) for row in subject.train_dataset]
    shape = (len(rows), max(lengths)) if layout == "padded" else (1, sum(lengths))
    assert subject.data_collator(subject.train_dataset)["input_ids"].shape == shape
    assert ("they are padded" in capsys.readouterr().err) == (layout == "padded")


@pytest.mark.parametrize("penalty", [*PENALTIES])
def test_a_row_of_weight_two_counts_as_two(tmp_path, penalty):
    heavy = [replace(row, weight=2.0) if index in (1, 10) else row for index, row in enumerate(ROWS)]
    twice = [*ROWS, ROWS[1], ROWS[10]]
    one, other = (trainer(tmp_path, rows=rows, penalty=penalty) for rows in (heavy, twice))
    same(gradient(one, [one.train_dataset]), gradient(other, [other.train_dataset]))
    parts = [one.train_dataset[:5], one.train_dataset[5:]]
    same(gradient(one, parts), gradient(other, [other.train_dataset]))


def test_all_turns_of_a_talk_are_one_response(tmp_path):
    """What a per-response penalty averages over, and counts once."""
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    row = Example(talk[:3], talk[3:], False)
    subject = trainer(tmp_path, rows=[*IMITATE, row], penalty="nlcl", turns="all")
    batch = subject.data_collator(subject.train_dataset)
    assert TOKENIZER.chat_template == CHAT
    subject.compute_loss(subject.model, batch)
    assert subject._terms["penalty"].count == 1
    assert subject._get_num_items_in_batch([batch], torch.device("cpu"))[:4].tolist()[1:] == [2, 1, 9]


def test_nothing_to_count_of_a_kind_gives_a_gradient_of_the_other(tmp_path):
    subject = trainer(tmp_path, penalty="emd_hinge")
    rows = subject.train_dataset
    imitate, avoid = gradient(subject, [rows[:9]]), gradient(subject, [rows[9:]])
    same(gradient(subject, [rows]), imitate + avoid)
