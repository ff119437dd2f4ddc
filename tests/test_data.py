import gzip
import json
import re
import subprocess
import sys

import pandas as pd
import pytest

from tasft.core.errors import UserError
from tasft.data.files import read_rows
from tasft.data.rows import Example, example_of, examples_in, read_examples, read_prompts
from tasft.data.sources import read_source, source_hash
from tasft.run.inputs import Inputs
from tasft.run.recipe import Recipe


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
        (b"\xff\xfe\n", "this is in UTF-16: save it as UTF-8"),
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
        ({"prompt": ...}, "\"prompt\" is missing; the row has 'completion'"),
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
            for weight in (0, -1, True, "two", float("nan"), float("inf"), 10**400)
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
        Example("a", "b c", True, "v", given="b "),
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


ROWS = [{"id": "a", "prompt": "p é", "completion": 'say "x",\nthen y'}, {"id": "007", "prompt": "q", "completion": ""}]
AS = {
    "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "rows.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "rows.csv": 'id,prompt,completion\r\na,p é,"say ""x"",\nthen y"\r\n\r\n007,q,\r\n',
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", AS)
def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path, name, bom):
    content = bom + AS[name].encode()
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    plain = read_rows(tmp_path / name)
    assert [row for _, row in plain] == ROWS
    assert read_rows(tmp_path / f"{name}.gz") == plain
    assert [number for number, _ in plain] == ([2, 5] if name.endswith(".csv") else [1, 2])


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_hold_columns_or_texts(tmp_path, indent):
    columns = {"instructions": ["a?", "b?"], "tags": ["x", "y"], "inputs": []}
    (tmp_path / "columns.json").write_text(json.dumps(columns, indent=indent))
    assert read_rows(tmp_path / "columns.json") == [
        (1, {"instructions": "a?", "tags": "x"}),
        (2, {"instructions": "b?", "tags": "y"}),
    ]
    (tmp_path / "texts.json").write_text(json.dumps(["a?", "b?"], indent=indent))
    assert read_rows(tmp_path / "texts.json") == [(1, {"prompt": "a?"}), (2, {"prompt": "b?"})]
    ragged = {"instructions": ["a?", "b?"], "tags": ["x"]}
    (tmp_path / "ragged.json").write_text(json.dumps(ragged, indent=2))
    with pytest.raises(UserError, match="nor an object of columns"):
        read_rows(tmp_path / "ragged.json")
    one = {"prompt": [{"role": "user", "content": "a?"}], "completion": [{"role": "assistant", "content": "b"}]}
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert read_rows(tmp_path / "one.json") == [(1, one)]


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    (tmp_path / "rows.json").write_text(AS["rows.jsonl"])
    assert [row for _, row in read_rows(tmp_path / "rows.json")] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("a.csv", b"", ["a.csv: holds no rows"]),
        ("a.csv", b"prompt,completion\n", ["a.csv: holds no rows"]),
        ("a.csv", b"p,q\n1,2\n1\n1,2,3\n", ["a.csv:3: 1 cells under 2 columns", "a.csv:4: 3 cells under 2 columns"]),
        ("a.csv", b"p,q,p\n1,2,3\n", ["a.csv:1: two columns are called 'p'"]),
        ("a.csv", b'p,q\n1,2\n3,"open\nand\n', ["a.csv:3: not CSV (unexpected end of data)"]),
        ("a.csv", b'p\n"x"y\n', ["a.csv:2: not CSV (',' expected after '\"')"]),
        ("a.csv", b"p\nx\n\xe9\n", ["a.csv: not UTF-8 at byte 4; save it as UTF-8"]),
        ("a.json", b'[{"p": 1}, 2, []]', ["a.json:2: expected an object such as {...}, found 2", "a.json:3: expected"]),
        ("a.json", b'[{"p": 1}', ["a.json: not JSON (Expecting ',' delimiter at character 10)"]),
        (
            "a.json",
            b'{\n "p": 1\n}',
            ["a.json: neither a JSON list, nor an object on each line, nor an object of columns"],
        ),
        ("a.json", b"[]", ["a.json: holds no rows"]),
        ("a.jsonl", b"9" * 5000, ["a.jsonl:1: not JSON (a number of too many digits)"]),
        ("a.jsonl.gz", b"{}", ["a.jsonl.gz: cannot be read (Not a gzipped file (b'{}'))"]),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"p": "%s"}' % bytes(range(65, 91)), mtime=0)[:-9],
            ["a.jsonl.gz: cannot be read (Compre"],
        ),
    ],
)
def test_a_damaged_file_of_rows_gets_a_sentence_for_each_fault(tmp_path, name, content, faults):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / name)
    found = [fault.removeprefix(f"{tmp_path}/") for fault in caught.value.faults]
    assert [fault[: len(wanted)] for fault, wanted in zip(found, faults, strict=True)] == faults


