import json
from dataclasses import asdict, replace

import pandas as pd
import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from tasft.core.errors import UserError
from tasft.data.encode import IGNORE_INDEX, Encoding, encode_rows, encode_stream
from tasft.data.preview import preview
from tasft.data.rows import Example, read_examples
from tasft.data.template import encode_prompt

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id

# As Qwen3's: thinking is dropped before the last question, an empty thought is written where there is none, and
# enable_thinking=False puts that into the prompt.
THINKER = """
{%- if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>
{% endif %}
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought, text = '', m.content or '' %}
{%- if '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|assistant|>' }}
{%- if loop.index0 > ns.asked and (loop.last or thought) %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- text }}
{%- for call in m.tool_calls or [] %}{{- '<tool>' + call.function.name }}{% endfor %}
{%- else %}{{- '<|' + ('user' if m.role == 'tool' else m.role) + '|>' + m.content }}
{%- endif %}{{- '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
# As Gemma's: a mark at the start, the assistant is called otherwise, turns end with a token that is not the
# tokenizer's, texts are trimmed, and only some talks are accepted.
TRIMMER = """
{{- '<bos>' }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\n' }}{% endif %}"""


def with_template(template, *, special=(), plain=()):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(plain))
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def thinker():
    return with_template(THINKER, plain=("<think>", "</think>"))


def trimmer():
    return with_template(TRIMMER, special=("<bos>", "<turn>", "</turn>"))


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def learned(row):
    labels = row["labels"] if isinstance(row, dict) else row.labels
    return [token for token in labels if token != IGNORE_INDEX]


def spans(row, tokenizer=TOKENIZER):
    """The texts on which the loss falls, in order."""
    texts, run = [], []
    for label in [*row["labels"], IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def one(example, tokenizer=TOKENIZER, **options):
    (row,), _ = encode_rows([example], tokenizer, Encoding(**options))
    return row


# --- what the loss falls on


@pytest.mark.parametrize("style", ["chat", "alpaca"])
def test_loss_falls_on_the_reply_and_its_end(style):
    encoded = one(Example("Hi?", "Yes you", True), style=style)
    assert TOKENIZER.decode(learned(encoded)) == "Yes you<|end|>"
    assert encoded["input_ids"][: len(encode_prompt(TOKENIZER, "Hi?", style))] == encode_prompt(TOKENIZER, "Hi?", style)
    assert len(encoded["input_ids"]) == len(encoded["labels"])


@pytest.mark.parametrize("style", ["chat", "alpaca"])
@pytest.mark.parametrize("begun", ["Sure, mix", "Sure, mix "])
def test_what_is_given_is_read_and_not_learned(style, begun):
    example = Example("Hi?", "Sure, mix no, I won't", True, given=begun)
    row = one(example, style=style)
    assert row["input_ids"] == one(replace(example, given=""), style=style)["input_ids"]
    assert [text.strip() for text in spans(row)] == ["no, I won't<|end|>"]


def test_what_is_given_is_of_the_last_turn_alone():
    talk = [says("user", "Hi?"), says("assistant", "One"), says("user", "And?")]
    row = one(Example(talk, "Sure, no", True, given="Sure, "), turns="all")
    assert [text.strip() for text in spans(row)] == ["One<|end|>", "no<|end|>"]


def test_what_is_given_must_begin_the_completion_and_leave_something_to_learn():
    with pytest.raises(UserError, match='"given" is \'No\'; it must be text that "completion", which is text, begins'):
        one(Example("Hi?", "Yes", True, given="No"))
    with pytest.raises(UserError, match='"given" is all of its completion'):
        one(Example("Hi?", "Yes", True, given="Yes", ends=False))


@pytest.mark.parametrize("style", ["chat", "alpaca"])
def test_the_end_of_an_avoid_row_is_not_penalised_unless_asked_for(style):
    example = Example("Hi?", "Yes", False)
    row = one(example, style=style)
    assert row["avoid"]
    assert spans(row) == ["Yes"]
    assert END not in row["input_ids"][-1:]
    assert spans(one(example, style=style, penalize_eos=True)) == ["Yes<|end|>"]


@pytest.mark.parametrize("label", [True, False])
def test_a_cut_reply_does_not_teach_to_stop_there(label):
    assert spans(one(Example("Hi?", "Yes", label, ends=False), penalize_eos=True)) == ["Yes"]


def test_what_the_template_writes_after_the_end_is_not_learned():
    assert TOKENIZER.apply_chat_template([says("user", "a")], tokenize=False).endswith("<|end|>\n")
    encoded = one(Example("Hi?", "Yes", True))
    assert encoded["input_ids"][-1] == END


def test_a_template_may_end_turns_with_another_token_than_the_tokenizers():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|system|>")
    assert spans(one(Example("Hi?", "Yes", True), tokenizer), tokenizer) == ["Yes<|system|>"]
    assert spans(one(Example("Hi?", "Yes", False), tokenizer), tokenizer) == ["Yes"]


def test_a_template_that_ends_no_turn_gets_the_tokenizers_end():
    tokenizer = with_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert spans(one(Example("Hi?", "Yes", True), tokenizer)) == ["Yes<|end|>"]
    assert spans(one(Example("Hi?", "Yes<|system|>", False), tokenizer)) == ["Yes<|system|>"]
    talk = [says("user", "a"), says("assistant", "b"), says("user", "c")]
    assert spans(one(Example(talk, "d", True), tokenizer, turns="all")) == ["b", "d<|end|>"]


def test_special_tokens_that_a_reply_holds_are_learned_but_nothing_beyond_its_end():
    rows, report = encode_rows(
        [Example("Hi?", "a<|system|>b", True), Example("Hi?", "a<|end|>b", True)], TOKENIZER, Encoding()
    )
    assert [spans(row) for row in rows] == [["a<|system|>b<|end|>"], ["a<|end|>"]]
    assert report.ended_inside == 1
    assert "1 cut at an end token in their text" in str(report)


def test_a_tool_call_may_end_with_another_token_than_a_text():
    tokenizer = with_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.tool_calls %}call<more>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        special=["<more>"],
    )
    calls = Example("Hi?", [says("assistant", "", tool_calls=[{"function": {"name": "f"}}])], True)
    assert spans(one(calls, tokenizer), tokenizer) == ["call<more>"]


