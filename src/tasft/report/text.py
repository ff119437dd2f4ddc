"""Text that a model or a user wrote, made fit to be shown."""

import re
import unicodedata

REPLY_LIMIT = 2_000
"""Characters of a reply that the page shows."""

# What a reader cannot see, or what moves the text around it: controls, formats (bidi, zero width,
# soft hyphen, tags), lone surrogates, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""Each character that hides or moves text becomes its number, as in `⟨U+202E⟩`.

    `\n` and `\t` stay. The result can always be encoded in UTF-8.
    """
    return "".join(f"⟨U+{ord(c):04X}⟩" if c not in "\n\t" and unicodedata.category(c) in _HIDDEN else c for c in text)


def cut(text: str, limit: int = REPLY_LIMIT) -> str:
    """The first `limit` characters, with a note on how many more there are."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … [cut: {len(text) - limit:,} more characters]"


def inline_markdown(text: str) -> str:
    """One line in which nothing is markup, neither Markdown's nor HTML's; fit for a table cell."""
    line = " ".join(visible(text).split())
    return re.sub(r"[\\`*\[\]<>&|]", lambda match: f"&#{ord(match[0])};", line)


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    text = visible(text).rstrip("\n")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def csv_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: such a start gets a leading apostrophe."""
    text = visible(text)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text
