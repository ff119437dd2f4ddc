"""What commands share: their options, where a result is printed, and what becomes of Ctrl-C."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tasft.core.errors import UserError
from tasft.core.text import visible

if TYPE_CHECKING:
    from rich.table import Table


RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, a run folder, or a shipped name such as demo.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Fields to override, e.g. train.penalty=nlcl.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and all else on stderr.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<name>.", show_default=False)]


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what there is to do; write nothing.")]


# As `tasft.run.launch.KINDS`, which must not be imported for --help alone.
Launch = Literal["ddp", "fsdp2", "zero2", "zero3"]
LaunchOption = Annotated[
    Launch | None,
    typer.Option("--launch", help="Train in several processes: whole models (ddp), or parts.", show_default=False),
]
DataParallelOption = Annotated[
    Literal["ddp"] | None,
    typer.Option("--launch", help="Answer and judge in several processes, a GPU each.", show_default=False),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", "-n", min=1, help="How many; default one for each GPU.", show_default=False),
]


@contextmanager
def alone(as_json: bool) -> Iterator[None]:
    """With --json only the result goes to stdout, where a program reads it; of a fault that the user can fix, this."""
    if not as_json:
        yield
        return
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            raise
        print_json({"faults": fault.faults})
        raise fault from error


def fault_of(error: Exception) -> UserError | None:
    """What a user can put right: it is said so already, or a disk or a folder refused something, whoever asked."""
    if isinstance(error, UserError):
        return error
    from tasft.core.provenance import refused

    return refused(error)


def print_json(found: object) -> None:
    """The one object of --json."""
    import json

    print(json.dumps(found, indent=2))


def print_table(found: "Table") -> None:
    """A table as wide as the terminal; 160 columns for a file or a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(found)


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end with 130 and 143, as is usual, and with the line that goes on."""
    asked = signal.SIGINT

    def terminated(number: int, frame: object) -> None:
        nonlocal asked
        asked = signal.SIGTERM
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            again = visible(shlex.join(["tasft", *sys.argv[1:]]))
            print(f"tasft: interrupted; what was done is kept. Go on with: {again}", file=sys.stderr)
        raise typer.Exit(128 + asked) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def again(arguments: Sequence[str], kind: str, processes: int | None) -> None:
    """Run this program with other arguments, in several processes; does not return."""
    from tasft.run import launch

    command = [sys.executable, "-c", "from tasft.cli.main import main; main()", *arguments]
    raise typer.Exit(launch.launch(command, kind, processes or launch.gpus() or 1))