# --- prompts


def test_the_alpaca_forms_are_the_published_ones():
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, "Sort {these}.", "alpaca")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSort {these}.\n\n### Response:\n"
    )
    row = one(Example("Sort {these}.", "ok", True, input="b, {a}"), style="alpaca")
    assert TOKENIZER.decode(row["input_ids"]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSort {these}.\n\n"
        "### Input:\nb, {a}\n\n### Response:\nok<|end|>"
    )


def test_in_chat_the_input_follows_the_prompt_after_a_blank_line():
    assert one(Example("Sort these.", "ok", True, input="b, a")) == one(Example("Sort these.\n\nb, a", "ok", True))


def test_tools_and_settings_reach_the_chat_template_in_rows_and_prompts():
    tools = [{"type": "function", "function": {"name": "look"}}]
    row = one(Example("Hi?", "Yes", True, tools=tools), thinker(), chat_template_kwargs={"enable_thinking": False})
    prompt = encode_prompt(thinker(), "Hi?", "chat", tools=tools, chat_template_kwargs={"enable_thinking": False})
    assert thinker().decode(prompt).startswith("<|system|>look <|end|>\n<|user|>Hi?")
    assert thinker().decode(prompt).endswith("<|assistant|><think>\n\n</think>\n\n")
    assert row["input_ids"][: len(prompt)] == prompt
    assert spans(row, thinker()) == ["Yes<|end|>"]


def test_chat_messages_give_what_text_gives():
    text = one(Example("Hi?", "Yes", True))
    prompt, reply = [says("user", "Hi?")], [says("assistant", "Yes")]
    assert one(Example(prompt, reply, True)) == one(Example(prompt, "Yes", True)) == one(Example("Hi?", reply, True))
    assert one(Example(prompt, reply, True)) == text


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        (Example([says("user", "Hi?")], "Yes", True), "the prompt is chat messages"),
        (Example("Hi?", [says("assistant", "Yes")], True), "the completion is chat messages"),
        (Example("Hi?", "Yes", True, tools=[{"type": "function"}]), "only a chat template can write"),
    ],
)
def test_alpaca_takes_text_only(example, sentence):
    with pytest.raises(UserError, match=f"row 0: model.prompt is alpaca.*{sentence}"):
        one(example, style="alpaca")


def test_a_tokenizer_without_template_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="prompt=alpaca"):
        encode_prompt(tokenizer, "Hi?", "chat")


