"""Rows as people have them: their forms, files, folders and mixtures."""

import gzip
import json
import random

import pytest

from tasft.core.errors import UserError
from tasft.data.contamination import held_out, overlapping
from tasft.data.files import read_rows
from tasft.data.rows import Example, prompts_in, read_examples, read_prompts
from tasft.data.sources import read_source
from tasft.evaluate.references import read_references
from tasft.run import recipe_file
from tasft.run.inputs import Inputs
from tasft.run.recipe import Recipe
from tasft.train.baselines import safe_instead

ASK, ANSWER = {"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A pear."}
MORE = {"role": "user", "content": "Another?"}, {"role": "assistant", "content": "A plum."}
TALK = [ASK, ANSWER, *MORE]


def shared(talk):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk]


ROWS = {
    "prompt_completion": {"prompt": "Name a fruit.", "completion": "A pear."},
    "alpaca": {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
    "question_answer": {"question": "Name a fruit.", "answer": "A pear."},
    "messages": {"messages": [ASK, ANSWER]},
    "sharegpt": {"conversations": shared([ASK, ANSWER])},
}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", ROWS)
def test_a_form_is_told_from_its_columns(tmp_path, form):
    (row,) = read_examples(jsonl(tmp_path / "rows.jsonl", ROWS[form]))
    is_talk = form in ("messages", "sharegpt")
    assert row == Example([ASK] if is_talk else ASK["content"], [ANSWER] if is_talk else ANSWER["content"], True)
    assert row.form == form
    (prompt,) = read_prompts(jsonl(tmp_path / "prompts.jsonl", ROWS[form]))
    assert prompt.prompt == "Name a fruit."


@pytest.mark.parametrize("talk", [TALK, shared(TALK)])
def test_of_a_conversation_the_last_turn_is_the_completion(tmp_path, talk):
    name = "messages" if talk is TALK else "conversations"
    (row,) = read_examples(jsonl(tmp_path / "rows.jsonl", {name: talk, "prompt": "a title of the row", "label": False}))
    assert (row.prompt, row.completion, row.label) == (TALK[:-1], TALK[-1:], False)


@pytest.mark.parametrize(
    ("user", "assistant"),
    [("User", "Assistant"), ("USER", "ai"), ("human", "bot"), ("prompter", "model"), (" user", "gpt")],
)
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_who_speaks_is_known_by_any_of_their_names(tmp_path, user, assistant, names):
    """A template that asks whether a role is `user` would write `User` as somebody else."""
    said = [dict(zip(names, turn, strict=True)) for turn in ((user, "Name a fruit."), (assistant, "A pear."))]
    (row,) = read_examples(jsonl(tmp_path / "rows.jsonl", {"messages": said}))
    assert (row.prompt, row.completion) == ([ASK], [ANSWER])
    assert [prompt.prompt for prompt in read_prompts(str(tmp_path / "rows.jsonl"))] == ["Name a fruit."]


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_message_and_a_history_in_columns_of_their_own_come_before_the_prompt(tmp_path, form, column):
    """As LLaMA-Factory's and OpenOrca's; they would be passed over."""
    system = {"role": "system", "content": "Be brief."}
    history = [["Name a fruit.", "A pear."]]
    (row,) = read_examples(jsonl(tmp_path / "rows.jsonl", ROWS[form] | {column: "Be brief.", "history": history}))
    assert row.prompt == [system, ASK, ANSWER, ASK]
    (row,) = read_examples(jsonl(tmp_path / "rows.jsonl", ROWS[form] | {column: "", "history": []}))
    assert row.prompt in ("Name a fruit.", [ASK])
    jsonl(tmp_path / "rows.jsonl", ROWS[form] | {"history": "what came before"})
    with pytest.raises(UserError, match='"system" or "history" is neither text nor turns'):
        read_examples(str(tmp_path / "rows.jsonl"))


def test_an_input_stays_with_its_instruction_where_there_is_a_system_message(tmp_path):
    row = {"instruction": "Sort.", "input": "b, a", "output": "a, b", "system": "Be brief."}
    (found,) = read_examples(jsonl(tmp_path / "rows.jsonl", row))
    assert found.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sort.\n\nb, a"}]
    assert found.input == ""


def test_a_conversation_is_learned_by_the_trainer_as_its_prompt_and_completion_are(tiny):
    from transformers import AutoTokenizer

    from tasft.data.encode import Encoding, encode_rows

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    split = {"prompt": TALK[:-1], "completion": TALK[-1:], "label": True}
    for turns in ("last", "all"):
        whole, _ = encode_rows([{"messages": TALK, "label": True}], tokenizer, Encoding(turns=turns))
        assert whole == encode_rows([split], tokenizer, Encoding(turns=turns))[0]


def test_columns_of_another_name_are_named(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", {"query": "Name a fruit.", "reply": "A pear.", "prompt": "of the system"})
    (row,) = read_examples(source, columns={"prompt": "query", "completion": "reply"})
    assert (row.prompt, row.completion) == ("Name a fruit.", "A pear.")


def test_a_form_may_be_said_where_a_row_has_the_columns_of_two(tmp_path):
    both = ROWS["prompt_completion"] | {"messages": TALK}
    source = jsonl(tmp_path / "rows.jsonl", both)
    assert read_examples(source)[0].form == "prompt_completion"
    assert read_examples(source, form="messages")[0].completion == TALK[-1:]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow as arrow
    from pyarrow import csv, parquet

    rows = [{"prompt": f"Name fruit {index}, é.", "completion": f"A pear,\n{index}"} for index in range(5)]
    table = arrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    csv.write_csv(table, tmp_path / "rows.csv")
    csv.write_csv(table, tmp_path / "rows.tsv", csv.WriteOptions(delimiter="\t"))
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(content)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    with arrow.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    assert [[row for _, row in read_rows(file)] for file in files] == [rows] * 6
    # All of them in a folder, with the place of each.
    assert [row.place for row in read_examples(tmp_path)[:2]] == [f"{files[0]}:2", f"{files[0]}:4"]
    assert len(read_examples(str(tmp_path))) == 30
    (tmp_path / "prompts.txt").write_text("What?\n\n  Why?  \n")
    assert [prompt.prompt for prompt in read_prompts(str(tmp_path / "prompts.txt"))] == ["What?", "Why?"]


@pytest.mark.parametrize("prompts", ["prompts.jsonl", "prompts.txt", "prompts.txt.gz"])
def test_a_licence_beside_prompts_gives_no_prompts(tmp_path, prompts):
    """Each of its lines was one."""
    texts = [f"How do I <forbidden act {index}>?" for index in range(3)]
    content = "".join((json.dumps({"prompt": text}) if prompts.endswith("jsonl") else text) + "\n" for text in texts)
    (tmp_path / prompts).write_bytes(gzip.compress(content.encode()) if prompts.endswith("gz") else content.encode())
    (tmp_path / "LICENSE.txt").write_text("Permission is hereby granted, free of charge,\nto any person.\n")
    with pytest.raises(
        UserError, match=r"LICENSE.txt.*: in a folder no \.txt is read, .*: take it out, or name the one"
    ):
        read_prompts(str(tmp_path))
    assert [prompt.prompt for prompt in read_prompts(str(tmp_path / prompts))] == texts
    if prompts.endswith("jsonl"):
        (tmp_path / "LICENSE.txt").rename(tmp_path / "LICENSE")
        assert [prompt.prompt for prompt in read_prompts(str(tmp_path))] == texts


def test_a_data_set_that_was_saved_to_disk_is_a_source(tmp_path):
    import datasets

    rows = [ROWS["messages"], {"messages": TALK}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert [row.completion for row in read_examples(str(tmp_path / "saved"))] == [[ANSWER], TALK[-1:]]
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=r"several splits: name one, as in .*splits/train"):
        read_examples(str(tmp_path / "splits"))
    assert len(read_examples(str(tmp_path / "splits" / "train"))) == 2


def test_faults_of_many_rows_are_one_sentence(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", *({"question": f"What is {index}?", "answer": ""} for index in range(800)))
    with pytest.raises(UserError) as caught:
        read_examples(source)
    (fault,) = caught.value.faults
    assert fault == f"800 rows, first {source}:1: \"answer\" must be text or chat messages, found ''"


def test_what_is_held_out_has_no_near_duplicate_left_behind():
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=60)) for _ in range(200)]
    texts += [text + "!" for text in texts[::2]] + [text + "?" for text in texts[::4]]
    out = held_out(texts, 0.2, seed=1)
    held, kept = ([text for text, is_out in zip(texts, out, strict=True) if is_out is which] for which in (True, False))
    assert 0.15 * len(texts) <= len(held) <= 0.2 * len(texts)
    assert not any(overlapping(kept, held))
    assert out == held_out(texts, 0.2, seed=1) != held_out(texts, 0.2, seed=2)


