"""Whatever a file holds, reading it ends in rows or in sentences: never in a traceback, never in a changed file.

`HYPOTHESIS_PROFILE=long pytest tests/faults/test_fuzz.py --timeout 0` searches for minutes instead of seconds.
"""

import gzip
import json
import os
from contextlib import suppress
from copy import deepcopy

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.data.rows import example_of, read_examples, read_prompts
from tasft.evaluate import judge_quality
from tasft.evaluate.jailbreak import read_templates
from tasft.evaluate.references import read_references
from tasft.run import recipe_file, sweep

EXAMPLES = 5000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 60
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

GOOD = {
    "name": "small",
    "seed": 1,
    "model": {"base": "somewhere", "lora": {"r": 2, "target_modules": ["q_proj"]}},
    "data": {"toxic_prompts": "demo-toxic-harvest", "benign_prompts": "demo-benign-train"},
    "harvest": {"judge": "refusal_matching", "temperature": 0.7},
    "train": {"max_steps": 3, "learning_rate": "1e-4"},
    "evaluate": {"sets": {"toxic": {"source": "demo-toxic-heldout", "kind": "toxic"}}, "judges": ["refusal_matching"]},
}
SWEEP = {"name": "grid", "base": "good.yaml", "grid": {"train.penalty": ["emd", "nlcl"]}, "seeds": [1, 2]}
ROWS = [
    {"id": "a", "prompt": "What?", "completion": "That.", "label": True},
    {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "That."}]},
    {"instruction": "Name it.", "input": "this", "output": "It.", "weight": 2},
]

# What YAML reads otherwise than it looks, and what is awkward in a path, a name or a number.
ODD = st.sampled_from(
    [
        *(
            None,
            True,
            "",
            " ",
            "~",
            "yes",
            "no",
            "on",
            "1e3",
            ".nan",
            ".inf",
            "0x1F",
            "1_000",
            "12:30:45",
            "2024-99-99",
        ),
        *("<<", "=", "*a", "&a", "!!set", "../up", "a/b", "a\0b", "\ud800", "\u2028", "\ufeff", "x" * 300, "{}", "[]"),
        *(0, -1, 2**31, 2**64, 10**400, 1.5, float("nan"), float("inf"), -0.0, [], {}, [[]], [None], {"": None}),
    ]
)
VALUES = st.recursive(
    ODD | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Where each value within a value is."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def nearly(draw, good):
    """Something good of which one to three places hold something else, or are gone, or have company."""
    value = deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        what = draw(st.sampled_from(["other", "gone", "more"]))
        if what == "other":
            inner[path[-1]] = deepcopy(draw(VALUES))
        elif what == "gone":
            del inner[path[-1]]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=6))] = deepcopy(draw(VALUES))
        else:
            inner.append(deepcopy(draw(VALUES)))
    return value


@st.composite
def torn(draw, texts):
    """Bytes of a text of which some are gone, doubled, or others."""
    content = draw(texts).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 12))
        what = draw(st.sampled_from([b"", content[at : at + length] * 2]) | st.binary(max_size=4))
        content = content[:at] + what + content[at + length :]
    return content


def as_yaml(values):
    return values.map(lambda value: yaml.dump(value, allow_unicode=True))


def as_jsonl(rows):
    return rows.map(lambda value: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value))


SYNTAX = st.text(alphabet="{}[]:,-#&*!|>%@`\"'\\ \n\tab1.~<=?", max_size=60)
TABLES = st.text(alphabet=',;"\n\r\tab \\', max_size=60).map(lambda text: "prompt,completion\n" + text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(GOOD))
    return tmp_path


def ends_well(folder, name, content, *reads):
    """Each reader gives something or sentences, and leaves every file as it was."""
    (folder / name).write_bytes(content)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for read in reads:
        faults = ["none"]
        try:
            read(str(folder / name))
        except UserError as error:
            faults = error.faults
        assert faults
        assert all(isinstance(fault, str) and 0 < len(fault) < 5000 for fault in faults)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@fuzz
@given(content=torn(as_yaml(nearly(GOOD)) | SYNTAX) | st.binary(max_size=80))
def test_any_recipe_is_read_or_refused(folder, content):
    ends_well(folder, "recipe.yaml", content, recipe_file.load, recipe_file.is_sweep)


@fuzz
@given(value=nearly(GOOD))
def test_a_recipe_that_is_read_can_be_written_and_read_again(folder, value):
    (folder / "recipe.yaml").write_text(yaml.dump(value, allow_unicode=True), errors="surrogatepass")
    try:
        spec = recipe_file.load("recipe.yaml")
    except UserError:
        return
    provenance.atomic_write_text(folder / "again.yaml", recipe_file.dump(spec))
    assert provenance.content_hash(recipe_file.load("again.yaml").model_dump()) == provenance.content_hash(
        spec.model_dump()
    )


