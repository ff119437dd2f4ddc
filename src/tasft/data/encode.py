"""From text to token ids: what the model reads, and which tokens a loss falls on."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from tasft.core.errors import UserError
from tasft.core.settings import setting
from tasft.data.cells import is_learned
from tasft.data.left_out import CALL, left_out
from tasft.data.rows import Example, Messages, asked, example_of
from tasft.data.settings import AvoidSettings, Duplicates, Overlong, PromptFormat, PromptSettings, RowSettings, Turns
from tasft.data.template import Writer, WrittenTurn, common, encode_prompt
from tasft.loss.tokens import IGNORE_INDEX

Row = dict[str, Any]

_CHOICES = {
    "style": get_args(PromptFormat),
    "turns": get_args(Turns),
    "overlong": get_args(Overlong),
    "duplicates": get_args(Duplicates),
}
_SET_HERE = {"conversation", "tools", "add_generation_prompt", "tokenize", "return_dict"}


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens.

    Attributes:
        style: How prompts are written: the tokenizer's `chat` template, or `alpaca`.
        max_length: Longest row in tokens.
        turns: The assistant turns whose tokens are labels: the `last` one, or `all`, those in the prompt too.
        penalize_eos: Whether the end token of an avoid row is a label, as the paper reads. Pushing it down
            makes endless answers.
        overlong: A row of more tokens: `truncate` cuts its end, `drop` leaves it out, `error` refuses the data.
        duplicates: A row with the tokens, labels and kind of an earlier one: `keep`, `drop` or `error`.
        chat_template_kwargs: Given to the chat template wherever a prompt is written, in training and in
            generation, such as `{"enable_thinking": False}`.

    Raises:
        UserError: A value is none of these.
    """

    style: PromptFormat = setting(PromptSettings, "prompt")
    max_length: int = setting(RowSettings, "max_length")
    turns: Turns = setting(RowSettings, "turns")
    penalize_eos: bool = setting(AvoidSettings, "penalize_eos")
    overlong: Overlong = setting(RowSettings, "overlong")
    duplicates: Duplicates = setting(RowSettings, "duplicates")
    chat_template_kwargs: dict[str, Any] = setting(PromptSettings, "chat_template_kwargs")

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}; use {' or '.join(choices)}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        if self.max_length < 1:
            faults.append(f"max_length is {self.max_length}; use at least 1")
        if taken := sorted(_SET_HERE & self.chat_template_kwargs.keys()):
            faults.append(f"chat_template_kwargs sets {', '.join(taken)}, which is set here: leave it out")
        if self.style == "alpaca" and self.chat_template_kwargs:
            faults.append("chat_template_kwargs is for a chat template, but the prompt is alpaca: leave it out")
        if faults:
            raise UserError(faults)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row and its labels, of equal length.

    Attributes:
        input_ids: Prompt and completion.
        labels: The token at its own position, `IGNORE_INDEX` where no loss falls.
        avoid: Whether the labels are tokens to move away from.
        truncated: Whether the row was cut at the longest length.
        ended_inside: Whether a text held the end token of its turn: the model would stop there, so that
            nothing after it is learned.
        left_out: What the row says and the chat template does not write.
        unknown: Whether the tokenizer has no token for a part of it.
    """

    input_ids: list[int]
    labels: list[int]
    avoid: bool
    truncated: bool = False
    ended_inside: bool = False
    left_out: tuple[str, ...] = ()
    unknown: bool = False


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows of a data set. All numbers count; `asdict` is JSON.

    Attributes:
        imitate: Rows to imitate that are kept.
        avoid: Rows to avoid that are kept.
        imitate_tokens: Labels of the former.
        avoid_tokens: Labels of the latter.
        longest: Tokens of the longest row kept.
        truncated: Rows cut at the longest length.
        ended_inside: Rows whose text held the end token: not learned beyond it.
        unknown: Rows with a part that the tokenizer has no token for.
        left_out: What rows say and the chat template does not write, such as a thought -> rows.
        dropped_overlong: Rows left out because they were longer.
        duplicates: Rows equal to an earlier one, kept or not; a stream that keeps them does not count them.
        dropped_duplicates: Those left out.
    """

    imitate: int
    avoid: int
    imitate_tokens: int
    avoid_tokens: int
    longest: int
    truncated: int
    ended_inside: int
    dropped_overlong: int
    duplicates: int
    dropped_duplicates: int
    unknown: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that are kept."""
        return self.imitate + self.avoid

    @property
    def notes(self) -> list[str]:
        """What became of rows otherwise than one would expect, with its count."""
        kept = self.duplicates - self.dropped_duplicates
        seldom = {
            "cut at max_length": self.truncated,
            "cut at an end token in their text": self.ended_inside,
            "left out as longer than max_length": self.dropped_overlong,
            "left out as equal to an earlier row": self.dropped_duplicates,
            "kept though equal to an earlier row": kept,
            "with characters that the tokenizer does not know": self.unknown,
            **{f"with {what} that the chat template does not write": count for what, count in self.left_out.items()},
        }
        return [f"{count} {what}" for what, count in seldom.items() if count]

    def __str__(self) -> str:
        """One line; what did not occur is not mentioned."""
        return "; ".join(
            [
                f"{self.imitate} rows to imitate ({self.imitate_tokens} label tokens), {self.avoid} to avoid "
                f"({self.avoid_tokens}), the longest of {self.longest} tokens",
                *self.notes,
            ]
        )


class _Encoder:
    """Encodes one row after another."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
        self.writer = Writer(tokenizer, encoding.style, encoding.chat_template_kwargs)
        self.encoding = encoding
        self.same: dict[int, int] = {}
        # GPT-2 and others have no such token, and name their end token for it.
        unknown = tokenizer.unk_token_id
        self.unknown = None if unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id) else unknown

    def __call__(self, example: Example) -> Encoded | None:
        """The row; None if it is to be dropped as too long.

        Raises:
            UserError: It cannot be encoded, or has nothing to learn.
        """
        turns, left_out = self._turns(example)
        learns_end = example.label or self.encoding.penalize_eos
        last = turns[-1]
        ids = last.ids[: last.stop]
        if learns_end and example.ends:
            ids += last.last
        # One object for each id: new ones in every row take twice the memory of the lists that hold them.
        ids = [self.same.setdefault(token, token) for token in ids]
        labels = [IGNORE_INDEX] * len(ids)
        for turn in turns:
            start = turn.asked if example.label else turn.begin
            stop = turn.stop
            # Some templates write no end token, and only the last turn gets one from us.
            if learns_end and ids[stop : stop + len(turn.last)] == turn.last:
                stop += len(turn.last)
            labels[start:stop] = ids[start:stop]
            if not example.label:
                # What the template writes by itself is not the reply's fault, nor a second end token.
                closing = range(turn.stop, stop)
                penalised = turn.stop + turn.last.index(turn.end)
                for position in closing:
                    labels[position] = ids[position] if position == penalised else IGNORE_INDEX
        begins = [turn.begin for turn in turns if turn.begin < turn.stop]
        if not begins:
            raise UserError("its completion is empty, so there is nothing to learn; drop the row")
        if example.given:
            begun = len(common(ids, self._turns(replace(example, completion=example.given))[0][-1].ids))
            labels[last.asked : begun] = [IGNORE_INDEX] * (begun - last.asked)
            begins[-1] = begun
            if all(label == IGNORE_INDEX for label in labels[last.asked :]):
                raise UserError('"given" is all of its completion, so there is nothing to learn; drop the row')
        limit = self.encoding.max_length
        if len(ids) > limit:
            if self.encoding.overlong == "drop":
                return None
            if self.encoding.overlong == "error":
                raise UserError(f"{len(ids)} tokens are more than max_length {limit}; raise it or shorten the row")
            if min(begins) >= limit:
                raise UserError(
                    f"no token to learn within max_length {limit} (the prompt has {min(begins)} tokens); raise it or "
                    "drop the row"
                )
        ended_inside = any(turn.stop < len(turn.ids) for turn in turns)
        return Encoded(
            ids[:limit],
            labels[:limit],
            not example.label,
            len(ids) > limit,
            ended_inside,
            left_out,
            self.unknown in ids,
        )

    def _turns(self, example: Example) -> tuple[list[WrittenTurn], tuple[str, ...]]:
        return self._alpaca(example) if self.encoding.style == "alpaca" else self._chat(example)

    def _alpaca(self, example: Example) -> tuple[list[WrittenTurn], tuple[str, ...]]:
        if not isinstance(example.completion, str):
            raise UserError("model.prompt is alpaca, but the completion is chat messages: use chat, or text")
        return [self.writer.alpaca(example.prompt, example.input, example.tools, example.completion)], ()

    def _chat(self, example: Example) -> tuple[list[WrittenTurn], tuple[str, ...]]:
        messages = _messages(example)
        spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.encoding.turns == "last":
            spoken = spoken[-1:]
        spoken = [index for index in spoken if is_learned(messages[index])]
        if not spoken:
            raise UserError(
                'its replies have "weight": 0 or "train" or "loss": false, so there is nothing to learn; drop the row'
            )
        if spoken[0] == 0:
            raise UserError("the first message is the assistant's, with no prompt to learn it from: use turns=last")
        missing = left_out(self.writer, messages, example.tools)
        if any(what == CALL and number in spoken for number, what in missing):
            raise UserError(
                "its reply calls a tool, which the chat template does not write: use a template that does, or drop the "
                "row"
            )
        turns = [self.writer.turn(messages[: index + 1], example.tools) for index in spoken]
        if any(turns[-1].ids[: len(turn.ids)] != turn.ids for turn in turns):
            raise UserError(
                "the chat template changes an earlier reply once the conversation goes on (drops the thinking, say): "
                "the model would learn another text than it is to say: use turns=last, a row for each reply, or "
                "chat_template_kwargs that keep it"
            )
        return turns, tuple(dict.fromkeys(what for _, what in missing))