def test_a_recipe_mixes_forms_and_holds_prompts_out(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    colours = ["amber", "beige", "cyan", "denim", "ebony", "fuchsia", "green", "hazel", "ivory", "jade"]
    jsonl(
        tmp_path / "talk.jsonl", *({"messages": [{**ASK, "content": f"Where is {each}?"}, ANSWER]} for each in colours)
    )
    jsonl(tmp_path / "pairs.jsonl", *({"question": f"Who likes {each} most?", "answer": "I."} for each in colours))
    (tmp_path / "toxic.txt").write_text("".join(f"How do I <forbidden {each} act>?\n" for each in colours))
    (tmp_path / "mine.yaml").write_text(
        f"name: mine\nmodel: {{base: {tiny}}}\n"
        "data:\n  imitate: [{source: talk.jsonl, rows: 4}, {source: pairs.jsonl, weight: 2}]\n"
        "  toxic_prompts: toxic.txt\n  heldout: 20%\n"
        "harvest: {judge: refusal_matching}\ntrain: {max_steps: 2}\n"
        "evaluate: {judges: [refusal_matching], sets: {toxic: {source: data.toxic_prompts}}}\n"
    )
    inputs = Inputs(recipe_file.load("mine.yaml"))
    assert [row.weight for row in inputs.imitate] == [1.0] * 4 + [2.0] * 10
    assert inputs.spec.evaluate.sets["toxic"].kind == "toxic"
    held = {prompt.prompt for prompt in inputs.sets["toxic"]}
    assert len(held) == 2
    assert {prompt.prompt for prompt in inputs.toxic}.isdisjoint(held)
    assert len(inputs.toxic) == 8
    assert inputs.hashes.keys() == {"data.toxic_prompts", "data.imitate.0", "data.imitate.1"}
    assert [line for line in inputs.warnings() if line.startswith("data.imitate")] == [
        "data.imitate: 4 rows of messages; the last assistant turn is learned",
        "data.imitate: 10 rows of question_answer (question, answer)",
    ]
    # What was written down in full reads back.
    (tmp_path / "again.yaml").write_text(recipe_file.dump(inputs.spec))
    assert recipe_file.load("again.yaml") == inputs.spec


COLOURS = ["amber", "beige", "cyan", "denim", "ebony", "fuchsia", "green", "hazel", "ivory", "jade"]


def inputs_of(imitate, prompt="chat", **data):
    return Inputs(
        Recipe.model_validate(
            {
                "name": "x",
                "model": {"base": "smollm2-135m-instruct", "prompt": prompt},
                "data": {"imitate": {"source": imitate}} | data,
                "train": {"method": "sft", "max_steps": 1},
                "evaluate": {"sets": {"b": {"source": "data.imitate" if "heldout" in data else "demo-toxic-heldout"}}},
            }
        )
    )


def test_an_input_is_asked_with_its_instruction(tmp_path):
    """As training has it; the instruction was asked alone."""
    rows = [{"instruction": "Sort.", "input": f"{each}, a", "output": f"a, {each}"} for each in COLOURS]
    source = jsonl(tmp_path / "alpaca.jsonl", *rows, {"instruction": "Sing.", "input": "", "output": "La."})
    whole = [f"Sort.\n\n{each}, a" for each in COLOURS]
    assert [prompt.prompt for prompt in read_prompts(source)] == [*whole, "Sing."]
    assert [row.instruction for row in read_references(source)] == [*whole, "Sing."]
    assert [prompt.prompt for prompt in read_prompts(f"{source}#output")] == [*(row["output"] for row in rows), "La."]
    examples = read_examples(source)
    assert safe_instead([Example(whole[1], "", label=False)], examples) == [examples[1]]
    inputs = inputs_of(source, heldout="30%")
    held = {prompt.prompt for prompt in inputs.sets["b"]}
    assert len(held) == 3
    assert held < {*whole, "Sing."}
    assert {row.question for row in inputs.imitate} == {*whole, "Sing."} - held
    # Alpaca's form has a place for an input, which a prompt does not fill.
    inputs = inputs_of(source, prompt="alpaca", heldout="99%")
    assert [prompt.prompt for prompt in inputs.sets["b"]] == ["Sing."]
    assert any("10 of 11 rows of data.imitate cannot be set aside" in told for told in inputs.told)
    made = {"prompt": "Instruction: Sort. Input: b, a", "instruction": "Sort.", "input": "b, a", "output": "a, b"}
    (prompt,) = read_prompts(jsonl(tmp_path / "made.jsonl", made))
    assert prompt.prompt == made["prompt"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"instruction": "Sort.", "input": 5}, '"input" must be text, found 5'),
        ({"prompt": [ASK], "input": "b, a"}, '"input" goes with a prompt that is text'),
    ],
)
def test_an_input_that_belongs_to_no_prompt_is_refused(tmp_path, row, sentence):
    with pytest.raises(UserError, match=f"p.jsonl:1: {sentence}"):
        read_prompts(jsonl(tmp_path / "p.jsonl", row))


