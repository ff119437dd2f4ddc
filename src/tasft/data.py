"""Rows: prompts to be answered, and examples to imitate or to avoid."""

import json
from collections.abc import Iterable
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
        completion: Text, or one assistant message in a list.
        label: True is a row to imitate, False one to avoid.
        id: Name of the row; empty when its file gives none.
        source: Where it comes from: a data set, or a stage of a run.
        ends: Whether the completion ends where its text does. False for a reply that was cut at a
            length limit, so that stopping there is not learned.
    """

    prompt: str | Messages
    completion: str | Messages
    label: bool
    id: str = ""
    source: str = ""
    ends: bool = True

    def row(self) -> dict[str, Any]:
        """The example as a JSON object."""
        return asdict(self)


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


def _id(row: dict[str, Any], default: object) -> str:
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


def _text_or_messages(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
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
        here = [
            f'{path}:{number}: "{key}" must be text or chat messages, found {row.get(key)!r:.40}'
            for key in ("prompt", "completion")
            if not _text_or_messages(row.get(key))
        ]
        if type(row.get("prompt")) is not type(row.get("completion")) and not here:
            here.append(f'{path}:{number}: "prompt" and "completion" must both be text or both messages')
        label = row.get("label", True)
        if not isinstance(label, bool):
            here.append(f'{path}:{number}: "label" is {label!r:.40}; use true (imitate) or false (avoid)')
        ends = row.get("ends", True)
        if not isinstance(ends, bool):
            here.append(f'{path}:{number}: "ends" is {ends!r:.40}; use true or false')
        if here:
            faults += here
            continue
        example = Example(row["prompt"], row["completion"], label, _id(row, ""), str(row.get("source", "")), ends)
        examples.append((number, example))
    faults += _refuse_repeats(path, ((number, example.id) for number, example in examples))
    if faults:
        raise UserError(faults)
    return [example for _, example in examples]
