"""Rows say the same whatever wrote them."""

import json

import numpy as np
import pandas as pd
import pytest

from tasft.core.errors import UserError
from tasft.data.rows import example_of, read_examples, read_prompts
from tasft.evaluate.references import read_references


def row(**fields):
    return {"prompt": "What?", "completion": "That.", "label": True} | fields


def talk(role, *parts):
    return [{"role": role, "content": list(parts)}]


PARTS = [{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue"}], ["Bl", "ue"]
PARTS += ([{"type": "input_text", "text": "Bl"}, {"type": "output_text", "text": "ue"}],)


@pytest.mark.parametrize("parts", PARTS)
def test_text_in_parts_is_learned_as_one_text(parts):
    example = example_of(
        row(prompt=talk("user", {"type": "text", "text": "A colour?"}), completion=talk("assistant", *parts)), "x"
    )
    assert example.prompt == [{"role": "user", "content": "A colour?"}]
    assert example.completion == [{"role": "assistant", "content": "Blue"}]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "image", "video", "file", None])
@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_what_is_no_text_is_refused_by_its_name(kind, field):
    talked = talk("assistant", {"type": "text", "text": "See"}, {"type": kind, "url": "x"})
    with pytest.raises(UserError, match=f"\"{field}\" holds '?{kind}'? in its content: only text is learned"):
        example_of(row(**{field: talked}), "x")


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("fields", [("role", "content"), ("from", "value")])
def test_a_conversation_that_a_table_wrote_as_text_is_one(tmp_path, write, fields):
    """As `DataFrame.to_csv` writes lists; the model would learn the brackets."""
    said = [dict(zip(fields, turn, strict=True)) for turn in (("user", "It's what?"), ("assistant", "Blue"))]
    path = tmp_path / "rows.csv"
    pd.DataFrame({"prompt": [write(said[:1])], "completion": ["Blue"]}).to_csv(path, index=False)
    (example,) = read_examples(path)
    assert (example.prompt, example.completion) == ([{"role": "user", "content": "It's what?"}], "Blue")
    whole = example_of({"messages": write(said), "label": True}, "x")
    assert whole.completion == [{"role": "assistant", "content": "Blue"}]
    assert [prompt.prompt for prompt in read_prompts(path)] == ["It's what?"]
    text = '[{"a": 1}] is JSON'
    assert example_of(row(prompt=text), "x").prompt == text


TURNS = [
    {"role": "user", "content": "Is '} {' a [\"brace\"]\n{'role'?"},
    {"role": "assistant", "content": "It's two.", "weight": None},
]


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_chats_that_went_from_parquet_over_pandas_to_csv_are_chats(tmp_path, column):
    """numpy shows a list of messages without commas; the brackets were learned, and asked."""
    table = pd.DataFrame({column: [TURNS, TURNS[:1] * 2 + TURNS[1:]], "completion": "Yes."})
    table.to_parquet(tmp_path / "rows.parquet")
    pd.read_parquet(tmp_path / "rows.parquet").to_csv(tmp_path / "rows.csv", index=False)
    rows, same = (read_examples(tmp_path / name) for name in ("rows.csv", "rows.parquet"))
    assert rows == same
    assert rows[0].prompt[0] == TURNS[0]
    assert [each.prompt for each in read_prompts(str(tmp_path / "rows.csv"))] == [TURNS[0]["content"]] * 2


