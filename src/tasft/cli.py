"""The command `tasft`. Heavy imports live inside the commands, so that --help answers at once."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tasft.errors import UserError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a language model safe while it is fine-tuned, from nothing but its own harmful answers.",
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, a run folder, or a shipped name such as demo.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Fields to override, e.g. train.penalty=nlcl.", show_default=False)
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<name>.", show_default=False)]


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


def _go(source: str, overrides: Sequence[str] | None, out: Path | None, stages: Sequence[str] | None) -> None:
    from tasft import pipeline, recipe

    spec = recipe.load(source, overrides or ())
    if out is None:
        out = Path(source) if (Path(source) / "recipe.yaml").is_file() else Path("runs") / spec.name
    try:
        pipeline.Run(spec, out).go(pipeline.STAGES if stages is None else tuple(stages))
    except KeyboardInterrupt:
        print("tasft: interrupted; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def run(recipe: RecipeArgument, overrides: OverridesArgument = None, out: OutOption = None) -> None:
    """Run all stages; run it again to go on after an interruption.

    Example: tasft run demo --out runs/demo
    """
    _go(recipe, overrides, out, None)


def _stage(name: str, what: str) -> None:
    def command(recipe: RecipeArgument, overrides: OverridesArgument = None, out: OutOption = None) -> None:
        _go(recipe, overrides, out, [name])

    command.__doc__ = f"{what}\n\nExample: tasft {name} demo --out runs/demo"
    app.command(name)(command)


_stage("sft", "Fine-tune the base model on data.imitate, where the recipe asks for it.")
_stage("harvest", "Let the model answer, judge its answers, and keep rows to avoid and to imitate.")
_stage("train", "Train on the rows.")
_stage("evaluate", "Answer and judge the evaluation sets, before and after.")
_stage("report", "Write the report as HTML, Markdown and CSV.")


@app.command()
def check(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Name every fault of a recipe and its data before a weight is loaded.

    Example: tasft check recipe.yaml train.penalty=nlcl
    """
    from tasft import pipeline
    from tasft import recipe as recipes

    spec = recipes.load(recipe, overrides or ())
    pipeline.Inputs(spec).check()
    print(f"{spec.name}: no fault found")


def main() -> None:
    """Entry point: exit code 0 done, 2 the user can fix it, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Said at every checkpoint of a GGUF model, whose folder has no config.json; the vocabulary is not changed here.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    # Between transformers and peft; nothing that a user could do about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        app()
    except UserError as error:
        for fault in error.faults:
            print(f"tasft: {fault}", file=sys.stderr)
        sys.exit(2)
