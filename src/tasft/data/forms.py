"""Forms in which people keep rows, told from the names of their columns."""

import ast
import json
import re
from collections.abc import Mapping
from io import StringIO
from tokenize import NL, OP, TokenError, generate_tokens, untokenize
from typing import Any, Literal, get_args

FormName = Literal["prompt_completion", "messages", "sharegpt", "alpaca", "question_answer"]

FORMS: dict[str, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
}
"""Columns of each form: of the prompt and the completion, or of a conversation that holds both."""
assert tuple(FORMS) == get_args(FormName)

PROMPT_COLUMNS = ("prompt", "instruction", "question", "text", "messages", "conversations")
"""Where a prompt is looked for, the first that there is."""

# What people call who speaks: a template that knows `user` alone would write `User` as anybody.
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("function_response", "observation"), "tool"),
}

_BRACKETS = re.compile(r"\s*\[\s*\{.*\}\s*\]\s*", re.DOTALL)
_KEYS = (("role", "content"), ("from", "value"))

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Where a row in any form has its system message, if not in the conversation."""


def form_of(row: Mapping[str, Any]) -> str:
    """The form whose columns a row has, all of them or else some; `prompt_completion` for none."""
    whole = [name for name, columns in FORMS.items() if row.keys() >= set(columns)]
    part = [name for name, columns in FORMS.items() if row.keys() & set(columns)]
    return [*whole, *part, "prompt_completion"][0]


def renamed_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under the names that a form knows.

    Args:
        row: Fields of a file.
        columns: The form's name of a column, and the file's.
    """
    new = {file: name for name, file in columns.items()}
    # What had the name before makes way.
    return {new.get(key, key): value for key, value in row.items() if key in new or key not in columns}


def turns_of(value: Any) -> Any:
    """A conversation with `role` and `content`, where it has other names for them or a table wrote it as text.

    Anything else is left as it is.
    """
    value = _read_out(value) if isinstance(value, str) else value
    return [_turn(turn) for turn in value] if isinstance(value, list) else value


def _turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    if {"from", "value"} <= turn.keys():
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {**others, "role": turn["from"], "content": turn["value"]}
    role = turn.get("role")
    if not isinstance(role, str):
        return turn
    plain = role.strip().lower()
    return {**turn, "role": _ROLES.get(plain, plain)}


def _read_out(text: str) -> Any:
    """The conversation that a cell of a table holds, as JSON or as Python or numpy shows it; other text as it is."""
    if text.lstrip()[:1] == "[":
        for read in (json.loads, ast.literal_eval, _from_array):
            try:
                value = read(text)
            except (ValueError, SyntaxError, TokenError, RecursionError, MemoryError):
                continue
            if value and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in value):
                return value
    return text


def _from_array(text: str) -> Any:
    """What numpy shows without commas: as Python, with one between `}` and `{` wherever they are no part of a text."""
    tokens: list[tuple[int, str]] = []
    for kind, token, *_ in generate_tokens(StringIO(text.strip()).readline):
        tokens += [(OP, ",")] if token == "{" and tokens and tokens[-1][1] == "}" else []
        tokens += [(kind, token)] if kind != NL else []
    return ast.literal_eval(untokenize(tokens))


def looks_like_talk(value: object) -> bool:
    """Whether text begins and ends as a conversation does that a table wrote, and has its keys."""
    if not isinstance(value, str) or not _BRACKETS.fullmatch(value):
        return False
    return any(all(re.search(rf"['\"]{key}['\"]\s*:", value) for key in keys) for keys in _KEYS)


def turns_before(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What columns of a row put before its prompt: a system message, and earlier turns as pairs or messages.

    Returns:
        Messages; None if the columns hold something else.
    """
    system = next((row[name] for name in SYSTEM_COLUMNS if row.get(name)), "")
    history = row.get("history") or []
    if not isinstance(system, str) or not isinstance(history, list):
        return None
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for turn in history:
        if isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
        elif isinstance(turn, Mapping):
            turns.append(dict(turn))
        else:
            return None
    return turns


def said(counts: Mapping[str, int], turns: str) -> list[str]:
    """A line for each form but our own: how many rows have it, and what of them is learned."""
    learned = "the last assistant turn is learned" if turns == "last" else "all assistant turns are learned"
    return [
        f"{count:,} rows of {form}" + (f"; {learned}" if len(FORMS[form]) == 1 else f" ({', '.join(FORMS[form])})")
        for form, count in counts.items()
        if form != "prompt_completion"
    ]
