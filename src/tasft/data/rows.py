"""Rows: prompts to be answered, and examples to imitate or to avoid."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from tasft.core.errors import UserError
from tasft.core.provenance import content_hash
from tasft.data.cells import fault_of_parts, joined, measure, plain, text_of, truth
from tasft.data.forms import FORMS, PROMPT_COLUMNS, form_of, looks_like_talk, renamed_columns, turns_before, turns_of
from tasft.data.sources import Source, read_source

T = TypeVar("T")

Messages = list[dict[str, Any]]


def asked(prompt: str | Messages, context: str = "") -> Messages:
    """A prompt as chat messages, Alpaca's context in that of its instruction."""
    return [{"role": "user", "content": with_input(prompt, context)}] if isinstance(prompt, str) else list(prompt)


def with_input(instruction: str, context: str) -> str:
    """An instruction and what it is about, as one text."""
    return f"{instruction}\n\n{context}" if context else instruction


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered, with what its file says of it."""

    id: str
    prompt: str
    topic: str = ""
    kind: str = ""


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """What replies to prompts depend on: a topic that is filed anew asks for no other reply."""
    return content_hash([[prompt.id, prompt.prompt] for prompt in prompts])


@dataclass(frozen=True)
class Example:
    """One row of training data, TRL's *unpaired preference* format.

    Attributes:
        prompt: Text, or chat messages.
        completion: Text, or chat messages of which the last is the assistant's.
        label: True is a row to imitate, False one to avoid.
        id: Name of the row; empty when its file gives none.
        source: Where it comes from: a data set, or a stage of a run.
        ends: Whether the completion ends where its text does. False for a reply that was cut at a
            length limit, so that stopping there is not learned.
        input: What the instruction in `prompt` is about, Alpaca's context; empty for none.
        tools: JSON schemas of the functions that the chat template offers to the model.
        weight: Scales the row's share of its kind; above 0.
        retain: Whether the model should go on answering this prompt as it did before training.
        given: How the completion begins where that is read and not learned, such as the first words of a harmful
            answer from which it turns back; a beginning of a text completion.
        place: File and line, for messages; empty for a row of no file.
        form: Of `tasft.data.forms.FORMS`, how the row was written.
    """

    prompt: str | Messages
    completion: str | Messages
    label: bool
    id: str = ""
    source: str = ""
    ends: bool = True
    input: str = ""
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    retain: bool = False
    given: str = ""
    place: str = field(default="", compare=False, repr=False)
    form: str = field(default="prompt_completion", compare=False, repr=False)

    @property
    def question(self) -> str | None:
        """All that is asked, where that is one text of the user; None where there are other turns, or tools."""
        turns = asked(self.prompt, self.input)
        alone = len(turns) == 1 and turns[0]["role"] == "user" and not self.tools
        return turns[0].get("content") or None if alone else None

    def row(self) -> dict[str, Any]:
        """The example as a JSON object; what is seldom given stands in it only where it says something."""
        row = asdict(self)
        del row["place"], row["form"]
        seldom = {"given": "", "input": "", "tools": None, "weight": 1.0, "retain": False}
        return {key: value for key, value in row.items() if key not in seldom or value != seldom[key]}


def _id(row: Mapping[str, Any], default: object) -> str:
    return text_of(row.get("id")) or str(default)


def repeated_ids(where: str | Path | Source, ids: Iterable[tuple[int, str]]) -> list[str]:
    """A fault for each row, by number and id, whose id an earlier one has; no id is no fault."""
    source = where if isinstance(where, Source) else Source(str(where), [])
    first: dict[str, int] = {}
    faults = []
    for number, row_id in ids:
        if row_id and row_id in first:
            other = source.places.get(first[row_id]) or f"line {first[row_id]}"
            faults.append(f'{source.at(number)}: "id" {row_id!r} is that of {other} too')
        first.setdefault(row_id, number)
    return faults


def drawn(rows: Sequence[T], most: int | None, text: Callable[[T], str]) -> list[T]:
    """So many rows, in their own order, or all where `most` is None.

    Which ones depends on nothing but their texts, and those of a smaller number are among those of a larger one: runs
    of any seed can be compared.
    """
    if most is None or len(rows) <= most:
        return list(rows)

    def lot(index: int) -> bytes:
        return hashlib.sha256(text(rows[index]).encode("utf-8", "surrogatepass")).digest()

    return [rows[index] for index in sorted(sorted(range(len(rows)), key=lot)[:most])]


def read_prompts(source: str, data_dir: str | None = None) -> list[Prompt]:
    """Prompts of a source with a column of `PROMPT_COLUMNS`, or another that it names (and `id`, `topic`, `kind`).

    Of a transcript ("Human: ... Assistant: ...") or a conversation the first turn of the user is the prompt. The
    `input` of an instruction belongs to it, as in training.

    Raises:
        UserError: Names every bad row.
    """
    return prompts_in(read_source(source, data_dir))[0]


def prompts_in(found: Source) -> tuple[list[Prompt], str]:
    """As `read_prompts`, of a source that was read; and a note on which column held them, empty for the usual one."""
    rows = [(number, {key: plain(value) for key, value in row.items()}) for number, row in found.rows]
    columns = {name for _, row in rows for name in row}
    column = found.column or next((name for name in PROMPT_COLUMNS if name in columns), "prompt")
    if rows and column not in columns:
        raise UserError(
            f'{found.at(rows[0][0])}: "{column}" is missing, here and in all other rows; it has '
            f"{_names(rows[0][1])}: name the one with the prompt, as in SOURCE#COLUMN"
        )
    prompts: list[tuple[int, Prompt]] = []
    faults = []
    bare = 0
    for number, row in rows:
        value = _READ["messages"](row.get(column))
        text = _first_turn(value)
        context = row.get("input") or "" if column == FORMS[form_of(row)][0] else ""
        if column not in row:
            faults.append(f'{found.at(number)}: "{column}" is missing; the row has {_names(row)}')
        elif not text.strip():
            faults.append(f'{found.at(number)}: "{column}" must be text, found {value!r:.40}')
        elif looks_like_talk(value):
            faults.append(f'{found.at(number)}: "{column}" {UNREAD}')
        elif fault := fault_of_input(context, value):
            faults.append(f"{found.at(number)}: {fault}")
        elif not _is_whole(text := with_input(text, context)):
            faults.append(f'{found.at(number)}: "{column}" {HALF}')
        else:
            fields = {key: text_of(row.get(key)) for key in ("topic", "kind")}
            prompts.append((number, Prompt(_id(row, number), text, **fields)))
            bare += bool(turns_before(row)) or (_is_talk(value) and value[0]["role"] != "user")
    faults += repeated_ids(found, ((number, prompt.id) for number, prompt in prompts))
    if faults:
        raise UserError(faults)
    note = f"{found.where}: {len(prompts):,} prompts of the column {column!r}"
    if bare:
        note += f"; {bare:,} follow a system message or earlier turns, which are not asked"
    return [prompt for _, prompt in prompts], note if bare or column not in ("prompt", found.column) else ""


def _first_turn(value: Any) -> str:
    return next(iter(user_turns(value)), "") if isinstance(value, str) or _is_talk(value) else ""


def user_turns(prompt: str | Messages) -> list[str]:
    """What the user says in each turn of a conversation or of a transcript of HH; any other text is one turn."""
    if not isinstance(prompt, str):
        said = [turn.get("content") for turn in prompt if turn["role"] == "user"]
        return [text if isinstance(text, str) else "" for text in said]
    before, human, rest = prompt.partition("Human:")
    if not human or before.strip() or "\n\nAssistant:" not in rest:
        return [prompt]
    return [turns.partition("\n\nAssistant:")[0].strip() for turns in rest.split("\n\nHuman:")]


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name!r:.40}" for name in row if name != "label") or "no fields"


UNREAD = "looks like chat messages and cannot be read as such: write them as JSON, or keep the rows as JSONL or Parquet"
HALF = "holds half a character, U+D800 to U+DFFF, which no tokenizer reads: write it anew"


def _is_whole(text: str) -> bool:
    """Whether text can be encoded: JSON lets a file hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_message(value: object) -> bool:
    # An assistant that calls a tool need not say anything.
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and bool({"content", "tool_calls"} & value.keys())
        and isinstance(value.get("content"), str | list | None)
    )