def _messages(example: Example) -> Messages:
    """The whole conversation of a row."""
    reply = example.completion
    answer = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    return [*asked(example.prompt, example.input), *answer]


def prove(tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
    """See that a tokenizer writes prompts, and replies after them, before work is built on it.

    Raises:
        UserError: It does not, or writes any prompt alike.
    """
    settings = encoding.chat_template_kwargs
    prompts = [
        encode_prompt(tokenizer, text, encoding.style, chat_template_kwargs=settings)
        for text in ("Hello?", "Where is it?")
    ]
    if prompts[0] == prompts[1]:
        raise UserError(
            "the tokenizer writes every prompt alike: its vocabulary has no letters, or its chat template leaves the "
            "prompt out"
        )
    _Encoder(tokenizer, encoding)(Example("Hello?", "Yes.", label=True))


class _Intake:
    """Lets rows in or not, and keeps the count."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, remember: bool) -> None:
        self.encoder = _Encoder(tokenizer, encoding)
        self.duplicates = encoding.duplicates
        self.remember = remember
        self.first: dict[bytes, int] = {}
        self.count: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.longest = 0

    def take(self, number: int, row: Example | Mapping[str, Any]) -> Row | None:
        """The encoded row; None if it is left out.

        Raises:
            UserError: The settings do not allow it; names all its faults.
        """
        where = (row.place if isinstance(row, Example) else "") or f"row {number}"
        if not isinstance(row, Example | Mapping):
            raise UserError(f"{where}: expected an Example or a dictionary, found {row!r:.40}")
        example = example_of(vars(row) if isinstance(row, Example) else row, where)
        where += f" ({example.id})" if example.id else ""
        try:
            encoded = self.encoder(example)
        except UserError as error:
            raise UserError([f"{where}: {fault}" for fault in error.faults]) from None
        if encoded is None:
            self.count["dropped_overlong"] += 1
            return None
        if self.remember:
            first = self.first.setdefault(_digest(encoded), number)
            if first != number:
                if self.duplicates == "error":
                    raise UserError(f"{where}: has the tokens of row {first}; drop one, or say duplicates=drop or keep")
                self.count["duplicates"] += 1
                if self.duplicates == "drop":
                    self.count["dropped_duplicates"] += 1
                    return None
        kind = "avoid" if encoded.avoid else "imitate"
        self.count[kind] += 1
        self.count[f"{kind}_tokens"] += sum(label != IGNORE_INDEX for label in encoded.labels)
        self.count["truncated"] += encoded.truncated
        self.count["ended_inside"] += encoded.ended_inside
        self.count["unknown"] += encoded.unknown
        self.left_out.update(encoded.left_out)
        self.longest = max(self.longest, len(encoded.input_ids))
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "avoid": encoded.avoid,
            "weight": example.weight,
            "retain": example.retain,
        }

    def report(self) -> EncodingReport:
        names = EncodingReport.__dataclass_fields__.keys() - {"longest", "left_out"}
        counts = {name: self.count[name] for name in names}
        return EncodingReport(longest=self.longest, left_out=dict(self.left_out), **counts)


def _digest(encoded: Encoded) -> bytes:
    numbers = array("q", [*encoded.input_ids, *encoded.labels, encoded.avoid])
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()


def encode_rows(
    dataset: Iterable[Example | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> tuple[list[Row], EncodingReport]:
    """Token ids and labels of all rows of a data set.

    The loss falls on what the assistant says, its thinking included. What the chat template adds by itself
    to any reply, an end token and for some thinking models an empty thought before it, is learned in
    imitate rows, since the model has to write it, and not penalised in avoid rows, where it would be
    pushed down for no fault of its own (`penalize_eos` restores the end token). A reply that was cut, by
    its source (`ends` false) or at `max_length`, teaches no end. To keep a thinking model's thinking, put
    the empty thought into the prompt: `chat_template_kwargs={"enable_thinking": False}`.

    Args:
        dataset: `Example`s, or dictionaries with `prompt`, `completion`, `label` and any of `Example`'s
            other fields; further columns are passed over.
        tokenizer: Of the model.
        encoding: Settings.

    Returns:
        Rows of `input_ids`, `labels`, `avoid`, `weight` if any differs from 1 and `retain` if any is true; and what
        became of the data.

    Raises:
        UserError: Rows that are not examples, that have nothing to learn, whose reply does not follow the
            tokens of its prompt, or that the settings refuse. Names all, by number from 0 as `dataset[3]`.
    """
    intake = _Intake(tokenizer, encoding, remember=True)
    rows: list[Row] = []
    faults: list[str] = []
    for number, row in enumerate(dataset):
        try:
            taken = intake.take(number, row)
        except UserError as error:
            faults += error.faults
        else:
            rows += [taken] if taken else []
    if faults:
        raise UserError(faults)
    report = intake.report()
    if not rows:
        raise UserError(f"the data set has no rows to learn from: {report}")
    for name, usual in (("weight", 1), ("retain", False)):
        if all(row[name] == usual for row in rows):
            for row in rows:
                del row[name]
    return rows, report


def encode_stream(
    dataset: Iterable[Example | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    part: tuple[int, int] = (0, 1),
) -> Generator[Row, None, EncodingReport]:
    """As `encode_rows`, one row at a time as they are asked for, for data sets that are streamed.

    Rows always have `weight` and `retain`. The generator's return value is the report. Duplicates are remembered, 16
    bytes each, only if they are to be dropped or refused.

    Args:
        dataset: As there.
        tokenizer: As there.
        encoding: As there.
        part: Which rows are given: every `part[1]`th, from number `part[0]`, for workers that share a stream.

    Raises:
        UserError: At the first row that cannot be taken; names it.
    """
    remember = encoding.duplicates != "keep"
    intake = _Intake(tokenizer, encoding, remember)
    for number, row in enumerate(dataset):
        is_ours = number % part[1] == part[0]
        taken = intake.take(number, row) if is_ours or remember else None
        if taken and is_ours:
            yield taken
    return intake.report()