def test_a_row_that_is_more_than_one_text_is_not_held_out(tmp_path):
    """All turns of the user were asked as one, without what stood between them."""
    asks = [{"role": "user", "content": f"Where does one find {each}?"} for each in COLOURS]
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [ask, ANSWER]} for ask in asks]
    more = [{"messages": [system, ask, ANSWER, *MORE]} for ask in asks]
    tools = {"prompt": "Which of these?", "completion": "A pear.", "tools": [{"type": "function"}]}
    inputs = inputs_of(jsonl(tmp_path / "rows.jsonl", *rows, *more, tools), heldout="20%")
    held = {prompt.prompt for prompt in inputs.sets["b"]}
    assert len(held) == 2
    assert held < {ask["content"] for ask in asks}
    assert [told for told in inputs.told if "11 of 21 rows of data.imitate cannot be set aside" in told]
    inputs = inputs_of(jsonl(tmp_path / "rows.jsonl", *more), heldout="20%")
    with pytest.raises(UserError, match=r"10 of 10 rows .* cannot be set aside: .*: name a file of prompts"):
        _ = inputs.sets


def test_prompts_that_follow_something_that_is_not_asked_are_counted(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    source = jsonl(tmp_path / "p.jsonl", {"messages": [system, *TALK]}, {"messages": TALK})
    prompts, note = prompts_in(read_source(source))
    assert [prompt.prompt for prompt in prompts] == ["Name a fruit."] * 2
    assert note.startswith(f"{source}: 2 prompts of the column 'messages'; 1 follow a system message or earlier turns,")
    source = jsonl(
        tmp_path / "p.jsonl", {"prompt": "And pears?", "history": [["Who eats plums?", "I."]]}, {"prompt": "a"}
    )
    assert "2 prompts of the column 'prompt'; 1 follow" in prompts_in(read_source(source))[1]
    assert prompts_in(read_source(jsonl(tmp_path / "p.jsonl", {"prompt": "a", "history": "of art"})))[1] == ""
