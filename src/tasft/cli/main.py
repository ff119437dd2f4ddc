"""The command `tasft`. Heavy imports live inside the commands, so that --help answers at once."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from tasft.cli import judging, models, runs, start, sweeps
from tasft.cli.common import fault_of
from tasft.core import streams
from tasft.core.errors import UserError
from tasft.core.progress import plain_without_terminal, without_needless_warnings
from tasft.core.redact import redacted
from tasft.core.text import visible

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a language model safe while it is fine-tuned, from nothing but its own harmful answers.",
)

# In the order of --help.
COMMANDS: dict[str, Callable[..., None]] = {
    "run": runs.run,
    "sft": runs.sft,
    "harvest": runs.harvest,
    "train": runs.train,
    "evaluate": models.evaluate,
    "compare": models.compare,
    "logs": models.logs,
    "view": start.view,
    "report": runs.report,
    "check": sweeps.check,
    "sweep": sweeps.sweep,
    "export": runs.export,
    "chat": models.chat,
    "judge": judging.judge_file,
    "init": start.init,
    "doctor": start.doctor,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tasft {version('tasft')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# No library tells anybody that it is used.
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # Asked by datasets for local files, too.
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main() -> None:
    """Entry point: exit code 0 done, 1 our fault, 2 the user can fix it, 3 a gate is not met, 130 or 143 stopped."""
    for name, value in {"TOKENIZERS_PARALLELISM": "false", **_QUIET}.items():
        os.environ.setdefault(name, value)
    out = streams.last()
    plain_without_terminal()
    without_needless_warnings()
    code: Any = 0
    try:
        _refuse_bytes(sys.argv[1:])
        app()
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            # What a library says may hold a key.
            print(redacted(traceback.format_exc()), file=sys.stderr)
            sys.exit(1)
        if os.environ.get("RANK", "0") != "0":
            # The first rank finds the same fault and says it for all, and its end is theirs. If not, this one must.
            time.sleep(30)
        for sentence in fault.faults:
            # It may quote a file, which may hold what moves a cursor.
            print(f"tasft: {visible(sentence)}", file=sys.stderr)
        code = 2
    if out.lost and not code:
        print(f"tasft: what was printed is lost ({out.lost}); files are whole", file=sys.stderr)
        code = 2
    sys.exit(code)


def _refuse_bytes(words: Sequence[str]) -> None:
    """Names of files that are not UTF-8 are taken by Python and not by the libraries that save weights.

    Raises:
        UserError: Names each.
    """
    strange = [word for word in words if any("\ud800" <= letter <= "\udfff" for letter in word)]
    faults = [
        f"{word!r:.200} cannot be read in this locale: set PYTHONUTF8=1"
        if _is_utf8(os.fsencode(word))
        else f"{word!r:.200} is not UTF-8: rename the file or folder"
        for word in strange
    ]
    if faults:
        raise UserError(faults)


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