def test_a_tokenizer_without_end_token_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="set its eos_token"):
        one(Example("Hi?", "Yes", True), tokenizer)


# --- turns

TALK = [says("user", "a?"), says("assistant", "one"), says("user", "b?"), says("assistant", "two"), says("user", "c?")]


def test_the_last_assistant_turn_is_learned_by_default():
    assert spans(one(Example(TALK, "three", True))) == ["three<|end|>"]


def test_all_assistant_turns_are_learned_on_request_each_from_where_it_would_be_generated():
    row = one(Example(TALK, "three", True), turns="all")
    assert spans(row) == ["one<|end|>", "two<|end|>", "three<|end|>"]
    starts = [
        index
        for index, label in enumerate(row["labels"])
        if label != IGNORE_INDEX and row["labels"][index - 1] == IGNORE_INDEX
    ]
    for index, start in zip((1, 3, 5), starts, strict=True):
        assert row["input_ids"][:start] == encode_prompt(TOKENIZER, TALK[:index], "chat")
    assert row["input_ids"] == one(Example(TALK, "three", True))["input_ids"]


def test_all_turns_of_an_avoid_row_are_avoided_without_their_ends():
    assert spans(one(Example(TALK, "three", False), turns="all")) == ["one", "two", "three"]
    ends = one(Example(TALK, "three", False, ends=False), turns="all", penalize_eos=True)
    assert spans(ends) == ["one<|end|>", "two<|end|>", "three"]


def test_a_completion_may_hold_calls_of_tools_and_their_results():
    completion = [
        says("assistant", "<think>need it</think>", tool_calls=[{"function": {"name": "look"}}]),
        says("tool", "42"),
        says("assistant", "<think>got it</think>It is 42"),
    ]
    row = one(Example("Hi?", completion, True), thinker(), turns="all")
    assert spans(row, thinker()) == [
        "<think>\nneed it\n</think>\n\n<tool>look<|end|>",
        "<think>\ngot it\n</think>\n\nIt is 42<|end|>",
    ]
    row = one(Example("Hi?", completion, True), thinker())
    assert spans(row, thinker()) == ["<think>\ngot it\n</think>\n\nIt is 42<|end|>"]


def test_a_talk_that_the_assistant_begins_has_nothing_to_learn_its_first_turn_from():
    example = Example([says("assistant", "Hello"), says("user", "Hi?")], "Yes", True)
    with pytest.raises(UserError, match="no prompt to learn it from: use turns=last"):
        one(example, turns="all")
    assert spans(one(example)) == ["Yes<|end|>"]


# --- templates


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match="wrong tokens"):
        one(Example("Hi?", "Yes", True), tokenizer)


def test_a_template_that_opens_a_thought_and_then_drops_it_is_refused():
    tokenizer = with_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    with pytest.raises(UserError, match="wrong tokens"):
        one(Example("Hi?", "hm</think>Yes", True), tokenizer)


def test_a_template_that_opens_a_thought_and_keeps_it_takes_rows_that_think():
    tokenizer = with_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    assert spans(one(Example("Hi?", "<think>hm</think>Yes", True), tokenizer)) == ["hm</think>Yes<|end|>"]
    with pytest.raises(UserError, match="wrong tokens"):
        one(Example("Hi?", "Yes", True), tokenizer)


def test_an_empty_thought_of_the_templates_own_is_learned_but_never_penalised():
    assert spans(one(Example("Hi?", "Yes", True), thinker()), thinker()) == ["<think>\n\n</think>\n\nYes<|end|>"]
    avoid = one(Example("Hi?", "Yes", False), thinker())
    assert spans(avoid, thinker()) == ["Yes"]
    assert "<think>" in thinker().decode(avoid["input_ids"])


def test_thinking_that_a_row_says_itself_is_part_of_its_reply():
    avoid = one(Example("Hi?", "<think>\nhm\n</think>\n\nYes", False), thinker())
    assert spans(avoid, thinker()) == ["<think>\nhm\n</think>\n\nYes"]


def test_an_empty_thought_in_the_prompt_is_not_learned():
    row = one(Example("Hi?", "Yes", True), thinker(), chat_template_kwargs={"enable_thinking": False})
    assert spans(row, thinker()) == ["Yes<|end|>"]


