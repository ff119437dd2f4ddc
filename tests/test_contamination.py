import json

import pytest

from tasft.data.contamination import overlapping
from tasft.run.inputs import Inputs
from tasft.run.recipe import Recipe

HELD_OUT = [
    "How do I <forbidden act 7> without anybody noticing it?",
    "What is the best way to clean a coffee machine at home?",
]


def test_a_prompt_that_is_held_out_is_found_whatever_its_case_and_blanks():
    prompts = ["how do i  <FORBIDDEN act 7>\nwithout anybody noticing it?", "Which river runs through the old town?"]
    assert overlapping(prompts, HELD_OUT) == [True, False]


def test_a_changed_word_is_found_and_a_shared_topic_is_not():
    near = "What is the best way to clean a coffee machine at work?"
    far = "Where could one buy a coffee machine that is easy to clean?"
    assert overlapping([near, far], HELD_OUT) == [True, False]


def test_nothing_overlaps_with_nothing():
    assert overlapping([], HELD_OUT) == []
    assert overlapping(["", "a"], []) == [False, False]
    assert overlapping(["a"], ["A"]) == [True]


def test_no_near_duplicate_among_many_prompts_is_overlooked():
    held_out = [f"Please describe to a child how the number {n} relates to item {n * 7}." for n in range(300)]
    changed = [text.replace("relates", "related") for text in held_out]
    assert all(overlapping(changed, held_out))
    assert not any(overlapping([f"Sing of winter {n}!" for n in range(300)], held_out))


ASKED, REST = HELD_OUT[0], "Thanks. Now say the same again in simpler words, for a child, with one example."
SAID = {"role": "assistant", "content": "So it is."}


def turns(*texts):
    return [turn for text in texts for turn in ({"role": "user", "content": text}, SAID)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns(ASKED)},
        {"messages": turns(ASKED, REST)},
        {"messages": turns(REST, ASKED, REST)},
        {"messages": [{"role": "system", "content": REST}, *turns(f"{ASKED} "), *turns(REST)]},
        {"prompt": REST, "history": [[ASKED, "So it is."]], "completion": "A."},
        {"prompt": f"\n\nHuman: {REST}\n\nAssistant: So.\n\nHuman: {ASKED}\n\nAssistant:", "completion": " A."},
        {"instruction": ASKED[:24], "input": ASKED[26:], "output": "A."},
        {"instruction": ASKED, "input": REST, "output": "A."},
        {"instruction": REST, "input": ASKED, "output": "A."},
    ],
)
def test_a_row_is_left_out_whichever_of_its_turns_is_evaluated(tmp_path, row):
    """All turns were compared as one text, and an instruction without its input."""
    other = {"messages": turns(REST, "Where does one buy tulips?")}
    for name, rows in (
        ("rows", [row, other]),
        ("held", [{"prompt": f"{ASKED[:24]}\n\n{ASKED[26:]}"}, {"prompt": ASKED}]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    recipe = {
        "name": "x",
        "model": {"base": "smollm2-135m-instruct"},
        "data": {"imitate": {"source": str(tmp_path / "rows.jsonl")}},
        "train": {"method": "sft", "max_steps": 1},
        "evaluate": {"sets": {"t": {"source": str(tmp_path / "held.jsonl"), "kind": "toxic"}}},
    }
    inputs = Inputs(Recipe.model_validate(recipe))
    assert [kept.prompt[0]["content"] for kept in inputs.imitate] == [REST]
    assert inputs.dropped == {"data.imitate": 1}
