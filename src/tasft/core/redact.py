"""Keys and passwords: kept out of what is said, and refused where they would be written."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_VARIABLES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
# Shorter values of such variables are words as often as keys.
_SHORTEST = 12
_NAMES = re.compile(
    r"(api|access|secret|private|auth)[_-]?(key|token)|(^|[_-])(token|secret|password|credentials?)$|^authorization$",
    re.IGNORECASE,
)
# A user and password in an address; what OpenAI, Hugging Face, GitHub and Amazon make keys look like.
_SHAPES = re.compile(
    r"(?<=://)[^/\s@\"']+(?=@)|(?<=Bearer )[\w.~+/=-]+|"
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|AKIA[A-Z0-9]{12,})"
)


def _known() -> list[str]:
    """Values of environment variables that are named like keys, the longest first."""
    values = {value.strip() for name, value in os.environ.items() if _VARIABLES.search(name)}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)


def redacted(text: str) -> str:
    """The text with `***` for what is a key or password by its looks, or by a variable of the environment."""
    for value in _known():
        text = text.replace(value, "***")
    return _SHAPES.sub("***", text)


def named_like_a_key(name: str) -> bool:
    """Whether a field is called as keys are: `api_key`, `token`; not `max_tokens`."""
    return _NAMES.search(name) is not None


def secrets_in(value: Any, where: str = "") -> Iterator[str]:
    """The places within a JSON value that hold a key or password by `redacted`, as `a.b.0`."""
    if isinstance(value, str):
        if redacted(value) != value:
            yield where
        return
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from secrets_in(item, f"{where}.{name}" if where else str(name))