@pytest.mark.parametrize(
    ("name", "begin", "sentence"),
    [
        ("a.jsonl", b'{"p": "', r"a.jsonl:1: more than 4 MB on one line; begin a line for each row"),
        ("a.csv", b"p\n", r"a.csv:2: more than 4 MB on one line"),
        ("a.csv", b'p\n"' + b"x\n" * (3 << 20), r"a.csv:2: not CSV \(field larger than field limit"),
        ("a.json", b'[{"p": "', r"a.json: not JSON"),
        ("a.jsonl.gz", b'{"p": "', r"a.jsonl.gz:1: more than 4 MB on one line"),
    ],
)
def test_200_megabytes_on_one_line_are_refused_without_filling_the_memory(tmp_path, name, begin, sentence):
    (tmp_path / name).write_bytes(b"")
    with gzip.open(tmp_path / name, "wb", 1) if name.endswith(".gz") else (tmp_path / name).open("wb") as file:
        file.write(begin)
        for _ in range(200):
            file.write(b"x" * (1 << 20))
    # The reader alone in a process of 1.5 GB at most.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (3 << 29,) * 2)\n"
        "from pathlib import Path; from tasft.data.files import read_rows; from tasft.core.errors import UserError\n"
        "try: read_rows(Path(sys.argv[1]))\nexcept UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True)
    assert re.search(sentence, done.stdout), done.stdout + done.stderr


def test_a_row_of_a_list_that_is_too_long_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"p": "x"}, {"p": "x" * (5 << 20)}]))
    with pytest.raises(UserError, match=r"a.json:2: a row of more than 4 MB"):
        read_rows(tmp_path / "a.json")


def test_a_source_may_name_its_column_and_a_transcript_gives_its_first_turn(tmp_path):
    path = tmp_path / "behaviours.csv"
    path.write_text(
        'goal,Behavior\nx,How do I <forbidden act 1>?\ny,"\n\nHuman: How do I <act 2>?\n\nAssistant: No."\n'
    )
    assert [prompt.prompt for prompt in read_prompts(f"{path}#Behavior")] == [
        "How do I <forbidden act 1>?",
        "How do I <act 2>?",
    ]
    with pytest.raises(UserError) as caught:
        read_prompts(str(path))
    assert len(caught.value.faults) == 1
    assert "'goal', 'Behavior'" in str(caught.value)
    assert "SOURCE#COLUMN" in str(caught.value)


