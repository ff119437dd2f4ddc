"""Forms in which people keep rows, told from the names of their columns."""

from collections.abc import Mapping
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

# ShareGPT's names of who speaks, and of the two fields of a turn.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
}


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
    """A conversation with `role` and `content`, where it has ShareGPT's `from` and `value`; anything else as it is."""
    if not isinstance(value, list):
        return value
    return [
        {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        if isinstance(turn, Mapping) and {"from", "value"} <= turn.keys() and isinstance(turn["from"], str)
        else turn
        for turn in value
    ]


def said(counts: Mapping[str, int], turns: str) -> list[str]:
    """A line for each form but our own: how many rows have it, and what of them is learned."""
    learned = "the last assistant turn is learned" if turns == "last" else "all assistant turns are learned"
    return [
        f"{count:,} rows of {form}" + (f"; {learned}" if len(FORMS[form]) == 1 else f" ({', '.join(FORMS[form])})")
        for form, count in counts.items()
        if form != "prompt_completion"
    ]
