from tasft.data.contamination import overlapping

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