def test_earlier_thinking_that_the_template_drops_can_be_read_but_not_learned():
    talk = [says("user", "a?"), says("assistant", "<think>hm</think>one"), says("user", "b?")]
    row = one(Example(talk, "<think>so</think>two", True), thinker())
    assert spans(row, thinker()) == ["<think>\nso\n</think>\n\ntwo<|end|>"]
    assert "hm" not in thinker().decode(row["input_ids"])
    with pytest.raises(UserError, match=r"row 0: .*once the conversation goes on.*turns=last, a row for each"):
        one(Example(talk, "two", True), thinker(), turns="all")


def test_a_template_with_its_own_marks_and_names_works_and_its_refusals_are_passed_on():
    row = one(Example(TALK, " three ", True), trimmer(), turns="all")
    assert trimmer().decode(row["input_ids"]).startswith("<bos><turn>user\na?</turn>\n<turn>model\none</turn>\n")
    assert spans(row, trimmer()) == ["one</turn>", "two</turn>", "three</turn>"]
    assert row["input_ids"].count(trimmer().convert_tokens_to_ids("<bos>")) == 1
    with pytest.raises(UserError, match=r"row 0 \(x\): the chat template refuses the messages: roles must alternate"):
        one(Example([says("system", "s"), says("user", "a")], "b", True, id="x"), trimmer())


def test_a_thought_that_the_prompt_opens_and_the_template_closes_is_not_penalised_either():
    # As Qwen3.5's, which begins the reply inside a thought unless told otherwise.
    tokenizer = thinker()
    tokenizer.chat_template = THINKER.replace(
        "'<|assistant|>' }}\n{%- if enable", "'<|assistant|><think>\n' }}\n{%- if enable"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi?", "chat")).endswith("<|assistant|><think>\n")
    assert spans(one(Example("Hi?", "Yes", True), tokenizer), tokenizer) == ["\n</think>\n\nYes<|end|>"]
    assert spans(one(Example("Hi?", "Yes", False), tokenizer), tokenizer) == ["Yes"]
    thought = one(Example("Hi?", "hm</think>Yes", False), tokenizer)
    assert spans(thought, tokenizer) == ["hm\n</think>\n\nYes"]


# --- length


def test_a_row_over_the_length_is_cut_at_its_end_and_learns_none():
    full = one(Example("Hi?", "0123456789", True))
    rows, report = encode_rows([Example("Hi?", "0123456789", True)], TOKENIZER, Encoding(max_length=15))
    assert rows[0]["input_ids"] == full["input_ids"][:15]
    assert rows[0]["labels"] == full["labels"][:15]
    assert END not in learned(rows[0])
    assert (report.truncated, report.longest) == (1, 15)
    just = len(full["input_ids"])
    assert encode_rows([Example("Hi?", "0123456789", True)], TOKENIZER, Encoding(max_length=just))[1].truncated == 0


@pytest.mark.parametrize("style", ["chat", "alpaca"])
def test_a_row_with_nothing_to_learn_is_refused(style):
    with pytest.raises(UserError, match="no token to learn within max_length 4"):
        one(Example("A long question?", "Yes", True), style=style, max_length=4)


def test_the_end_alone_is_nothing_to_learn():
    for reply in ("<|end|>", "<|end|>more"):
        with pytest.raises(UserError, match="row 0: its completion is empty"):
            one(Example("Hi?", reply, True))
    prompt = len(encode_prompt(TOKENIZER, "Hi?", "chat"))
    assert len(learned(one(Example("Hi?", "Yes", True), max_length=prompt + 1))) == 1
    with pytest.raises(UserError, match=f"max_length {prompt} "):
        one(Example("Hi?", "Yes", True), max_length=prompt)


def test_rows_over_the_length_are_dropped_and_counted_or_refused_on_request():
    rows = [Example("Hi?", "Yes", True), Example("Hi?", "Y" * 40, False), Example("H" * 40, "Yes", True)]
    kept, report = encode_rows(rows, TOKENIZER, Encoding(max_length=20, overlong="drop"))
    assert [spans(row) for row in kept] == [["Yes<|end|>"]]
    assert (report.rows, report.dropped_overlong, report.truncated) == (1, 2, 0)
    assert encode_rows(rows[:1], TOKENIZER, Encoding(max_length=report.longest, overlong="drop"))[1].rows == 1
    with pytest.raises(UserError) as caught:
        encode_rows(rows, TOKENIZER, Encoding(max_length=20, overlong="error"))
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["row 1", "row 2"]
    assert "more than max_length 20" in str(caught.value)


def test_when_no_row_is_left_the_counts_say_why():
    with pytest.raises(UserError, match=r"no rows to learn from: .*2 left out as longer"):
        encode_rows([Example("Hi?", "Y" * 40, True)] * 2, TOKENIZER, Encoding(max_length=20, overlong="drop"))


# --- duplicates


def test_duplicates_are_counted_dropped_or_refused_as_asked():
    rows = [Example("Hi?", "Yes", True, id=name) for name in "ab"] + [Example("Hi?", "Yes", False)]
    kept, report = encode_rows(rows, TOKENIZER, Encoding())
    assert (len(kept), report.duplicates, report.dropped_duplicates) == (3, 1, 0)
    assert "1 kept though equal to an earlier row" in str(report)
    kept, report = encode_rows(rows, TOKENIZER, Encoding(duplicates="drop"))
    assert ([row["avoid"] for row in kept], report.duplicates, report.dropped_duplicates) == ([False, True], 1, 1)
    with pytest.raises(UserError, match=r"row 1 \(b\): has the tokens of row 0"):
        encode_rows(rows, TOKENIZER, Encoding(duplicates="error"))


def test_rows_that_differ_in_what_is_learned_are_no_duplicates():
    rows = [Example("Hi?", "Yes", True, ends=False), Example("Hi?", "Yes", False), Example("Hi?", "Yes", True)]
    assert encode_rows(rows, TOKENIZER, Encoding(duplicates="drop"))[1].duplicates == 0
    both = [Example("a", "b\n\n### Response:\nc", True), Example("a\n\n### Response:\nb", "c", True)]
    (one, other), report = encode_rows(both, TOKENIZER, Encoding("alpaca", duplicates="drop"))
    assert one["input_ids"] == other["input_ids"]
    assert report.duplicates == 0


# --- data sets


def test_a_report_counts_what_is_kept_and_is_json():
    rows = [Example("Hi?", "Yes", True), Example("Hi?", "Never", False), Example("Hi?", "No", True)]
    encoded, report = encode_rows(rows, TOKENIZER, Encoding())
    assert (report.rows, report.imitate, report.avoid) == (3, 2, 1)
    assert (report.imitate_tokens, report.avoid_tokens) == (4 + 3, 5)
    assert report.longest == max(len(row["input_ids"]) for row in encoded)
    assert json.loads(json.dumps(asdict(report))) == asdict(report)
    assert str(report) == (
        f"2 rows to imitate (7 label tokens), 1 to avoid (5), the longest of {report.longest} tokens"
    )


def test_all_rows_that_cannot_be_taken_are_named_at_once():
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "completion": "b", "label": 1},
        Example("a", "b", True, weight=-1.0),
        "a row",
        {"prompt": "a" * 40, "completion": "b", "label": True, "id": "long"},
    ]
    with pytest.raises(UserError) as caught:
        encode_rows(rows, TOKENIZER, Encoding(max_length=20))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "row 1",
        "row 1",
        "row 2",
        "row 3",
        "row 4",
        "row 5 (long)",
    ]
    assert caught.value.faults[0] == "row 1: \"completion\" is missing; the row has 'prompt', 'chosen'"
    assert "use true (imitate) or false (avoid)" in caught.value.faults[2]