def _is_talk(value: object) -> TypeGuard[Messages]:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _fault_of_turns(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if key not in row:
        return f'"{key}" is missing; the row has {_names(row)}'
    if strange := fault_of_parts(value):
        return f'"{key}" {strange}'
    texts = (
        [value] if isinstance(value, str) else [message.get("content") for message in value] if _is_talk(value) else []
    )
    if not all(_is_whole(text) for text in texts if isinstance(text, str)):
        return f'"{key}" {HALF}'
    if looks_like_talk(value):
        return f'"{key}" {UNREAD}'
    if isinstance(value, str) and value.strip():
        return None
    if not _is_talk(value):
        return f'"{key}" must be text or chat messages, found {value!r:.40}'
    if key != "prompt" and value[-1]["role"] != "assistant":
        return f'the last message of "{key}" is by {value[-1]["role"]!r:.40}; it must be the assistant\'s'
    if key != "prompt" and not (value[-1].get("tool_calls") or str(value[-1]["content"]).strip()):
        return f'the last message of "{key}" is blank, so there is nothing to learn'
    return None


def _fault_of_talk(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, str) and not looks_like_talk(value):
        return f'"{key}" must be chat messages, found {value!r:.40}'
    if _is_talk(value) and len(value) == 1:
        return f'"{key}" holds an answer without a question: a turn of the user must come first'
    return _fault_of_turns(row, key)


def fault_of_input(context: object, prompt: object) -> str | None:
    """Why a context does not belong to a prompt."""
    if not isinstance(context, str):
        return f'"input" must be text, found {context!r:.40}'
    if context and not isinstance(prompt, str):
        return '"input" goes with a prompt that is text; write it into the messages'
    return None


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _tools(value: object) -> object:
    """As a table of texts holds them, too: as JSON."""
    value = plain(value)
    with suppress(ValueError):
        return json.loads(value) if isinstance(value, str) else value
    return value


_READ: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("label", "ends", "retain"), truth),
    **dict.fromkeys((key for columns in FORMS.values() for key in columns), lambda row: joined(turns_of(plain(row)))),
    "weight": measure,
    "tools": _tools,
}
_NO_TEXT = frozenset({"ends", "retain", "weight", "tools"})


