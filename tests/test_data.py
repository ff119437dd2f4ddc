import json

import pytest

from tasft.data import Example, example_of, read_examples, read_prompts
from tasft.errors import UserError


def written(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_all_bad_lines_are_named_at_once(tmp_path):
    source = written(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "completion": "b", "label": "harmful"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": 3, "completion": "b"},
    )
    with pytest.raises(UserError) as caught:
        read_examples(source)
    assert [fault.split(": ", 1)[0].rsplit(":", 1)[1] for fault in caught.value.faults] == ["1", "2", "4"]
    assert "use true (imitate) or false (avoid)" in caught.value.faults[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no rows"),
        (b"{\n", ":1: not JSON"),
        (b"[1]\n", ":1: expected an object"),
        (b"\xff\xfe\n", "not UTF-8 at byte 0"),
        (b'{"prompt": " "}\n', '"prompt" must be text'),
        (b'{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "is that of line 1 too"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_prompts(str(path))


def test_an_unknown_source_lists_the_named_ones():
    with pytest.raises(UserError, match="demo-toxic-harvest"):
        read_prompts("nowhere.jsonl")


def test_ids_may_be_numbers_from_zero_or_null(tmp_path):
    source = written(tmp_path / "p.jsonl", {"id": 0, "prompt": "a"}, {"id": 1, "prompt": "b"})
    assert [prompt.id for prompt in read_prompts(source)] == ["0", "1"]
    source = written(tmp_path / "e.jsonl", *({"id": None, "prompt": "a", "completion": "b"} for _ in range(2)))
    assert [row.id for row in read_examples(source)] == ["", ""]


def test_kto_rows_are_read_as_they_are(tmp_path):
    source = written(tmp_path / "kto.jsonl", {"prompt": "p", "completion": "c", "label": False})
    (row,) = read_examples(source)
    assert not row.label
    assert row.ends


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_prompts(str(path))[0].prompt == "a\u2028b"


ASSISTANT = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": ...}, "\"prompt\" is missing; the row has 'completion', 'label'"),
        ({"completion": " "}, '"completion" must be text or chat messages'),
        ({"completion": []}, '"completion" must be text or chat messages'),
        ({"prompt": [{"content": "no role"}]}, '"prompt" must be text or chat messages'),
        ({"prompt": [{"role": "user"}]}, '"prompt" must be text or chat messages'),
        ({"completion": [ASSISTANT, {"role": "user", "content": "c"}]}, "is by 'user'; it must be the assistant's"),
        ({"label": ...}, '"label" is missing'),
        ({"label": None}, r'"label" is None; use true \(imitate\) or false \(avoid\)'),
        ({"ends": "no"}, "\"ends\" is 'no'; use true or false"),
        ({"input": 3}, '"input" must be text, found 3'),
        ({"input": "x", "prompt": [ASSISTANT]}, "write it into the messages"),
        ({"tools": {"name": "look"}}, '"tools" must be a list of JSON schemas'),
        ({"tools": ["look"]}, '"tools" must be a list of JSON schemas'),
        *(
            ({"weight": weight}, '"weight" is .*; use a number above 0')
            for weight in (0, -1, True, "2", float("nan"), float("inf"), 10**400)
        ),
    ],
)
def test_a_bad_field_gets_a_sentence(fields, sentence):
    row = {"prompt": "a", "completion": "b", "label": True} | fields
    with pytest.raises(UserError, match=f"row 7: .*{sentence}"):
        example_of({key: value for key, value in row.items() if value is not ...}, "row 7")


def test_all_faults_of_a_row_are_named():
    with pytest.raises(UserError) as caught:
        example_of({"prompt": 1, "completion": "", "label": "no", "ends": 1, "weight": 0}, "here")
    assert len(caught.value.faults) == 5
    assert all(fault.startswith("here: ") for fault in caught.value.faults)


def test_optional_fields_may_be_null():
    nothing = dict.fromkeys(("id", "source", "ends", "input", "tools", "weight"))
    row = {"prompt": "a", "completion": "b", "label": False, "unknown": 3}
    assert example_of(row | nothing, "row 0") == Example("a", "b", False)


def test_every_field_survives_being_written_and_read(tmp_path):
    calls = [{"role": "assistant", "tool_calls": [TOOL]}, {"role": "tool", "content": "42"}, ASSISTANT]
    examples = [
        Example("a", "b", False, "x", "harvest", False, "context", [TOOL], 2.5),
        Example([{"role": "user", "content": "a"}], calls, True, "y"),
        Example([{"role": "user", "content": "a"}], "b", True, "z"),
    ]
    assert read_examples(written(tmp_path / "rows.jsonl", *(example.row() for example in examples))) == examples


def test_a_row_without_input_tools_and_weight_is_written_without_them():
    assert Example("a", "b", True).row() == {
        "prompt": "a",
        "completion": "b",
        "label": True,
        "id": "",
        "source": "",
        "ends": True,
    }
