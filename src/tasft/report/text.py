"""Text that a model or a user wrote, in Markdown and CSV."""

import re
from collections.abc import Iterable, Sequence

from tasft.core.text import visible


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
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@＝＋－＠") else text


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table and the empty one after it; cells are escaped, heads are our own."""
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(map(inline_markdown, row))} |" for row in rows),
        "",
    ]