def example_of(row: Mapping[str, Any], where: str, form: str | None = None) -> Example:
    """The example that a JSON object or a row of a data set holds; fields of no concern are passed over.

    An optional field that is null counts as not given: data sets fill whole columns. Of a conversation the last turn is
    the completion. Content in parts is joined if all are text. In a table, where all is text, `true` and `1.5` are what
    they say.

    Args:
        row: At least the columns of a form in `FORMS`, and `label`.
        where: Begins each fault: a file and line, or the number of a row.
        form: How the row is written; None tells it from the columns.

    Raises:
        UserError: Names every fault of the row.
    """
    row = {key: _READ.get(key, plain)(value) for key, value in row.items()}
    # An empty cell of a table is no cell.
    given = {key: value for key, value in row.items() if value is not None and (value != "" or key not in _NO_TEXT)}
    form = form or form_of(row)
    *prompt_columns, reply_column = FORMS[form]
    check = _fault_of_turns if prompt_columns else _fault_of_talk
    faults = [fault for key in (*prompt_columns, reply_column) if (fault := check(row, key))]
    if "label" not in row:
        faults.append('"label" is missing; say true (imitate) or false (avoid)')
    elif not isinstance(row["label"], bool):
        faults.append(f'"label" is {row["label"]!r:.40}; use true (imitate) or false (avoid)')
    faults += [
        f'"{name}" is {row[name]!r:.40}; use true or false'
        for name in ("ends", "retain")
        if not isinstance(given.get(name, True), bool)
    ]
    if given.get("retain") is True and row.get("label") is False:
        faults.append('"retain" is true and "label" false: a row to avoid is not to be retained')
    begun = given.get("given", "")
    if begun and not (
        isinstance(begun, str) and isinstance(row.get(reply_column), str) and row[reply_column].startswith(begun)
    ):
        faults.append(f'"given" is {begun!r:.40}; it must be text that "{reply_column}", which is text, begins with')
    context = given.get("input", "")
    if fault := fault_of_input(context, row.get(prompt_columns[0]) if prompt_columns else None):
        faults.append(fault)
    tools = given.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        faults.append(f'"tools" must be a list of JSON schemas, found {tools!r:.40}')
    if not _positive(given.get("weight", 1.0)):
        faults.append(f'"weight" is {row["weight"]!r:.40}; use a number above 0')
    before = turns_before(given)
    if before is None or (before and not _is_talk(before)):
        faults.append('"system" or "history" is neither text nor turns: pairs of texts, or chat messages')
    if faults:
        raise UserError([f"{where}: {fault}" for fault in faults])
    prompt = row[prompt_columns[0]] if prompt_columns else row[reply_column][:-1]
    if before and isinstance(prompt, str):
        prompt, context = asked(prompt, context), ""
    if before and before[0]["role"] == prompt[0]["role"] == "system":
        before = before[1:]  # The conversation says it itself.
    return Example(
        prompt=[*before, *prompt] if before else prompt,
        completion=row[reply_column] if prompt_columns else row[reply_column][-1:],
        label=row["label"],
        id=_id(row, ""),
        source=str(given.get("source", "")),
        given=begun,
        ends=given.get("ends", True),
        input=context,
        tools=tools or None,
        weight=float(given.get("weight", 1.0)),
        retain=given.get("retain", False),
        form=form,
    )