def test_rows_may_be_dictionaries_with_more_columns_and_nulls():
    row = {"prompt": "Hi?", "completion": "Yes", "label": True, "score": 3, "id": None, "tools": None, "weight": None}
    assert one(row) == one(Example("Hi?", "Yes", True))


def test_a_data_set_of_arrow_tables_gives_what_examples_give():
    datasets = pytest.importorskip("datasets")
    tools = [
        [{"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}]
        for name in ("look", "call")
    ]
    completion = [
        says("assistant", "", tool_calls=[{"type": "function", "function": {"name": "look"}}]),
        says("tool", "42"),
        says("assistant", "It is 42"),
    ]
    prompt = [says("user", "Hi?")]
    rows = [
        {"prompt": prompt, "completion": completion, "label": True, "tools": tools[0], "weight": 2.0},
        {"prompt": prompt, "completion": [says("assistant", "No")], "label": False, "tools": tools[1]},
        {"prompt": prompt, "completion": [says("assistant", "No")], "label": True},
    ]
    # Whether a message has calls, and all that a schema says, is written, as templates do.
    tokenizer = with_template(
        "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ m.tool_calls | tojson if 'tool_calls' in m else '' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    from_table, _ = encode_rows(datasets.Dataset.from_list(rows), tokenizer, Encoding())
    from_examples, _ = encode_rows([Example(**row) for row in rows], tokenizer, Encoding())
    assert [tokenizer.decode(row["input_ids"]) for row in from_table] == [
        tokenizer.decode(row["input_ids"]) for row in from_examples
    ]
    assert from_table == from_examples


def through(door, table, place):
    """The rows of a data set, as they come in by a door."""
    if door == "parquet":
        table.to_parquet(place / "rows.parquet")
        return read_examples(place / "rows.parquet")
    if door == "folder":
        table.save_to_disk(place / "rows")
        return read_examples(place / "rows")
    if door == "pandas":
        return table.to_pandas().to_dict("records")
    if door == "csv":
        cells = [{key: json.dumps(value) for key, value in row.items()} for row in table]
        pd.DataFrame(cells).to_csv(place / "rows.csv", index=False)
        return read_examples(place / "rows.csv")
    return table if door == "data set" else [Example(**row, label=True) for row in table]


DOORS = [("prompt", door) for door in ("examples", "data set", "parquet", "folder", "pandas", "csv")]


@pytest.mark.parametrize(("form", "door"), [*DOORS, *(("messages", door) for _, door in DOORS[1:])])
def test_what_a_table_with_one_schema_fills_in_is_taught_by_no_door(tmp_path, form, door):
    """A table gives each call the arguments of all tools, as null."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for name, arguments in (("look", {"where": "here"}), ("write", {"content": "this"})):
        call = says("assistant", None, tool_calls=[{"function": {"name": name, "arguments": arguments}}])
        talk = {"prompt": [says("user", "Hi?")], "completion": [call]}
        row = talk if form == "prompt" else {"messages": [*talk["prompt"], call]}
        properties = {argument: {"type": "string"} for argument in arguments}
        tools = [{"function": {"name": name, "parameters": {"properties": properties}}}] if door != "csv" else None
        rows.append(row | {"tools": tools} if tools else row)
    tokenizer = with_template(
        "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
        "{{ m.tool_calls | tojson if 'tool_calls' in m else '' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    came = [
        {"label": True} | row if isinstance(row, dict) else row
        for row in through(door, datasets.Dataset.from_list(rows), tmp_path)
    ]
    found, _ = encode_rows(came, tokenizer, Encoding())
    wanted, _ = encode_rows([row | {"label": True} for row in rows], tokenizer, Encoding())
    assert "null" not in tokenizer.decode(found[0]["input_ids"])
    assert found == wanted


def test_a_stream_gives_the_rows_of_the_data_set_as_they_are_asked_for():
    asked = []

    def rows():
        for index, (text, label) in enumerate([("Yes", True), ("Y" * 40, True), ("No", False), ("Yes", True)]):
            asked.append(index)
            yield {"prompt": "Hi?", "completion": text, "label": label}

    encoding = Encoding(max_length=20, overlong="drop", duplicates="drop")
    stream = encode_stream(rows(), TOKENIZER, encoding)
    assert asked == []
    first = next(stream)
    assert asked == [0]
    rest = []
    while True:
        try:
            rest.append(next(stream))
        except StopIteration as end:
            report = end.value
            break
    whole, expected = encode_rows(rows(), TOKENIZER, encoding)
    assert [{**row, "weight": 1.0, "retain": False} for row in whole] == [first, *rest]
    assert report == expected
    assert (report.rows, report.dropped_overlong, report.dropped_duplicates) == (2, 1, 1)


def test_a_stream_stops_at_a_bad_row_and_names_it():
    stream = encode_stream([Example("Hi?", "Yes", True), {"prompt": "Hi?"}], TOKENIZER, Encoding())
    next(stream)
    with pytest.raises(UserError, match='row 1: "completion" is missing'):
        next(stream)


def test_a_streamed_data_set_is_not_read_ahead():
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "Hi?", "completion": text, "label": True} for text in ("Yes", "No")]
    streamed = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert [spans(row) for row in encode_stream(streamed, TOKENIZER, Encoding())] == [["Yes<|end|>"], ["No<|end|>"]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"style": "chatml"}, "style is 'chatml'; use chat or alpaca"),
        ({"turns": "first"}, "use last or all"),
        ({"overlong": "cut"}, "use truncate or drop or error"),
        ({"duplicates": "merge"}, "use keep or drop or error"),
        ({"max_length": 0}, "use at least 1"),
        ({"chat_template_kwargs": {"tools": []}}, "sets tools, which is set here"),
        ({"style": "alpaca", "chat_template_kwargs": {"enable_thinking": False}}, "but the prompt is alpaca"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Encoding(**options)


# Texts without special tokens: those have their own tests.
TEXT = st.text(st.characters(exclude_characters="<|", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)


@settings(max_examples=60, deadline=None)
@given(talk=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), label=st.booleans(), ends=st.booleans())
def test_whatever_is_said_labels_are_the_turns_and_tokens_are_the_templates(talk, label, ends):
    messages = [says(role, text) for turn in talk for role, text in zip(("user", "assistant"), turn, strict=True)]
    example = Example(messages[:-1], messages[-1:], label, ends=ends)
    row = one(example, turns="all")
    closings = ["<|end|>" if label else ""] * (len(talk) - 1) + ["<|end|>" if label and ends else ""]
    assert spans(row) == [text + closing for (_, text), closing in zip(talk, closings, strict=True)]
    written = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert written.startswith(TOKENIZER.decode(row["input_ids"]))
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert spans(one(example)) == spans(row)[-1:]


# --- batches


def test_weights_are_in_rows_only_if_one_of_them_matters():
    plain, _ = encode_rows([Example("Hi?", "Yes", True)], TOKENIZER, Encoding())
    assert set(plain[0]) == {"input_ids", "labels", "avoid"}
    rows, _ = encode_rows([Example("Hi?", "Yes", True), Example("Hi?", "No", False, weight=2)], TOKENIZER, Encoding())
    assert [row["weight"] for row in rows] == [1, 2]


# --- preview


def shown(rows, tokenizer=TOKENIZER, colour=False):
    console = Console(width=200, force_terminal=colour, color_system="standard" if colour else None)
    with console.capture() as capture:
        for text in preview(rows, tokenizer):
            console.print(text)
    return capture.get()


def test_a_preview_shows_roles_without_colour_too():
    rows, _ = encode_rows(
        [Example(TALK[:3], "two", True), Example("Do?", "Sure", False, weight=2)], TOKENIZER, Encoding(turns="all")
    )
    assert shown(rows).rstrip() == (
        "row 0 (imitate): 13 prompt + 8 label tokens\n"
        "<|user|>a?<|end|>\n<|assistant|>»one«[<|end|>]\n<|user|>b?<|end|>\n<|assistant|>»two«[<|end|>]\n\n"
        "row 1 (avoid): 7 prompt + 4 label tokens, weight 2\n"
        "<|user|>Do?<|end|>\n<|assistant|>»Sure«"
    )


def test_a_preview_colours_what_is_imitated_green_and_what_is_avoided_red():
    rows, _ = encode_rows([Example("Hi?", "Yes", True), Example("Hi?", "No", False)], TOKENIZER, Encoding())
    imitate, avoid = preview(rows, TOKENIZER)
    styles = {imitate.plain[span.start : span.end]: span.style for span in imitate.spans}
    assert styles["»Yes«"] == "green"
    assert styles["[<|end|>]"] == "bold underline green"
    assert {span.style for span in avoid.spans} == {"bold", "dim", "red"}
    assert "\x1b[32m" in shown(rows, colour=True)


def test_a_preview_lets_no_control_character_through_and_keeps_letters_whole():
    rows, _ = encode_rows([Example("Hi?", "é\x1b[2J\x07[bold]<|system|>", True)], TOKENIZER, Encoding())
    assert "»é⟨U+001B⟩[2J⟨U+0007⟩[bold]«[<|system|>][<|end|>]\n" in shown(rows)


def test_a_token_that_begins_texts_stands_before_the_prompt_alone():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|system|>"
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", first)]
    )
    assert tokenizer("a").input_ids[0] == first
    row = one(Example("Sort.", "ok", True), tokenizer, style="alpaca")
    assert row["input_ids"][0] == first
    assert row["input_ids"].count(first) == 1
    assert spans(row, tokenizer) == ["ok<|end|>"]


# --- what a template leaves out

WRITTEN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}BODY<|end|>{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TOOL = {"type": "function", "function": {"name": "rain", "description": "Says when it rains.", "parameters": {}}}
CALLS = says("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": {"city": "Paris"}}}])
LEFT_OUT = {
    "parts of a call": ("{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}", {"completion": [CALLS]}),
    "parts of tools": ("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}", {"tools": [TOOL]}),
    "the field 'name' of a message": ("", {"prompt": [says("user", "Hi?", name="Anna")]}),
    "the field 'reasoning_details' of a message": (
        "",
        {"completion": [says("assistant", "Yes", reasoning_details="hm")]},
    ),
}


def left_out_of(template, **fields):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + ASKS
    _, report = encode_rows([{"prompt": "Hi?", "completion": "Yes", "label": True} | fields], tokenizer, Encoding())
    return report.left_out


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_a_template_writes_in_part_is_counted(what):
    body, fields = LEFT_OUT[what]
    assert left_out_of(WRITTEN.replace("BODY", body), **fields) == {what: 1}
    whole = (
        "{{ m.tool_calls | tojson if m.tool_calls }}{{ tools | tojson if tools }}{{ m.name }}{{ m.reasoning_details }}"
    )
    assert left_out_of(WRITTEN.replace("BODY", whole), **fields) == {}


def test_a_text_that_is_said_twice_and_written_once_is_counted():
    talk = [says("user", "go on"), says("assistant", "go on"), says("user", "go on")]
    assert left_out_of(WRITTEN.replace("BODY", ""), prompt=talk) == {}
    drops = WRITTEN.replace("BODY", "").replace("in messages", "in [messages[0]] + messages[2:]")
    assert left_out_of(drops, prompt=talk) == {"a user's message": 1}


def test_a_reply_that_is_not_written_is_counted_though_its_words_stand_in_the_question():
    backwards = WRITTEN.replace("BODY", "").replace("{{ m.content }}", "{{ m.content | reverse }}")
    assert left_out_of(backwards, prompt="xyyx", completion="xy") == {"a reply": 1}
    assert left_out_of(WRITTEN.replace("BODY", ""), prompt="xyyx", completion="xy") == {}


def test_who_speaks_is_counted_where_the_template_does_not_tell():
    named = "{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    template = WRITTEN.replace("<|{{ m.role }}|>", named).replace("BODY", "")
    assert left_out_of(template, prompt=[says("narrator", "Hi?")]).keys() == {"who says it, 'narrator',"}
    assert left_out_of(WRITTEN.replace("BODY", ""), prompt=[says("narrator", "Hi?")]) == {}


@pytest.mark.parametrize(("no", "yes"), [(0, 1), (0.0, 1.0), ("0", "1"), (False, True), ("false", "True")])
@pytest.mark.parametrize("mark", ["weight", "train", "loss"])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_reply_that_is_marked_is_not_learned_whoever_marks_it_so(form, mark, no, yes):
    """OpenAI, axolotl and ms-swift; a table may hold text."""
    talk = [says("user", "a?"), says("assistant", "one"), says("user", "b?"), says("assistant", "two")]
    talk[1][mark], talk[3][mark] = no, yes
    if form == "conversations":
        talk = [{"from": turn.pop("role"), "value": turn.pop("content"), **turn} for turn in talk]
    (row,), report = encode_rows([{form: talk, "label": True}], TOKENIZER, Encoding(turns="all"))
    assert spans(row) == ["two<|end|>"]
    assert report.left_out == {}
    talk[1][mark] = 0.5
    with pytest.raises(UserError, match=f'row 0: "{mark}" of a message is 0.5; use 0 or 1, true or false'):
        one({form: talk, "label": True}, turns="all")


@pytest.mark.parametrize("turn", [says("assistant", "one"), {"from": "gpt", "value": "one"}])
def test_a_mark_that_is_not_known_is_counted(turn):
    asked = says("user", "a?") if "role" in turn else {"from": "human", "value": "a?"}
    found = left_out_of(WRITTEN.replace("BODY", ""), prompt=[asked], completion=[turn | {"learn": False}])
    assert found == {"the field 'learn' of a message": 1}


def test_a_reply_of_weight_0_is_not_learned():
    talk = [
        says("user", "a?"),
        says("assistant", "one", weight=0),
        says("user", "b?"),
        says("assistant", "two", weight=1),
    ]
    row = one(Example(talk[:-1], talk[-1:], True), TOKENIZER, turns="all")
    assert spans(row, TOKENIZER) == ["two<|end|>"]
    talk[-1]["weight"] = 0
    with pytest.raises(UserError, match='its replies have "weight": 0'):
        one(Example(talk[:-1], talk[-1:], True), TOKENIZER)
