"""Whatever a model's files say, what is done is what was asked: replies are drawn by `Sampling`, rows say their words.

`HYPOTHESIS_PROFILE=long pytest tests/faults/test_fuzz_models.py` searches for minutes instead of seconds.
"""

import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_encode import spans
from test_fuzz import fuzz
from test_generation import SAID, speaking, told
from transformers import GenerationConfig

from tasft.core.errors import UserError
from tasft.data.encode import Encoding, encode_rows
from tasft.data.rows import Example
from tasft.models.engine import Sampling
from tasft.models.local import TransformersEngine

NAMES = sorted({name for said in SAID for name in said} | {"top_h", "diversity_penalty", "assistant_early_exit"})
NUMBERS = st.integers(-2, 400) | st.floats(-3, 9) | st.booleans() | st.none()
ODD = NUMBERS | st.lists(st.integers(0, 340), max_size=3) | st.text(max_size=3)
CONFIGS = st.lists(st.sampled_from(SAID), max_size=4).map(lambda some: {k: v for one in some for k, v in one.items()})


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(speaking(), tiny_tokenizer(), "chat")


@pytest.fixture(scope="module")
def wanted(engine):
    return [told(engine, sampling) for sampling in SAMPLINGS]


SAMPLINGS = (Sampling(6), Sampling(6, 1.0, seed=3))


@fuzz
@given(known=CONFIGS, odd=st.dictionaries(st.sampled_from(NAMES), ODD, max_size=3))
def test_no_generation_config_changes_a_reply(engine, wanted, known, odd):
    config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    for name, value in (known | odd).items():
        setattr(config, name, value)  # Past its own checks: a file may hold anything.
    kept, engine.model.generation_config = engine.model.generation_config, config
    try:
        assert [told(engine, sampling) for sampling in SAMPLINGS] == wanted
    finally:
        engine.model.generation_config = kept


# Such words stand nowhere in a template.
WORDS = st.text("zQe .", max_size=12).map(lambda text: "zQ" + text)
CONTENT = st.sampled_from(["", " | trim", " | upper", " | replace('e', '')", " | truncate(3, true, '')", " | reverse"])
TEMPLATES = st.builds(
    (
        "{{{{ '{start}' }}}}{{% for m in messages %}}{{% if m.role != '{skipped}' %}}<|{{{{ m.role }}}}|>{between}"
        "{{{{ m.content{content} }}}}{tail}{{% endif %}}{{% endfor %}}"
        "{{% if add_generation_prompt %}}<|assistant|>{between}{{% endif %}}"
    ).format,
    start=st.sampled_from(["", "a", "<|system|>a<|end|>"]),
    skipped=st.sampled_from(["none", "system"]),
    between=st.sampled_from(["", " ", "\n", "a"]),
    content=CONTENT,
    tail=st.sampled_from(["<|end|>", " <|end|>", "<|end|>\n", "\n<|end|>", "\n", ""]),
)


@fuzz
@given(template=TEMPLATES, system=st.none() | WORDS, prompt=WORDS, reply=WORDS, label=st.booleans())
def test_a_row_is_learned_as_it_is_or_what_is_missing_is_told(template, system, prompt, reply, label):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    asked = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    row = Example(asked, [{"role": "assistant", "content": reply}], label)
    try:
        (encoded,), report = encode_rows([row], tokenizer, Encoding())
    except UserError:
        return
    if report.notes:
        return
    text = "".join(spans(encoded, tokenizer)).replace("<|end|>", "")
    assert text.strip() == reply.strip()
    # What the template writes between reply and end is not the model's.
    assert label or text.endswith((" ", "\n")) <= reply.endswith((" ", "\n"))
    whole = tokenizer.decode(encoded["input_ids"])
    assert all(said.strip() in whole for said in (system or "", prompt))
