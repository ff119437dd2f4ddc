"""What a field of a row says, whatever wrote it: pandas, numpy, a table of text, or an API with content in parts."""

import math
from collections.abc import Mapping
from typing import Any

from tasft.core.errors import UserError

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where a message or an answer of a server has a thought that stands apart from its text."""

MARKS = ("weight", "train", "loss")
"""By which a message says whether it is learned: OpenAI's, axolotl's, ms-swift's."""

_TEXTS = ("text", "input_text", "output_text")  # Of parts: chat completions, and OpenAI's responses.


def plain(value: Any) -> Any:
    """A value without the types of numpy; what pandas and tables mean by a missing cell, `nan`, is None.

    Inside messages and tools what is None is not there: a table with one schema gives each of them the fields of all
    others, and a template would write them.
    """
    if hasattr(value, "tolist") and not isinstance(value, str):  # Scalars and arrays of numpy, tensors.
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        fields = {key: plain(item) for key, item in value.items()}
        said = {"content", "value"} if {"role", "from"} & fields.keys() else set()  # A message may say nothing.
        return {key: item for key, item in fields.items() if item is not None or key in said}
    return None if isinstance(value, float) and math.isnan(value) else value


def text_of(value: Any) -> str:
    """The text of an optional field: empty where there is none."""
    cell = plain(value)
    return "" if cell is None else str(cell)


def truth(value: Any) -> Any:
    """True or false where a table says so in words, `true`, `False`; anything else as it is."""
    cell = plain(value)
    words = {"true": True, "false": False}
    return words.get(cell.strip().lower(), cell) if isinstance(cell, str) else cell


def measure(value: Any) -> Any:
    """The number that a table writes as text; anything else as it is, `nan` too, for that may be a wrong result."""
    cell = value.tolist() if hasattr(value, "tolist") else value
    try:
        return float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a reply may be learned, by its `MARKS`.

    Raises:
        UserError: One of them says something else.
    """
    marks = {name: measure(truth(message[name])) for name in MARKS if message.get(name) is not None}
    if faults := [
        f'"{name}" of a message is {value!r:.40}; use 0 or 1, true or false'
        for name, value in marks.items()
        if value not in (0, 1)
    ]:
        raise UserError(faults)
    return all(marks.values())


def joined(value: Any) -> Any:
    """A talk in which content that comes as text parts is one text; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    value = [plain(message) for message in value]  # It may be read from a text.
    return [
        {**message, "content": "".join(map(_text_of_part, message["content"]))}
        if isinstance(message, Mapping) and _are_texts(message.get("content"))
        else message
        for message in value
    ]


def fault_of_parts(value: Any) -> str | None:
    """What a talk holds besides text, by its name; None for nothing."""
    for message in value if isinstance(value, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(message, Mapping) and "content" in message and content is None and not message.get("tool_calls"):
            return "holds a message whose content is null: leave such rows out"
        for part in content if isinstance(content, list) else ():
            if not _is_text(part):
                kind = part.get("type") if isinstance(part, Mapping) else None
                return f"holds {kind!r:.40} in its content: only text is learned; leave such rows out"
    return None


def _is_text(part: Any) -> bool:
    if isinstance(part, str):
        return True
    return isinstance(part, Mapping) and part.get("type", "text") in _TEXTS and isinstance(part.get("text"), str)


def _are_texts(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(map(_is_text, content))


def _text_of_part(part: Any) -> str:
    return part if isinstance(part, str) else part["text"]