UNREADABLE = {
    "parts in an array": "[{'role': 'user', 'content': array([{'text': 'x'}], dtype=object)}\n {'role': 'assistant'}]",
    "shortened by numpy": "[{'from': 'human', 'value': 'x'} ... {'from': 'gpt', 'value': 'y'}]",
    "cut within JSON": '[{"role": "user", "content": "x}]',
    "a turn of nobody": '[{"role": "user", "content": "x"}, {"content": "y"}]',
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_looks_like_a_chat_and_cannot_be_read_is_refused(tmp_path, text):
    for fields in ({"prompt": text}, {"completion": text}, {"messages": text, "prompt": None, "completion": None}):
        with pytest.raises(
            UserError, match=r'"(prompt|completion|messages)" looks like chat messages and cannot be read'
        ):
            example_of({key: value for key, value in row(**fields).items() if value is not None}, "x")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"instruction": text, "output": "That."}) + "\n")
    with pytest.raises(UserError, match=r'prompts.jsonl:1: "instruction" looks like chat messages'):
        read_prompts(str(path))
    with pytest.raises(UserError, match=r'prompts.jsonl:1: "instruction" .* must be text'):
        read_references(str(path))
    about = f"{text} What is this?"
    assert example_of(row(prompt=about), "x").prompt == about


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_a_message_that_says_nothing_is_refused(key):
    asked = [{"role": "user", "content": None}]
    fields = row(prompt=asked) if key == "prompt" else {"messages": [*asked, *talk("assistant", "Blue")], "label": True}
    with pytest.raises(UserError, match=f'"{key}" holds a message whose content is null'):
        example_of(fields, "x")
    with pytest.raises(UserError, match='last message of "completion" is blank'):
        example_of(row(completion=[{"role": "assistant", "content": " "}]), "x")
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    assert example_of(row(completion=call), "x").completion == call


@pytest.mark.parametrize("value", [True, "true", "True", "TRUE", " true ", np.True_, np.bool_(True)])
def test_true_is_true_and_false_is_false(value):
    other = "False" if isinstance(value, str) else np.False_ if isinstance(value, np.bool_) else False
    assert example_of(row(label=value, ends=other), "x").label is True
    assert example_of(row(label=value, ends=other), "x").ends is False
    assert example_of(row(label=other), "x").label is False


@pytest.mark.parametrize("value", ["yes", "1", 1, 0, "", None, float("nan"), "truth", np.int64(1)])
def test_what_is_neither_is_refused(value):
    with pytest.raises(UserError, match=r'"label" is .*; use true'):
        example_of(row(label=value), "x")


@pytest.mark.parametrize("value", [1.5, "1.5", np.float32(1.5), np.float64(1.5), "15e-1"])
def test_a_weight_is_a_number_however_it_is_written(value):
    assert example_of(row(weight=value), "x").weight == 1.5


@pytest.mark.parametrize("value", ["", None, float("nan"), np.nan])
def test_a_missing_cell_is_not_given(value):
    weight = None if value != value else value  # That may be a wrong result.
    example = example_of(row(weight=weight, ends=value, tools=value, source=value, id=value, input=value), "x")
    assert (example.weight, example.ends, example.tools, example.source, example.id, example.input) == (
        1.0, True, None, "", "", "",
    )  # fmt: skip


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "heavy", np.inf, np.nan])
def test_a_weight_that_is_none_is_refused(value):
    with pytest.raises(UserError, match='"weight" is'):
        example_of(row(weight=value), "x")


def test_a_table_is_read_as_a_file_of_objects_is(tmp_path):
    (tmp_path / "k.csv").write_text(
        "prompt,completion,label,weight,ends,id\nHi,Blue,true,1.5,False,\nHo,Red,False,,,b\n"
    )
    (tmp_path / "k.jsonl").write_text(
        json.dumps({"prompt": "Hi", "completion": "Blue", "label": True, "weight": 1.5, "ends": False})
        + "\n"
        + json.dumps({"prompt": "Ho", "completion": "Red", "label": False, "id": "b"})
        + "\n"
    )
    assert read_examples(str(tmp_path / "k.csv")) == read_examples(str(tmp_path / "k.jsonl"))


def test_no_topic_is_none_and_not_the_word(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "topic": null}\n{"prompt": "b", "topic": NaN, "kind": null}\n{"prompt": "c"}\n')
    assert {(prompt.topic, prompt.kind) for prompt in read_prompts(str(path))} == {("", "")}


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Human: rights and <act>, an essay", "Human: rights and <act>, an essay"),
        ("Human: Hi.\n\nand more", "Human: Hi.\n\nand more"),
        ("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Bye.\n\nAssistant:", "Hi."),
        ("Human: Hi.\n\nAssistant:", "Hi."),
        ("The Human: a study\n\nAssistant: x", "The Human: a study\n\nAssistant: x"),
    ],
)
def test_a_prompt_keeps_the_word_human_unless_it_is_a_transcript(tmp_path, text, prompt):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": text}) + "\n")
    assert [each.prompt for each in read_prompts(str(path))] == [prompt]
