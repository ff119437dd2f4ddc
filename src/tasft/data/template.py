"""How prompts and replies are written as token ids, in a chat template or in Alpaca's form."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tasft.core.errors import UserError
from tasft.data.rows import Messages, asked
from tasft.data.settings import PromptFormat

Tools = list[dict[str, Any]]

# Taori et al. 2023, without and with input.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)

# What opens and what closes a thought, by model family.
THOUGHTS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, SmolLM3, GLM
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)

_AROUND = 16  # Tokens before a text that are decoded with it, so that it keeps the space that it begins with.


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    style: PromptFormat,
    *,
    input: str = "",
    tools: Tools | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt, up to where the reply begins.

    Args:
        tokenizer: Of the model.
        prompt: Text, or chat messages.
        style: How it is written.
        input: As in `tasft.data.rows.Example`.
        tools: Likewise.
        chat_template_kwargs: Given to the chat template.

    Raises:
        UserError: The tokenizer has no chat template or the template refuses the messages, or messages
            or tools meet the Alpaca format.
    """
    if style == "chat":
        return _ids(tokenizer, asked(prompt, input), tools, chat_template_kwargs, ask=True)
    return _text_ids(tokenizer, _alpaca(prompt, input, tools))


def _alpaca(prompt: str | Messages, context: str, tools: Tools | None) -> str:
    if not isinstance(prompt, str):
        raise UserError("model.prompt is alpaca, but the prompt is chat messages: use chat, or text")
    if tools:
        raise UserError("model.prompt is alpaca, but there are tools, which only a chat template can write: use chat")
    return ALPACA_INPUT.format(instruction=prompt, input=context) if context else ALPACA.format(instruction=prompt)


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text).input_ids
    # Some tokenizers end every text with an end token; a prompt goes on.
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools | None,
    settings: Mapping[str, Any] | None,
    **how: Any,
) -> Any:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: say model.prompt=alpaca, or choose a chat model")
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **how, **(settings or {}))
    except Exception as error:  # A template is a program.
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template refuses the messages: {reason}") from None


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools | None,
    settings: Mapping[str, Any] | None,
    *,
    ask: bool,
) -> list[int]:
    """Token ids of a conversation; with `ask`, up to where the next reply begins."""
    ids: list[int] = _applied(
        tokenizer, messages, tools, settings, add_generation_prompt=ask, tokenize=True, return_dict=False
    )
    return ids


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | {tokenizer.eos_token_id}


