import pytest
from conftest import tiny_tokenizer

from tasft.data import Example
from tasft.encode import IGNORE_INDEX, collate, encode, encode_prompt
from tasft.errors import UserError

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


def learned(encoded):
    return [token for token in encoded.labels if token != IGNORE_INDEX]


@pytest.mark.parametrize("style", ["chat", "alpaca"])
def test_loss_falls_on_the_reply_and_its_end(style):
    encoded = encode(TOKENIZER, Example("Hi?", "Yes you", True), style, 500)
    assert TOKENIZER.decode(learned(encoded)) == "Yes you<|end|>"
    assert encoded.input_ids[: len(encode_prompt(TOKENIZER, "Hi?", style))] == encode_prompt(TOKENIZER, "Hi?", style)
    assert len(encoded.input_ids) == len(encoded.labels)


def test_the_end_of_an_avoid_row_is_not_penalised():
    encoded = encode(TOKENIZER, Example("Hi?", "Yes", False), "chat", 500)
    assert encoded.avoid
    assert TOKENIZER.decode(learned(encoded)) == "Yes"


def test_a_cut_reply_does_not_teach_to_stop_there():
    encoded = encode(TOKENIZER, Example("Hi?", "Yes", True, ends=False), "chat", 500)
    assert END not in learned(encoded)


def test_what_the_template_writes_after_the_end_is_not_learned():
    assert TOKENIZER.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).endswith("<|end|>\n")
    encoded = encode(TOKENIZER, Example("Hi?", "Yes", True), "chat", 500)
    assert encoded.input_ids[-1] == END


def test_a_template_may_end_turns_with_another_token_than_the_tokenizers():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|system|>")
    encoded = encode(tokenizer, Example("Hi?", "Yes", True), "chat", 500)
    assert tokenizer.decode(learned(encoded)) == "Yes<|system|>"
    assert tokenizer.decode(learned(encode(tokenizer, Example("Hi?", "Yes", False), "chat", 500))) == "Yes"


def test_chat_messages_give_what_text_gives():
    as_text = encode(TOKENIZER, Example("Hi?", "Yes", True), "chat", 500)
    messages = Example([{"role": "user", "content": "Hi?"}], [{"role": "assistant", "content": "Yes"}], True)
    assert encode(TOKENIZER, messages, "chat", 500) == as_text


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match="wrong tokens"):
        encode(tokenizer, Example("Hi?", "Yes", True), "chat", 500)


def test_a_row_with_nothing_to_learn_is_refused():
    with pytest.raises(UserError, match="max_length 4"):
        encode(TOKENIZER, Example("A long question?", "Yes", True), "chat", 4)


def test_a_tokenizer_without_template_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="prompt=alpaca"):
        encode_prompt(tokenizer, "Hi?", "chat")


def test_padding_is_masked_and_ignored():
    rows = [vars(encode(TOKENIZER, Example("Hi?", text, True), "chat", 500)) for text in ("Yes", "No, not at all")]
    batch = collate(rows, pad_token_id=END)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
