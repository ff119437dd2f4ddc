import json

import pytest

from tasft.data import read_examples, read_prompts
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