def decoded(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens that go on after others, without special tokens.

    Decoded alone they may lose the space that they begin with, or begin with half a character.
    """
    around = list(before[-_AROUND:])
    known, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (around, [*around, *ids]))
    text: str = whole[len(known) :] if whole.startswith(known) else tokenizer.decode(ids, skip_special_tokens=True)
    return text


class WrittenTurn(NamedTuple):
    """One assistant turn.

    `ids` are all tokens up to the end of what it says. The model goes on from `asked`; what the row says
    begins at `begin`, later if the template puts something of its own between. `closing` is what ends the
    turn: one token, or several, with what the template writes before it. `end` is the first of them at
    which the model stops.
    """

    ids: list[int]
    asked: int
    begin: int
    closing: list[int]
    end: int

    @property
    def stop(self) -> int:
        """Where it ends: at the first end token, should the text hold one."""
        own = self.ids[self.begin :]
        return self.begin + (own.index(self.end) if self.end in own else len(own))

    @property
    def last(self) -> list[int]:
        """The tokens that end it: all that close it, or the one that its text holds."""
        return self.closing if self.stop == len(self.ids) else [self.end]


class Said(NamedTuple):
    """What a model wrote: its answer, and what it thought before, with its marks."""

    answer: str
    thought: str


def answer_in(text: str) -> Said:
    """What is said in a text whose tokenizer is not at hand, as a server's: a thought in known marks comes first.

    A text that is cut within its thought has no answer.
    """
    for opening, closing in THOUGHTS:
        thought, mark, answer = text.partition(closing)
        if mark:
            return Said(answer.strip(), thought + mark)
        if text.lstrip().startswith(opening):
            return Said("", text)
    return Said(text.strip(), "")


class Writer:
    """Writes prompts and replies in tokens, and reads replies.

    What a chat template writes by itself around any reply, such as an empty thought before it, an end
    token and a newline after it, is found once, by comparing two short replies.

    Attributes:
        lead: Tokens that the template writes before any reply.
        closing: Tokens that end a reply, and what the template writes between it and them.
        after: Tokens that follow, which no model writes.

    Raises:
        UserError: The tokenizer has no end token, or no template that takes a question and a reply.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptFormat,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token: set its eos_token, so that replies can end")
        self.tokenizer = tokenizer
        self.style: PromptFormat = style
        self.settings = chat_template_kwargs
        self.special = special_tokens(tokenizer)
        # Marks that were not added as special tokens may end a turn, too, where nothing but blanks comes before them.
        added = tokenizer.added_tokens_decoder.items()
        self.marks = self.special | {index for index, token in added if not token.content.isspace()}
        self.lead: list[int] = []
        self.closing: list[int] = [tokenizer.eos_token_id]
        self.after: list[int] = []
        self.closes = False
        if style == "chat":
            self._learn_frame()

    def _learn_frame(self) -> None:
        question = {"role": "user", "content": "?"}
        before = self.ids([question], ask=True)
        one, other = (self.ids([question, {"role": "assistant", "content": text}]) for text in ("0", "Z"))
        if one[: len(before)] == before:
            self.lead = common(one, other)[len(before) :]
        tail = common(one[::-1], other[::-1])[::-1]
        first = next((index for index, token in enumerate(tail) if self.tokenizer.decode([token]).strip()), None)
        ends = [index for index, token in enumerate(tail) if token in (self.marks if index == first else self.special)]
        self.closes = bool(ends)
        if not ends:
            self.after = tail
            return
        # A turn may end with several, as Cohere's does.
        stop = ends[0] + len(list(takewhile(self.marks.__contains__, tail[ends[0] :])))
        self.closing, self.after = tail[:stop], tail[stop:]

    def ids(self, messages: Messages, tools: Tools | None = None, *, ask: bool = False) -> list[int]:
        """Token ids of a conversation; with `ask`, up to where the next reply begins."""
        return _ids(self.tokenizer, messages, tools, self.settings, ask=ask)

    def prompt(self, prompt: str | Messages) -> list[int]:
        """As `encode_prompt`."""
        return encode_prompt(self.tokenizer, prompt, self.style, chat_template_kwargs=self.settings)

    @cached_property
    def ends(self) -> list[int]:
        """Tokens at which a reply ends: the tokenizer's, and those that close a turn of the template."""
        return sorted({self.tokenizer.eos_token_id, *(token for token in self.closing if token in self.marks)})

    # --- What rows say ------------------------------------------------------------------------

    def turn(self, messages: Messages, tools: Tools | None) -> WrittenTurn:
        """The last turn of a conversation, after proof that it begins where the model would begin it.

        Raises:
            UserError: The template refuses the messages, or writes the prompt otherwise once a reply follows.
        """
        before = self.ids(messages[:-1], tools, ask=True)
        whole = self.ids(messages, tools)
        if whole[: len(before)] != before:
            whole = self._apart(messages, tools, before) or whole
        if whole[: len(before)] != before:
            raise UserError(
                "the chat template writes the prompt otherwise when a reply follows, so the loss would fall on the "
                f"wrong tokens; {self._advice(before)}"
            )
        begin = len(before)
        if whole[begin : begin + len(self.lead)] == self.lead:
            begin += len(self.lead)
        if self.after and whole[-len(self.after) :] == self.after:
            whole = whole[: -len(self.after)]
        closing = [self.tokenizer.eos_token_id]
        if self.closes and whole[-len(self.closing) :] == self.closing:
            closing = self.closing
            whole = whole[: -len(closing)]
        elif self.closes and whole[-1] in self.marks:
            # A call of a tool may end with another one than a text.
            closing = [whole.pop()]
        end = next(token for token in closing if token in self.marks)
        return WrittenTurn(whole, len(before), begin, closing, end)

    def _apart(self, messages: Messages, tools: Tools | None, before: list[int]) -> list[int] | None:
        """A conversation whose last turn begins with text that the tokenizer joins to the prompt, such as a newline.

        The model goes on from the prompt's own tokens. None where the text itself is written otherwise.
        """
        question = str(self.text(messages[:-1], tools, add_generation_prompt=True))
        whole = str(self.text(messages, tools))
        if not whole.startswith(question):
            return None
        return [*before, *self.tokenizer(whole[len(question) :], add_special_tokens=False).input_ids]

    def text(self, messages: Messages, tools: Tools | None, **how: Any) -> str:
        """A conversation as the template writes it."""
        return str(_applied(self.tokenizer, messages, tools, self.settings, tokenize=False, **how))

    def _advice(self, before: list[int]) -> str:
        """What helps where the template writes a prompt otherwise once a reply follows."""
        template = str(self.tokenizer.chat_template)
        if "enable_thinking" in template and not (self.settings or {}).keys() & {"enable_thinking"}:
            return "say chat_template_kwargs: {enable_thinking: false}"
        if self._opened(before):
            return (
                "it opens a thought in the prompt and drops thoughts from replies: give the tokenizer a template that "
                "does neither, or say model.prompt=alpaca"
            )
        return "use another template"

    def alpaca(self, prompt: str | Messages, context: str, tools: Tools | None, reply: str) -> WrittenTurn:
        """A reply in Alpaca's form.

        Raises:
            UserError: The prompt is chat messages, or there are tools.
        """
        text = _alpaca(prompt, context, tools)
        before = _text_ids(self.tokenizer, text)
        ids = self._going_on(text, before, reply, add_special_tokens=True)
        return WrittenTurn(ids, len(before), len(before), self.closing, self.closing[0])

    def _going_on(self, text: str, before: list[int], reply: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text and of a reply that goes on right after it.

        Encoded alone, some tokenizers begin it with a space that the model would not write there.
        """
        whole: list[int] = self.tokenizer(text + reply, add_special_tokens=add_special_tokens).input_ids
        if add_special_tokens and self._adds_end:
            whole = whole[:-1]
        if whole[: len(before)] == before:
            return whole
        return [*before, *self.tokenizer(reply, add_special_tokens=False).input_ids]

    @cached_property
    def _adds_end(self) -> bool:
        return bool(self.tokenizer("x").input_ids[-1:] == [self.tokenizer.eos_token_id])

    def reply(self, prompt: str | Messages, text: str) -> tuple[list[int], int]:
        """Token ids of a prompt and of a reply's text, without its end, and where that text begins.

        They are those that a row learns. The text may be the beginning of a reply, from which the model goes on.
        """
        before = self.prompt(prompt)
        if not text:
            return before, len(before)
        if self.style == "alpaca":
            turn = self.alpaca(prompt, "", None, text)
            return turn.ids, turn.begin
        messages = asked(prompt)
        try:
            turn = self.turn([*messages, {"role": "assistant", "content": text}], None)
        except UserError:
            # Such a template trains nothing, but a model that has one can be asked.
            written = self.text(messages, None, add_generation_prompt=True)
            return self._going_on(written, before, text, add_special_tokens=False), len(before)
        return turn.ids, turn.begin

    # --- What models say ----------------------------------------------------------------------

    @cached_property
    def _marks(self) -> list[tuple[str, str]]:
        """What opens and closes a thought in this template or vocabulary."""
        known = self.tokenizer.get_added_vocab()
        template = str(self.tokenizer.chat_template or "")
        return [pair for pair in THOUGHTS if pair[1] in template or pair[1] in known]

    @cached_property
    def _special_texts(self) -> list[str]:
        """Special tokens as they are decoded, the longest first."""
        return sorted((self.tokenizer.decode([token]) for token in self.special), key=len, reverse=True)

    @cached_property
    def _before_answer(self) -> str:
        """What the template writes before an answer where it names what it writes, as gpt-oss' `final` channel."""
        text: str = self.tokenizer.decode(self.lead) if any(token in self.special for token in self.lead) else ""
        return "" if any(mark in text for pair in self._marks for mark in pair) else text.strip()

    @cached_property
    def thinks(self) -> bool:
        """Whether the model thinks before it answers.

        The template then opens a thought, writes an empty one, or names what is the answer.
        """
        if self.style != "chat":
            return False
        question = self.ids([{"role": "user", "content": "?"}], ask=True)
        lead = self.tokenizer.decode(self.lead)
        empty = any(opening in lead for opening, _ in self._marks)
        return self._opened(question) or empty or bool(self._plain(self._before_answer))

    def _opened(self, before: Sequence[int]) -> bool:
        """Whether a prompt ends within a thought."""
        end = self.tokenizer.decode(before[-_AROUND:]).rstrip()
        return end.endswith(tuple(opening for opening, _ in self._marks))

    def _plain(self, text: str) -> str:
        for special in self._special_texts:
            text = text.replace(special, "")
        return text.strip()

    def said(self, before: Sequence[int], ids: Sequence[int]) -> Said:
        """The answer of a reply, and the thought before it.

        A reply that was cut within its thought has no answer.

        Args:
            before: Tokens that the model was given.
            ids: Tokens that it wrote, without the one at which it ended.
        """
        plain = decoded(self.tokenizer, before, ids)
        if self.style != "chat" or not (self._marks or self._before_answer):
            return Said(plain, "")
        whole: str = self.tokenizer.decode(ids)
        ends = [*(closing for _, closing in self._marks), *filter(None, [self._before_answer])]
        cut = max((whole.rfind(end) + len(end) for end in ends if end in whole), default=0)
        if not cut:
            names = [text for text in self._special_texts if text and self._before_answer.startswith(text)]
            begun = whole.lstrip().startswith((*(opening for opening, _ in self._marks), *names))
            return Said("", whole.strip()) if begun or self._opened(before) else Said(plain, "")
        thought = whole[:cut]
        empty = thought
        for mark in (*(mark for pair in self._marks for mark in pair), self._before_answer):
            empty = empty.replace(mark, "")
        return Said(self._plain(whole[cut:]), thought.strip() if self._plain(empty) else "")


def common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The tokens with which both begin."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
