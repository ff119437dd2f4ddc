"""What a server's response says: a reply, nothing, or an error, and whether it helps to ask again."""

import re
from collections.abc import Mapping
from typing import Any

from openai import APIConnectionError, APIResponseValidationError, APIStatusError

from tasft.data.cells import THOUGHT_FIELDS

MAY_PASS = {408, 409, 429}
NEVER_PASS = {"insufficient_quota"}  # An account without money, as 429.
FOR_ALL = {401, 402, 403, 404, 405, 407}  # Of the key, the account, the address or the model.
# How an error that came as a success is known, in this order: what it is like, and its words.
WORDS = {
    402: r"credit|quota|billing|balance|payment",
    429: r"rate.?limit|too many|overload|capacity|try again",
    401: r"api.?key|unauthori|authenticat|permission",
    400: r"content.?(filter|policy|management)|moderation|safety|flagged|filtered|responsible.?ai|policy violation",
}
# Where error objects of providers have their reason.
_WORDS = (
    "message",
    "msg",
    "error_message",
    "error_msg",
    "status_msg",
    "detail",
    "reason",
    "error",
    "errors",
    "base_resp",
)
_TEXTS = ("text", "output_text")
# Finish reasons of servers: OpenAI, vLLM, TGI, Anthropic, Cohere, Gemini and what stands between.
ENDS = {
    *("stop", "eos", "eos_token", "eos_found", "stop_token", "end_id", "end_turn", "end_of_turn", "endoftext"),
    *("end_of_text", "stop_sequence", "complete", "finish"),
}
LENGTHS = {
    *("length", "max_tokens", "max_length", "max_output_tokens", "max_new_tokens", "max_completion_tokens"),
    *("model_length", "token_limit", "limit", "model_context_window_exceeded"),
}


class Unreadable(Exception):
    """A reply of the server that does not follow its schema."""


class Withheld(Exception):
    """A whole response in which nothing was said, and why."""


class ErrorInside(Exception):
    """An error that came as a successful response.

    Attributes:
        status: What its like is as a status of HTTP.
        body: What was said of it.
    """

    def __init__(self, body: object) -> None:
        super().__init__(body)
        self.body = body
        self.status = _status_like(body)


def read(found: Any, is_chat: bool, stop: object = None) -> tuple[str, str, str]:
    """Text, finish and, where it comes apart, thought of a response, whose fields the client has not checked.

    Raises:
        ErrorInside: It is an error.
        Withheld: It is whole and says nothing.
        Unreadable: It does not follow its schema.
    """
    fault = getattr(found, "error", None)
    if fault or getattr(found, "object", None) == "error":
        raise ErrorInside(fault or _fields(found))
    try:
        choice = found.choices[0]
        if fault := getattr(choice, "error", None):
            raise ErrorInside(fault)
        message = choice.message if is_chat else choice
        text, reason = message.content if is_chat else message.text, choice.finish_reason
    except (AttributeError, IndexError, KeyError, TypeError):
        body = _fields(found)
        if isinstance(body, Mapping) and words_of(body):
            raise ErrorInside(body) from None
        raise Unreadable("no choice in it") from None
    thought = next((value for name in THOUGHT_FIELDS if isinstance(value := getattr(message, name, None), str)), "")
    if isinstance(text, list):
        parts = [part for part in text if isinstance(part, dict)]
        thought = thought or "".join(str(part.get("thinking") or "") for part in parts)
        text = "".join(str(part.get("text") or "") for part in parts if part.get("type", "text") in _TEXTS)
    finish = _finish(reason, getattr(choice, "stop_reason", None), stop)
    if not isinstance(text, str | None):
        raise Unreadable("no text in it")
    # What was cut while it still thought has no text. What ended without may have been meant so.
    if not text and finish != "length" and (cause := _why_nothing(message, text, thought, reason, finish)):
        raise Withheld(cause)
    return text or "", finish, thought


def _why_nothing(message: Any, text: str | None, thought: str, reason: object, finish: str) -> str | None:
    if refusal := getattr(message, "refusal", None):
        return f"refusal: {refusal}"
    if thought:
        return "a thought and no answer"
    if getattr(message, "tool_calls", None):
        return "a call of a tool and no text"
    if text is None or finish not in ("stop", "stop_sequence"):
        return f"content {'null' if text is None else 'empty'}, finish_reason {reason}"
    return None


def words_of(body: object, depth: int = 5) -> str:
    """The reason that a provider gives, wherever its error object has it; empty for none."""
    if isinstance(body, str):
        return body
    inside = (
        [body.get(name) for name in _WORDS] if isinstance(body, Mapping) else body if isinstance(body, list) else []
    )
    return next(filter(None, (words_of(part, depth - 1) for part in inside)), "") if depth else ""


def _finish(reason: object, stopped_at: object, stop: object) -> str:
    """`stop`, `length` or what the server calls it: what is not known to be an end is not one."""
    word = word_of(reason)
    if word in LENGTHS:
        return "length"
    # At a text that the request named the model was stopped; it did not end.
    named = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    if word not in ENDS:
        return "unknown" if reason is None else f"{word:.40}"
    return "stop_sequence" if named and (word == "stop_sequence" or stopped_at in named) else "stop"


def word_of(reason: object) -> str:
    """A finish reason without what only spells it: `FinishReason.MAX_TOKENS`, `max-tokens`, `maxTokens`, an object."""
    text = str(reason.get("type") if isinstance(reason, Mapping) else reason).rsplit(".", 1)[-1]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower()
    return re.sub(r"[^a-z]+", "_", words).strip("_").removeprefix("finish_reason_")


def _fields(response: Any) -> object:
    return response.model_dump() if hasattr(response, "model_dump") else response


def _status_like(body: object) -> int:
    """The status of HTTP that an error object is like: by its code if it has one, else by its words."""
    fields = body if isinstance(body, Mapping) else {}
    for name in ("code", "status", "status_code", "error_code"):
        value = fields.get(name)
        code = int(str(value)) if str(value).isdecimal() else 0
        if 400 <= code < 600:
            return code
    words = str(body).lower()
    for status, pattern in WORDS.items():
        if re.search(pattern, words):
            return status
    return 500


def status_of(error: BaseException) -> int | None:
    """The status of HTTP that came with an error, or that it is like; None without one."""
    if isinstance(error, APIStatusError):
        return error.status_code
    return error.status if isinstance(error, ErrorInside) else None


def is_about_content(error: BaseException) -> bool:
    """Whether a provider said that it refuses this request for what it holds, or answered it with nothing."""
    if isinstance(error, APIStatusError | ErrorInside) and status_of(error) in (400, 403, 422, 451):
        return re.search(WORDS[400], str(error.body).lower()) is not None
    return isinstance(error, Withheld)


def is_about_one(error: BaseException) -> bool:
    """Whether others may succeed where this request was refused: not for a key, an account, an address or a model."""
    if is_about_content(error):
        return True
    if not isinstance(error, APIStatusError | ErrorInside) or may_pass(error):
        return False
    is_account = re.search(f"{WORDS[401]}|{WORDS[402]}", f"{error.body or error}".lower())
    status = status_of(error) or 0
    return 400 <= status < 500 and status not in FOR_ALL | MAY_PASS and not is_account


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, too many requests, a fault of the server, half a reply."""
    status = status_of(error)
    if status is not None:
        return (status in MAY_PASS or status >= 500) and getattr(error, "code", None) not in NEVER_PASS
    return isinstance(error, APIConnectionError | APIResponseValidationError | TimeoutError | Unreadable)