def read_examples(
    source: str | Path,
    keep: Mapping[str, Any] | None = None,
    drop: Mapping[str, Any] | None = None,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Examples of a source, in the unpaired preference format or another of `FORMS`.

    A row without `label` is one to imitate, so that plain prompt-completion files work too.

    Args:
        source: As `read_source` takes it.
        keep: Fields and values that a row must have, all of them. Of a list of values one is enough; a field that holds
            a list has each of its own. In a table, where all is text, values are what they say.
        drop: Fields and values of which a row may have none. What is left out need not be an example.
        form: Of all rows; None tells it from the columns of each.
        columns: Names that a form knows, and what the file calls them.

    Raises:
        UserError: Names every bad line.
    """
    return examples_in(read_source(source), keep or {}, drop or {}, form, columns or {})[0]


def examples_in(
    found: Source, keep: Mapping[str, Any], drop: Mapping[str, Any], form: str | None, columns: Mapping[str, str]
) -> tuple[list[Example], list[str]]:
    """As `read_examples`, of a source that was read; and a note for each value to keep or drop that no row has."""
    rows = found.rows
    faults = [
        f"{found.where}: no row has a field {name!r:.40}; the first has {_names(rows[0][1])}"
        for name in (*keep, *drop, *columns.values())
        if not any(name in row for _, row in rows)
    ]
    notes = [
        f"{found.where}: no row has {name}: {json.dumps(value, default=str):.60}, which {what} names; the first has "
        f"{rows[0][1].get(name)!r:.40}"
        for what, wanted in (("keep", keep), ("drop", drop))
        for name, values in wanted.items()
        for value in _listed(values)
        if not any(_has(row, name, value) for _, row in rows)
    ]
    examples: list[tuple[int, Example]] = []
    for number, row in rows:
        if not all(_has(row, *pair) for pair in keep.items()) or any(_has(row, *pair) for pair in drop.items()):
            continue
        row = {"label": True, **renamed_columns(row, columns)}
        try:
            examples.append((number, example_of(row, found.at(number), form)))
        except UserError as error:
            faults += error.faults
    faults += repeated_ids(found, ((number, example.id) for number, example in examples))
    if faults:
        raise UserError(faults)
    return [replace(example, place=found.at(number)) for number, example in examples], notes


def _has(row: Mapping[str, Any], name: str, wanted: object) -> bool:
    """Whether a field says what is wanted, or one thing of a list; as `example_of` reads tables."""
    cells = _listed(plain(row.get(name)))
    return any(
        value in (cell, truth(cell), measure(cell), None if cell == "" else cell)
        for cell in cells
        for value in _listed(wanted)
    )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) and value else [value]
