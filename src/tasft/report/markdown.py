"""A report as Markdown."""

from collections.abc import Sequence

from tasft.report.blocks import BAD, MARKDOWN, Block, Bullets, Code, Document, Heading, Paragraph, Section, Table
from tasft.report.text import fenced, inline_markdown, markdown_table


def markdown(document: Document) -> str:
    """The whole, without plots and replies."""
    lines = [f"# {inline_markdown(document.name)}: {document.kind.lower()}", "", *opening(document)]
    for section in document.shown(MARKDOWN):
        lines += section_lines(section)
    return "\n".join(lines)


def opening(document: Document) -> list[str]:
    """The verdict."""
    verdict = document.verdict
    lines = []
    if verdict.status:
        detail = f" {inline_markdown(verdict.detail)}" if verdict.detail else ""
        lines += [f"**{inline_markdown(verdict.status)}.**{detail}", ""]
    return lines + [line for sentence in verdict.sentences for line in (inline_markdown(sentence), "")]


def section_lines(section: Section) -> list[str]:
    """A section under its heading."""
    return [f"## {section.title}", "", *(line for block in section.blocks for line in _block(block))]


def _block(block: Block) -> Sequence[str]:
    match block:
        case Paragraph(text, tone):
            return [f"{'> ' if tone == BAD else ''}{inline_markdown(text)}", ""]
        case Heading(text):
            return [f"### {inline_markdown(text)}", ""]
        case Bullets(items):
            return [*(f"- {inline_markdown(item)}" for item in items), ""]
        case Table():
            rows = [[f"{c.text} ({c.detail})" if c.detail else c.text for c in row] for row in block.cells()]
            return markdown_table([inline_markdown(name) for name in block.head], rows)
        case Code(title, text, language):
            return [f"### {inline_markdown(title)}", "", fenced(text, language), ""]
    return []
