"""What a chat template leaves out of what a row says."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasft.core.errors import UserError
from tasft.data.cells import MARKS, THOUGHT_FIELDS
from tasft.data.rows import Messages
from tasft.data.template import THOUGHTS, Tools, Writer

THOUGHT, CALL = "a thought", "a call of a tool"
_WHOSE = {
    "system": "a system message",
    "developer": "a system message",
    "user": "a user's message",
    "assistant": "a reply",
    "tool": "what a tool says",
}
# Of a message, what is looked at by itself or is not for the model to read.
_LOOKED_AT = {"role", "content", "tool_calls", "tool_call_id", "id", *MARKS, *THOUGHT_FIELDS}


def left_out(writer: Writer, messages: Messages, tools: Tools | None) -> list[tuple[int, str]]:
    """What the template leaves out of a conversation: the message that says it (-1 for tools), and what it is."""
    text = writer.text(messages, tools)
    missing: list[tuple[int, str]] = []

    def same(number: int, tools: Tools | None = tools, **changed: Any) -> bool:
        """Whether the text is the same where the fields of a message are others, or not there (None)."""
        message = {key: value for key, value in {**messages[number], **changed}.items() if value is not None}
        try:
            return writer.text([*messages[:number], message, *messages[number + 1 :]], tools) == text
        except UserError:
            return False

    parts = [(number, what, part.strip()) for number, message in enumerate(messages) for what, part in _parts(message)]
    written: list[str] = []
    # The longest first: a short reply may stand in the question too, and the same may be said twice and written once.
    for number, what, part in sorted(parts, key=lambda entry: -len(entry[2])):
        if _holds(text, part, 1 + sum(other.count(part) for other in written)):
            written.append(part)
        else:
            missing.append((number, what))
    missing.sort(key=lambda pair: pair[0])
    if tools and same(0, None):
        missing.append((-1, "tools"))
    elif not all(_holds(text, part) for tool in tools or () for part in _of_tool(tool)):
        missing.append((-1, "parts of tools"))
    for number, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            if same(number, tool_calls=None):
                missing.append((number, CALL))
            elif not all(_holds(text, part) for call in calls for part in _of_call(call)):
                missing.append((number, "parts of a call"))
        if message["role"] not in _WHOSE and same(number, role="nobody"):
            missing.append((number, f"who says it, {message['role']!r:.40},"))
        fields = [key for key in message if key not in _LOOKED_AT and message[key] not in ("", [], {}, None)]
        missing += [(number, f"the field {key!r:.40} of a message") for key in fields if same(number, **{key: None})]
    return list(dict.fromkeys(missing))


def _holds(text: str, part: str, times: int = 1) -> bool:
    """Whether a text holds a part so often; some templates write it as JSON."""
    return not part or any(text.count(form) >= times for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))


def _parts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a message says, piece by piece."""
    content, role = message.get("content"), message["role"]
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
    for text in filter(None, texts):
        thought, mark, rest = "", "", text
        for opening, closing in THOUGHTS if role == "assistant" else ():
            if closing in text:
                thought, mark, rest = text.rpartition(closing)
                thought = thought.partition(opening)[2] or thought
        if mark:
            yield THOUGHT, thought
        yield _WHOSE.get(role, f"a message of {role}"), rest
    for name in THOUGHT_FIELDS:
        if isinstance(message.get(name), str):
            yield THOUGHT, message[name]


def _of_tool(tool: Mapping[str, Any]) -> Iterator[str]:
    """Name and description of a tool and of what it takes."""
    function = _inside(tool, "function") or tool
    properties = _inside(_inside(function, "parameters"), "properties")
    yield from properties
    for schema in (function, *properties.values()):
        yield from _texts(schema, ("name", "description"))


def _of_call(call: Mapping[str, Any]) -> Iterator[str]:
    """Name of what is called, and what it is given."""
    function = _inside(call, "function") or call
    given = _inside(function, "arguments")
    yield from _texts(function, ("name",))
    yield from given
    yield from _texts(given, list(given))


def _inside(value: Any, name: str) -> Mapping[str, Any]:
    """The object in a field, which may be JSON in a text."""
    held = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(held, str):
        try:
            held = json.loads(held)
        except ValueError:
            held = None
    return held if isinstance(held, Mapping) else {}


def _texts(value: Any, names: Sequence[str]) -> list[str]:
    held = [value.get(name) for name in names] if isinstance(value, Mapping) else []
    return [text.strip() for text in held if isinstance(text, str)]
