"""Commands that run a recipe, all of it or a stage, and what is made of a finished run."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tasft.cli.common import (
    DataParallelOption,
    DryRunOption,
    JsonOption,
    LaunchOption,
    OutOption,
    OverridesArgument,
    ProcessesOption,
    RecipeArgument,
    again,
    alone,
    print_json,
    print_table,
    resumable,
)
from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.core.text import visible
from tasft.run.doors import folder_of, opened_run

if TYPE_CHECKING:
    from tasft.run.pipeline import Pipeline


def print_plan(
    source: str, overrides: Sequence[str] | None, out: Path | None, stages: Sequence[str] | None, as_json: bool = False
) -> None:
    """--dry-run: what there is to do in these stages (None: all)."""
    with alone(as_json):
        opened = opened_run(source, out, overrides or ())
        from tasft.run import plan
        from tasft.run.stages import STAGES

        planned = plan.plan(opened, tuple(stages or STAGES))
    if as_json:
        print_json(planned)
        return
    print(f"folder: {opened.folder}")
    for field, count in planned["rows"].items():
        print(f"{field}: {count:,}")
    print(f"model: {planned['model']['parameters']:,} parameters")
    if (held := planned["model"]["training_gib"]) is not None:
        print(f"training: {held} GiB for weights, gradients and optimizer; activations come on top")
    print_table(plan.table(planned))


def go(
    source: str, overrides: Sequence[str] | None, out: Path | None, stages: Sequence[str] | None, as_json: bool = False
) -> None:
    """Run these stages (None: all).

    Raises:
        typer.Exit: 3, the gate of the recipe is not met.
    """
    with resumable(), alone(as_json):
        opened = opened_run(source, out, overrides or ())
        opened.go(*([] if stages is None else [tuple(stages)]))
        if stages is None and os.environ.get("RANK", "0") == "0":
            _say_rates(opened)
    _end(opened.folder, as_json, with_gate=stages is None or "report" in stages)


def _end(folder: Path, as_json: bool, with_gate: bool = True) -> None:
    """Print the object of --json; tell the limits that are not met.

    Raises:
        typer.Exit: 3, there are such.
    """
    gate = provenance.read_json(folder / "report" / "gate.json") if with_gate else None
    if as_json:
        times = (provenance.read_json(folder / "manifest.json") or {}).get("stages", {})
        print_json({"folder": str(folder), "stages": times, "gate": gate})
    if gate and not gate["met"]:
        broken = [limit["sentence"] for limit in gate["limits"] if not limit["met"]]
        print("\n".join(f"tasft: gate not met: {visible(sentence)}" for sentence in broken), file=sys.stderr)
        raise typer.Exit(3)


def _say_rates(opened: "Pipeline") -> None:
    """What a finished run is read for first: the rates before and after, and the limits that are kept."""
    from tasft.report.outcomes import rates_table
    from tasft.report.read import read_run

    print_table(rates_table(read_run(opened.folder)))
    for limit in opened.gate["limits"] if opened.gate else ():
        if limit["met"]:
            print(f"gate: met: {visible(limit['sentence'])}")


def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run all stages; run it again to go on after an interruption.

    Exit code 0: done; 2: you can put right what is said; 3: done, but the recipe's gate is not met.

    Example: tasft run demo --out runs/demo
    """
    (print_plan if dry_run else go)(recipe, overrides, out, None, as_json)


PreviewOption = Annotated[
    bool, typer.Option("--preview", help="Only print a few rows of each kind as the model would see them.")
]


def _preview(source: str, overrides: Sequence[str] | None, out: Path | None, stage: str) -> None:
    from rich.console import Console

    for text in opened_run(source, out, overrides or ()).preview(stage):
        Console().print(text)


def _launch(
    name: str,
    source: str,
    overrides: Sequence[str] | None,
    out: Path | None,
    kind: str | None,
    processes: int | None,
    dry_run: bool,
) -> None:
    if dry_run:
        print_plan(source, overrides, out, [name])
    elif kind is None:
        go(source, overrides, out, [name])
    else:
        again([name, *([] if out is None else ["--out", str(out)]), "--", source, *(overrides or ())], kind, processes)


