"""Commands around the work: a first recipe, the machine, the reports of a folder."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from tasft.cli.common import JsonOption, alone, print_json, print_table
from tasft.core.errors import UserError


def _asks(yes: bool) -> bool:
    return not yes and sys.stdin.isatty()


def init(
    model: Annotated[str | None, typer.Option("--model", help="A hub name, a folder or a .gguf file.")] = None,
    imitate: Annotated[
        str | None, typer.Option("--imitate", help="Your rows: prompt and completion, or Alpaca's columns.")
    ] = None,
    toxic: Annotated[str | None, typer.Option("--toxic", help="Prompts whose harmful answers are avoided.")] = None,
    benign: Annotated[str | None, typer.Option("--benign", help="Prompts that should be answered.")] = None,
    toxic_heldout: Annotated[
        str | None, typer.Option("--toxic-heldout", help="Others of both kinds, to evaluate on.")
    ] = None,
    benign_heldout: Annotated[str | None, typer.Option("--benign-heldout", help="Likewise.")] = None,
    prompt: Annotated[
        Literal["chat", "alpaca"] | None,
        typer.Option("--prompt", help="How prompts are written; default chat where the model has a template."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The file; its name without .yaml names the run.")] = Path(
        "recipe.yaml"
    ),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: the demo's for what is not said.")] = False,
) -> None:
    """Write a first recipe, with every field and what it means; a file that is there stays as it is.

    Asks for what no option says, where there is a terminal.

    Example: tasft init --model HuggingFaceTB/SmolLM2-135M --imitate alpaca.jsonl --out mine.yaml
    """
    if out.exists():  # Before anything is asked.
        raise UserError(f"{out} is there already and stays as it is: choose another with --out")

    def ask(given: str | None, question: str, default: str) -> str:
        return given or (str(typer.prompt(question, default=default)) if _asks(yes) else default)

    base = ask(model, "Model: a hub name, a folder or a .gguf file", "smollm2-135m-instruct")
    rows = ask(imitate, "Rows to imitate, a file of prompt and completion; none: its own answers", "none")
    asked = {
        "toxic": ask(toxic, "Toxic prompts, a file or a named set", "demo-toxic-harvest"),
        "benign": ask(benign, "Benign prompts", "demo-benign-train"),
        "heldout_toxic": ask(toxic_heldout, "Toxic prompts to evaluate on", "demo-toxic-heldout"),
        "heldout_benign": ask(benign_heldout, "Benign prompts to evaluate on", "demo-benign-heldout"),
    }
    from tasft.cli import init as first

    first.write(out, first.values_of(out.stem, base, prompt or first.prompt_of(base), rows, **asked))
    print(f"{out} is written. Look at it, then: tasft check {shlex.quote(str(out))}")


def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also ask the model hub, for 5 seconds at most.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can do: Python, torch, GPU, extras, models, memory, disk, hub.

    Exit code 2: something that tasft needs is missing.

    Example: tasft doctor --hub
    """
    from tasft.cli import doctor as doctors

    with alone(as_json):
        result = doctors.examine(hub)
    if as_json:
        print_json(result)
    else:
        print_table(doctors.table(result))
    if result["faults"]:
        raise UserError(result["faults"])


def view(
    folder: Annotated[Path, typer.Argument(help="A folder with runs, sweeps or evaluations below it.")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", min=0, help="Default: a free one.", show_default=False)] = 0,
) -> None:
    """Serve the reports under a folder to this machine, with a list of them: gate, rates, date.

    Example: tasft view runs
    """
    from tasft.cli.view import view as serve

    serve(folder, port)
