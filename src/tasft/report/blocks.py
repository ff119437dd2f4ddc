"""What a report is made of: a verdict and a list of sections, which each renderer writes in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

GOOD, BAD, NEUTRAL = "good", "bad", ""
PAGE, MARKDOWN, CARD = "page", "markdown", "card"
EVERYWHERE = frozenset({PAGE, MARKDOWN, CARD})


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        detail: More, in smaller letters.
        tone: `GOOD`, `BAD` or `NEUTRAL`.
        link: A page beside this one; empty for none.
    """

    text: str
    detail: str = ""
    tone: str = NEUTRAL
    link: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A sentence or a few; `tone` BAD is an alert, `small` a note."""

    text: str
    tone: str = NEUTRAL
    small: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table whose first cells name its rows.

    Attributes:
        title: What it is about, for those who hear the page; shown where it is folded.
        head: Names of the columns.
        rows: Cells; a plain string is one without anything besides.
        folded: Shown on the page when it is asked for.
        strong: Numbers of the rows to read first.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    folded: bool = False
    strong: frozenset[int] = frozenset()

    def cells(self) -> list[list[Cell]]:
        """All cells as such."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Plot:
    """A picture for a light and a dark page as data URLs, with the words for who cannot see it."""

    light: str
    dark: str
    alt: str


@dataclass(frozen=True)
class Pictures:
    """Plots with their captions, on the page alone."""

    plots: Sequence[tuple[Plot, str]]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A file as it is, folded."""

    title: str
    text: str
    language: str


@dataclass(frozen=True)
class Replies:
    """The browser of replies, on the page alone; `data` is what `tasft.report.replies` gives."""

    data: dict[str, Any]


Block = Paragraph | Heading | Table | Pictures | Bullets | Code | Replies


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        blocks: What it holds; without any it is left out.
        where: Which renderers show it.
        folded: Closed on the page until it is asked for.
    """

    title: str
    blocks: Sequence[Block]
    where: frozenset[str] = EVERYWHERE
    folded: bool = False

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Verdict:
    """The answer that a report opens with.

    Attributes:
        status: Whether the gate is met, in two or three words; empty where there is nothing to be met.
        tone: How it looks.
        detail: What is not met and by how much.
        sentences: What became of the model; the first says the most.
    """

    status: str
    tone: str
    detail: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        kind: What it is a report of.
        name: Of the run, the model, the sweep.
        verdict: What it opens with.
        sections: In their order.
        footer: Where its figures are from.
    """

    kind: str
    name: str
    verdict: Verdict
    sections: list[Section] = field(default_factory=list)
    footer: str = ""

    def shown(self, renderer: str) -> list[Section]:
        """Sections that a renderer shows."""
        return [section for section in self.sections if section.blocks and renderer in section.where]