def _training(name: str, what: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        out: OutOption = None,
        launch: LaunchOption = None,
        processes: ProcessesOption = None,
        preview: PreviewOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        if preview:
            _preview(recipe, overrides, out, name)
        else:
            _launch(name, recipe, overrides, out, launch, processes, dry_run)

    return _described(command, name, what)


def _answering(name: str, what: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        out: OutOption = None,
        launch: DataParallelOption = None,
        processes: ProcessesOption = None,
        dry_run: DryRunOption = False,
    ) -> None:
        _launch(name, recipe, overrides, out, launch, processes, dry_run)

    return _described(command, name, what)


def _described(command: Callable[..., None], name: str, what: str) -> Callable[..., None]:
    command.__doc__ = f"{what}\n\nExample: tasft {name} demo --out runs/demo"
    return command


sft = _training("sft", "Fine-tune the base model on data.imitate, where the recipe asks for it.")
harvest = _answering("harvest", "Let the model answer, judge its answers, and keep rows to avoid and to imitate.")
train = _training("train", "Train on the rows.")


def report(
    recipe: RecipeArgument, overrides: OverridesArgument = None, out: OutOption = None, as_json: JsonOption = False
) -> None:
    """Write the report of a run as HTML, Markdown, CSV and a model card; of a sweep's folder as the first three.

    Example: tasft report demo --out runs/demo
    """
    if (Path(recipe) / "sweep.json").is_file():
        if overrides or out:
            raise UserError(f"{recipe} is a sweep: its report takes no fields and no --out")
        from tasft.report import write_sweep_report

        with alone(as_json):
            page = write_sweep_report(Path(recipe))
            print(f"report: {page}")
        if as_json:
            print_json({"folder": recipe, "report": str(page)})
        return
    if not _report_is_written(recipe, overrides, out, as_json):
        go(recipe, overrides, out, ["report"], as_json)


def _report_is_written(source: str, overrides: Sequence[str] | None, out: Path | None, as_json: bool) -> bool:
    """Whether the report is that of this recipe and of the steps that lie there; then it is said, without torch.

    Raises:
        typer.Exit: 3, the gate of the recipe is not met.
    """
    from tasft.core.step import EARLIER, done_key
    from tasft.run import recipe_file

    with alone(as_json):
        spec = recipe_file.load(source, overrides or ())
    folder = folder_of(source, spec.name, out)
    done = provenance.read_json(folder / "report" / "done.json") or {}
    reads = done.get("reads") or {}
    files = [file for file in folder.rglob("done.json") if EARLIER not in file.relative_to(folder).parts]
    finished = {done_key(file.parent) for file in files}
    if reads.get("recipe") != json.loads(json.dumps(spec.model_dump())) or not set(reads["steps"]) <= finished:
        return False
    with alone(as_json):
        print(f"report: done before\nreport: {folder / 'report' / 'index.html'}")
    _end(folder, as_json)
    return True


def export(
    run: Annotated[Path, typer.Argument(help="A run folder whose final model was evaluated; or an adapter's folder.")],
    folder: Annotated[Path, typer.Argument(help="Where the model goes: a folder that is not there or empty.")],
    push: Annotated[
        str | None, typer.Option("--push", metavar="NAME", help="Upload it to the hub too, after a question.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --push: do not ask.")] = False,
    ungated: Annotated[
        bool, typer.Option("--ungated", help="Also a model that does not meet the gate of its recipe.")
    ] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="The model that an adapter alone is for, if not the one it names.")
    ] = None,
    prompt: Annotated[
        Literal["chat", "alpaca"] | None, typer.Option("--prompt", help="How an adapter alone is asked; default chat.")
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="A .gguf file too, by llama.cpp's converter.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the final model of a run as one that needs no adapter, with tokenizer and model card.

    Its logits are compared with those of the run's own model. --push makes a private repository if there is none, and
    uploads the files of the export alone.

    Example: tasft export runs/demo models/demo
    """
    from dataclasses import asdict

    address = None
    with alone(as_json):
        if push and not (yes or sys.stdin.isatty()):
            raise UserError("--push asks before it uploads, and nobody can answer here: add --yes")
        from tasft.run import export as exports

        if push:
            exports.check_push(push)
        if gguf:
            exports.converter()
        if (run / "adapter_config.json").is_file():
            done = exports.export_adapter(run, folder, base, prompt or "chat", push)
        elif base or prompt:
            raise UserError("--base and --prompt are for an adapter alone: a run names its model itself")
        else:
            done = exports.export(run, folder, push, ungated)
        done = exports.add_gguf(done) if gguf else done
        for note in done.notes:
            print(note)
        print(f"model: {done.folder} ({sum(done.files.values()) / 1e6:,.0f} MB: {', '.join(done.files)})")
        if push and (yes or typer.confirm(f"Upload these {len(done.files)} files to {push} on the hub?")):
            address = exports.push(done, push)
            print(f"on the hub: {address}")
    if as_json:
        print_json(asdict(done) | {"folder": str(done.folder), "hub": address})