@fuzz
@given(
    field=st.sampled_from(["train.max_steps", "model", "evaluate.sets.toxic", "name", "", "a.b.c"]), value=SYNTAX | ODD
)
def test_any_override_is_taken_or_refused(folder, field, value):
    ends_well(folder, "other.yaml", b"", lambda _: recipe_file.load("good.yaml", [f"{field}={value}"]))


@fuzz
@given(content=torn(as_yaml(nearly(SWEEP)) | SYNTAX))
def test_any_sweep_file_is_read_or_refused(folder, content):
    ends_well(folder, "sweep.yaml", content, sweep.load)


@fuzz
@given(
    content=torn(as_jsonl(nearly(ROWS)) | nearly(ROWS).map(json.dumps) | TABLES | SYNTAX) | st.binary(max_size=80),
    name=st.sampled_from(["rows.jsonl", "rows.json", "rows.csv"]),
    packed=st.booleans(),
)
def test_any_file_of_rows_is_read_or_refused(folder, content, name, packed):
    if packed:
        content, name = gzip.compress(content, 1)[: -1 if content[:1] == b"{" else None], f"{name}.gz"

    def labelled(source):
        judge_quality.read_pairs(folder / name, label_column="label")

    def templates(source):
        read_templates(source, "a")

    def pairs(source):
        judge_quality.read_pairs(folder / name)

    readers = (read_prompts, read_examples, read_references, templates, pairs, labelled)
    ends_well(folder, name, content, *readers)


TYPED = st.sampled_from(
    ["true", "False", "", "1.5", "nan", np.True_, np.float32(2), np.int64(1), np.nan, np.array([1, 2])]
)
PARTS = st.lists(
    st.dictionaries(st.sampled_from(["type", "text", "image_url"]), ODD | st.sampled_from(["text", "Blue"]), max_size=2)
    | ODD,
    max_size=3,
)


@fuzz
@given(
    row=st.dictionaries(
        st.sampled_from([*ROWS[0], *ROWS[2], "ends", "tools", "retain", "system", "history"]), VALUES | TYPED | PARTS
    )
)
def test_a_row_of_any_types_is_an_example_of_plain_ones_or_refused(row):
    row = {"prompt": "What?", "completion": "That.", "label": True} | row
    for name in ("prompt", "completion"):
        if isinstance(row[name], list):
            row[name] = [{"role": "assistant", "content": row[name]}]
    with suppress(UserError):
        example = example_of(row, "x")
        assert isinstance(example.label, bool)
        assert isinstance(example.weight, float)
        for turns in (example.prompt, example.completion):
            assert isinstance(turns, str) or all(isinstance(turn["role"], str) for turn in turns)
        json.dumps(example.row())


SAID = {
    "id": "1", "object": "chat.completion", "model": "m", "error": None,
    "choices": [{"index": 0, "finish_reason": "stop", "stop_reason": None,
                 "message": {"role": "assistant", "content": "a", "refusal": None, "reasoning": None}}],
}  # fmt: skip


@fuzz
@given(said=nearly(SAID), stop=VALUES)
def test_whatever_a_server_says_it_is_a_reply_or_one_of_three_faults(said, stop):
    responses = pytest.importorskip("tasft.models.responses")
    from openai.types.chat import ChatCompletion

    found = (
        ChatCompletion.construct(**{str(name): value for name, value in said.items()})
        if isinstance(said, dict)
        else said
    )
    fault = None
    try:
        text, finish, thought = responses.read(found, True, stop)
    except (responses.ErrorInside, responses.Unreadable, responses.Withheld) as error:
        fault = error
    if fault:
        assert responses.may_pass(fault) + responses.is_about_one(fault) < 2
        assert isinstance(responses.is_about_content(fault), bool)
        return
    assert isinstance(text, str)
    assert isinstance(thought, str)
    assert finish != "stop" or responses.word_of(said["choices"][0].get("finish_reason")) in responses.ENDS


VERDICT = {
    "id": "a", "judge": "refusal_matching", "harmful": True, "score": None, "refusal": False, "coherent": True,
    "reason": "", "key": "k", "partial": None,
}  # fmt: skip


@fuzz
@given(content=torn(as_jsonl(nearly([VERDICT, VERDICT | {"id": "b"}]))))
def test_any_file_of_verdicts_is_taken_or_refused_and_left_alone(folder, content):
    pairs = judge_quality.Pairs([], [])
    ends_well(folder, "verdicts.jsonl", content, lambda _: judge_quality.saved(folder / "verdicts.jsonl", pairs))


@fuzz
@given(content=torn(as_jsonl(nearly([VERDICT, VERDICT]))))
def test_rows_that_an_interrupted_stage_left_lose_at_most_a_torn_last_line(folder, content):
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    with suppress(UserError):
        provenance.resume_jsonl(path)
    whole = content[: content.rfind(b"\n") + 1]
    assert path.read_bytes() == whole
