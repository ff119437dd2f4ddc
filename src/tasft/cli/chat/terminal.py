"""Two models side by side in a terminal."""

import sys
from collections.abc import Iterator
from contextlib import closing

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tasft.cli.chat.talk import Talk, Turn
from tasft.core.errors import UserError
from tasft.core.text import visible

NEW = "/new"


def talk_in_terminal(talk: Talk) -> None:
    """Read prompts, a line each, until there are no more; Ctrl-C ends a reply."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    remembers = f"; {NEW} begins a new conversation" if talk.remembers else ", and stands alone"
    console.print(Text(f"Each line is put to both models{remembers}. Ctrl-D ends."))
    past: list[Turn] = []
    for prompt in _prompts(console):
        if prompt == NEW:
            past = []
            continue
        try:
            turn = _shown(console, talk, past, prompt)
        except UserError as error:
            console.print(Text(visible("\n".join(error.faults))))
        except KeyboardInterrupt:
            console.print(Text("stopped"))
        else:
            past.append(turn)


def _prompts(console: Console) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            if not sys.stdin.isatty():
                console.print(Text(f"> {visible(line.strip())}"))
            yield line.strip()


def _shown(console: Console, talk: Talk, past: list[Turn], prompt: str) -> Turn:
    turn = Turn(prompt)
    with (
        # Closed when a reply is stopped: its adapter comes off the model.
        closing(talk.turn(past, prompt)) as growing,
        # Of what grows a terminal shows no more than it is high, and a file nothing: the whole is printed at the end.
        Live(console=console, transient=True, refresh_per_second=8) as live,
    ):
        for turn in growing:
            live.update(_table(talk, turn))
    console.print(_table(talk, turn))
    return turn


def _table(talk: Talk, turn: Turn) -> Table:
    """Replies are hostile: each character that would move a cursor is shown as its number, and nothing is markup."""
    drawn = Table.grid(expand=True)
    for _ in talk.sides:
        drawn.add_column(ratio=1, overflow="fold")
    drawn.add_row(
        *(
            Panel(Text(visible(reply)), title=Text(visible(side.title)))
            for side, reply in zip(talk.sides, turn.replies, strict=True)
        )
    )
    drawn.add_row(*(Text(visible(verdict), style="bold") for verdict in turn.verdicts))
    return drawn