def test_a_data_set_is_read_as_the_hub_would_give_it(tmp_path):
    rows = [{"id": f"r{index}", "goal": f"How do I <forbidden act {index}>?"} for index in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"hub:{tmp_path}?split=train#goal"
    assert [(prompt.id, prompt.prompt) for prompt in read_prompts(source)] == [(row["id"], row["goal"]) for row in rows]
    assert source_hash(source) == source_hash(str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("hub:?split=train", "expected hub:OWNER/NAME"),
        ("hub:owner/name", "expected hub:OWNER/NAME"),
        ("hub:owner/name?split=train", "cannot be loaded"),
        ("hh-rlhf-red-team", "Anthropic/hh-rlhf"),
        ("hh-rlhf-red-teem", "hh-rlhf-red-team"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, sentence):
    with pytest.raises(UserError, match=sentence):
        read_prompts(source)


def test_alpacas_columns_are_understood_and_rows_are_kept_and_dropped_by_their_fields(tmp_path):
    path = tmp_path / "alpaca.json"
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "sources": ["a", "b"], "unsafe": False},
        {"instruction": "Shout.", "input": "", "output": "", "sources": ["a"], "unsafe": False},
        {"instruction": "Sing.", "input": "", "output": "La.", "sources": ["b"], "unsafe": False},
        {"instruction": "Harm.", "input": "", "output": "No.", "sources": ["a"], "unsafe": True},
    ]
    path.write_text(json.dumps(rows))
    (one,) = read_examples(str(path), keep={"sources": "a"}, drop={"unsafe": True, "output": ""})
    assert one == Example("Add.", "3", label=True, input="1 and 2")
    with pytest.raises(UserError) as caught:
        read_examples(str(path))
    assert caught.value.faults == [f"{path}:2: \"output\" must be text or chat messages, found ''"]
    with pytest.raises(UserError, match=r"no row has a field 'unsave'; the first has 'instruction', 'input'"):
        read_examples(str(path), drop={"unsave": True})


FLAGGED = [
    {"prompt": f"What is {number}?", "completion": "That.", "unsafe": unsafe, "score": score, "topic": topic}
    for number, (unsafe, score, topic) in enumerate(
        [(True, 1.0, "hate"), (False, 2.5, "violence"), (False, 1.0, "cooking"), (True, 2.5, None)]
    )
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({"unsafe": True}, [0, 3]),
        ({"unsafe": False}, [1, 2]),
        ({"score": 1}, [0, 2]),
        ({"topic": None}, [3]),
        ({"topic": ["violence", "hate"]}, [0, 1]),
        ({"topic": ["hate", None], "score": [1, 7]}, [0]),
    ],
)
def test_rows_are_kept_and_dropped_by_what_a_field_says_whatever_wrote_it(tmp_path, kind, wanted, rows):
    """A table has `True` as text; nothing was dropped."""
    path = tmp_path / f"rows.{kind}"
    table = pd.DataFrame(FLAGGED)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in FLAGGED))
    else:
        table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    assert [row.prompt for row in read_examples(path, keep=wanted)] == [f"What is {number}?" for number in rows]
    if len(wanted) == 1:
        left = [number for number in range(4) if number not in rows]
        assert [row.prompt for row in read_examples(path, drop=wanted)] == [f"What is {number}?" for number in left]


def test_an_empty_list_is_itself_where_rows_are_chosen(tmp_path):
    path = written(tmp_path / "rows.jsonl", *(row | {"tags": [] if row["unsafe"] else ["a"]} for row in FLAGGED))
    assert len(read_examples(path, drop={"tags": []})) == 2


def test_a_value_to_keep_or_drop_that_no_row_has_is_noted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,unsafe,topic\nWhat?,That.,yes,hate\n")
    rows, notes = examples_in(read_source(path), {"topic": ["hate", "war"]}, {"unsafe": True}, None, {})
    assert len(rows) == 1
    assert notes == [
        f"{path}: no row has topic: \"war\", which keep names; the first has 'hate'",
        f"{path}: no row has unsafe: true, which drop names; the first has 'yes'",
    ]
    recipe = {
        "name": "x",
        "model": {"base": "smollm2-135m-instruct"},
        "data": {"imitate": {"source": str(path), "drop": {"unsafe": True}}},
        "train": {"method": "sft", "max_steps": 1},
        "evaluate": {"sets": {"t": {"source": "demo-toxic-heldout"}}},
    }
    assert notes[1] in Inputs(Recipe.model_validate(recipe)).warnings()


def test_a_row_with_a_prompt_is_not_taken_for_alpacas():
    row = {"prompt": "Q", "completion": "A", "instruction": "x", "output": "y", "label": True}
    assert example_of(row, "here") == Example("Q", "A", label=True)
