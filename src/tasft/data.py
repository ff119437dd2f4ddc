"""Rows: prompts to be answered, and examples to imitate or to avoid."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tasft.errors import UserError
from tasft.provenance import content_hash

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered, with what its file says of it."""

    id: str
    prompt: str
    topic: str = ""
    kind: str = ""


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

    def row(self) -> dict[str, Any]:
        """The example as a JSON object; `input`, `tools` and `weight` only where they say something."""
        row = asdict(self)
        seldom = {"input": "", "tools": None, "weight": 1.0}
        return {key: value for key, value in row.items() if key not in seldom or value != seldom[key]}


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line number and object of each row; blank lines are passed over.

    Raises:
        UserError: The file is missing, not UTF-8, empty, or lines are not JSON objects; names them all.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    rows, faults = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            faults.append(f"{path}:{number}: not JSON ({reason})")
            continue
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            faults.append(f"{path}:{number}: expected an object such as {{...}}, found {value!r:.40}")
    if not rows and not faults:
        faults.append(f"{path}: holds no rows")
    if faults:
        raise UserError(faults)
    return rows


def _named_sources() -> dict[str, Path]:
    folder = Path(str(resources.files("tasft") / "prompts"))
    return {path.stem: path for path in sorted(folder.glob("*.jsonl"))}


def locate(source: str) -> Path:
    """File of a named source or of a path.

    Raises:
        UserError: It is neither; lists the names.
    """
    named = _named_sources()
    path = named.get(source, Path(source))
    if not path.is_file():
        raise UserError(f"{source!r} is neither a file nor one of {', '.join(named)}")
    return path


def source_hash(source: str) -> str:
    """Content hash of a source, whatever its place on disk."""
    return content_hash(locate(source).read_text(encoding="utf-8", errors="surrogateescape"))


def _id(row: Mapping[str, Any], default: object) -> str:
    return str(default if row.get("id") is None else row["id"])


def _refuse_repeats(path: Path, ids: Iterable[tuple[int, str]]) -> list[str]:
    first: dict[str, int] = {}
    faults = []
    for number, row_id in ids:
        if row_id and row_id in first:
            faults.append(f'{path}:{number}: "id" {row_id!r} is that of line {first[row_id]} too')
        first.setdefault(row_id, number)
    return faults


def read_prompts(source: str) -> list[Prompt]:
    """Prompts of a named source or a JSONL file with a field `prompt` (and `id`, `topic`, `kind`).

    Raises:
        UserError: Names every bad line.
    """
    path = locate(source)
    prompts: list[tuple[int, Prompt]] = []
    faults = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            faults.append(f'{path}:{number}: "prompt" must be text, found {row.get("prompt")!r:.40}')
            continue
        fields = {key: str(row.get(key, "")) for key in ("topic", "kind")}
        prompts.append((number, Prompt(_id(row, number), row["prompt"], **fields)))
    faults += _refuse_repeats(path, ((number, prompt.id) for number, prompt in prompts))
    if faults:
        raise UserError(faults)
    return [prompt for _, prompt in prompts]


def _is_message(value: object) -> bool:
    # An assistant that calls a tool need not say anything.
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and bool({"content", "tool_calls"} & value.keys())
    )


def _fault_of_turns(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if key not in row:
        return f'"{key}" is missing; the row has {", ".join(map(repr, row)) or "no fields"}'
    if isinstance(value, str) and value.strip():
        return None
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        return f'"{key}" must be text or chat messages, found {value!r:.40}'
    if key == "completion" and value[-1]["role"] != "assistant":
        return f'the last message of "completion" is by {value[-1]["role"]!r:.40}; it must be the assistant\'s'
    return None


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def example_of(row: Mapping[str, Any], where: str) -> Example:
    """The example that a JSON object or a row of a data set holds; fields of no concern are passed over.

    An optional field that is null counts as not given: data sets fill whole columns.

    Args:
        row: At least `prompt`, `completion` and `label`.
        where: Begins each fault: a file and line, or the number of a row.

    Raises:
        UserError: Names every fault of the row.
    """
    given = {key: value for key, value in row.items() if value is not None}
    faults = [fault for key in ("prompt", "completion") if (fault := _fault_of_turns(row, key))]
    if "label" not in row:
        faults.append('"label" is missing; say true (imitate) or false (avoid)')
    elif not isinstance(row["label"], bool):
        faults.append(f'"label" is {row["label"]!r:.40}; use true (imitate) or false (avoid)')
    if not isinstance(given.get("ends", True), bool):
        faults.append(f'"ends" is {row["ends"]!r:.40}; use true or false')
    context = given.get("input", "")
    if not isinstance(context, str):
        faults.append(f'"input" must be text, found {context!r:.40}')
    elif context and not isinstance(row.get("prompt"), str):
        faults.append('"input" goes with a prompt that is text; write it into the messages')
    tools = given.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        faults.append(f'"tools" must be a list of JSON schemas, found {tools!r:.40}')
    if not _positive(given.get("weight", 1.0)):
        faults.append(f'"weight" is {row["weight"]!r:.40}; use a number above 0')
    if faults:
        raise UserError([f"{where}: {fault}" for fault in faults])
    return Example(
        prompt=row["prompt"],
        completion=row["completion"],
        label=row["label"],
        id=_id(row, ""),
        source=str(given.get("source", "")),
        ends=given.get("ends", True),
        input=context,
        tools=tools or None,
        weight=float(given.get("weight", 1.0)),
    )


def read_examples(source: str) -> list[Example]:
    """Examples of a JSONL file in the unpaired preference format.

    A row without `label` is one to imitate, so that plain prompt-completion files work too.

    Raises:
        UserError: Names every bad line.
    """
    path = locate(source)
    examples: list[tuple[int, Example]] = []
    faults = []
    for number, row in read_jsonl(path):
        try:
            examples.append((number, example_of({"label": True} | row, f"{path}:{number}")))
        except UserError as error:
            faults += error.faults
    faults += _refuse_repeats(path, ((number, example.id) for number, example in examples))
    if faults:
        raise UserError(faults)
    return [example for _, example in examples]
