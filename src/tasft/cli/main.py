"""The command `tasft`. Heavy imports live inside the commands, so that --help answers at once."""

import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tasft.core import streams
from tasft.core.errors import UserError
from tasft.core.progress import plain_without_terminal, without_needless_warnings
from tasft.core.redact import redacted
from tasft.core.text import visible

if TYPE_CHECKING:
    from rich.table import Table

    from tasft.run.pipeline import Pipeline
    from tasft.run.sweep import Sweep, SweepCell

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
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and all else on stderr.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<name>.", show_default=False)]


@contextmanager
def _alone(as_json: bool) -> Iterator[None]:
    """With --json only the result goes to stdout, where a program reads it; of a fault that the user can fix, this."""
    if not as_json:
        yield
        return
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        fault = _fault(error)
        if fault is None:
            raise
        _print_json({"faults": fault.faults})
        raise fault from error


def _fault(error: Exception) -> UserError | None:
    """What a user can put right: it is said so already, or a disk or a folder refused something, whoever asked."""
    if isinstance(error, UserError):
        return error
    from tasft.core.provenance import refused

    return refused(error)


def _print_json(found: object) -> None:
    import json

    print(json.dumps(found, indent=2))


def _table(found: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(found)


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


def _open(source: str, overrides: Sequence[str] | None, out: Path | None) -> "Pipeline":
    from tasft.run import recipe_file

    # Its faults are said before torch is imported, which takes seconds.
    spec = recipe_file.load(source, overrides or ())
    from tasft.run import pipeline

    if out is None:
        out = Path(source) if (Path(source) / "recipe.yaml").is_file() else Path("runs") / spec.name
    return pipeline.Pipeline(spec, out)


@contextmanager
def _resumable() -> Iterator[None]:
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


DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what there is to do, and about how long it takes; write nothing.")
]


def _plan(
    source: str, overrides: Sequence[str] | None, out: Path | None, stages: Sequence[str] | None, as_json: bool = False
) -> None:
    with _alone(as_json):
        opened = _open(source, overrides, out)
        from tasft.run import estimate
        from tasft.run.stages import STAGES

        found = estimate.plan(opened, tuple(stages or STAGES))
    if as_json:
        _print_json(found)
        return
    print(f"folder: {opened.folder}")
    for field, count in found["rows"].items():
        print(f"{field}: {count:,}")
    print(f"model: {found['model']['parameters']:,} parameters")
    _table(estimate.table(found))
    if found["memory_gib"] is not None:
        print(f"memory of training: about {found['memory_gib']} GiB")
    print(found.get("rule") or found["not_estimated"])


def _go(
    source: str, overrides: Sequence[str] | None, out: Path | None, stages: Sequence[str] | None, as_json: bool = False
) -> None:
    from tasft.core import provenance

    with _resumable(), _alone(as_json):
        opened = _open(source, overrides, out)
        opened.go(*([] if stages is None else [tuple(stages)]))
        if stages is None and os.environ.get("RANK", "0") == "0":
            _say_rates(opened)
    gate = opened.gate if stages is None or "report" in stages else None
    if as_json:
        times = provenance.read_json(opened.folder / "manifest.json")["stages"]
        _print_json({"folder": str(opened.folder), "stages": times, "gate": gate})
    if gate and not gate["met"]:
        broken = [limit["sentence"] for limit in gate["limits"] if not limit["met"]]
        print("\n".join(f"tasft: gate not met: {visible(sentence)}" for sentence in broken), file=sys.stderr)
        raise typer.Exit(3)


def _say_rates(opened: "Pipeline") -> None:
    """What a finished run is read for first: the rates before and after, and the limits that are kept."""
    from tasft.evaluate.results import summaries, table

    evaluated = opened.folder / "evaluate"
    states = {"base", "sft", "final"}
    rows = [row for row in summaries(evaluated) if row["state"] in states and row["set"] in opened.spec.evaluate.sets]
    if rows:
        _table(table(rows))
    for limit in opened.gate["limits"] if opened.gate else ():
        if limit["met"]:
            print(f"gate: met: {visible(limit['sentence'])}")


@app.command()
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
    (_plan if dry_run else _go)(recipe, overrides, out, None, as_json)


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


PreviewOption = Annotated[
    bool, typer.Option("--preview", help="Only print a few rows of each kind as the model would see them.")
]


def _preview(source: str, overrides: Sequence[str] | None, out: Path | None, stage: str) -> None:
    from rich.console import Console

    for text in _open(source, overrides, out).preview(stage):
        Console().print(text)


def _launch(
    name: str,
    source: str,
    overrides: Sequence[str] | None,
    out: Path | None,
    kind: str | None,
    processes: int | None,
) -> None:
    if kind is None:
        _go(source, overrides, out, [name])
    else:
        _again([name, *([] if out is None else ["--out", str(out)]), "--", source, *(overrides or ())], kind, processes)


def _again(arguments: Sequence[str], kind: str, processes: int | None) -> None:
    """Run this program with other arguments, in several processes; does not return."""
    from tasft.run import launch

    command = [sys.executable, "-c", "from tasft.cli.main import main; main()", *arguments]
    raise typer.Exit(launch.launch(command, kind, processes or launch.gpus() or 1))


def _training(name: str, what: str) -> None:
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
        elif dry_run:
            _plan(recipe, overrides, out, [name])
        else:
            _launch(name, recipe, overrides, out, launch, processes)

    _add(command, name, what)


def _answering(name: str, what: str) -> None:
    def command(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        out: OutOption = None,
        launch: DataParallelOption = None,
        processes: ProcessesOption = None,
        dry_run: DryRunOption = False,
    ) -> None:
        if dry_run:
            _plan(recipe, overrides, out, [name])
        else:
            _launch(name, recipe, overrides, out, launch, processes)

    _add(command, name, what)


def _add(command: Callable[..., None], name: str, what: str) -> None:
    command.__doc__ = f"{what}\n\nExample: tasft {name} demo --out runs/demo"
    app.command(name)(command)


_training("sft", "Fine-tune the base model on data.imitate, where the recipe asks for it.")
_answering("harvest", "Let the model answer, judge its answers, and keep rows to avoid and to imitate.")
_training("train", "Train on the rows.")


@app.command()
def evaluate(
    what: Annotated[
        str,
        typer.Argument(help="A recipe or run, all its states; or a model: hub name, folder, adapter, .gguf file."),
    ],
    overrides: OverridesArgument = None,
    out: OutOption = None,
    sets: Annotated[
        list[str] | None, typer.Option("--sets", help="Named prompt sets, by commas, instead of the recipe's.")
    ] = None,
    judge: Annotated[list[str] | None, typer.Option("--judge", help="Who judges, by commas.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder with the files of the sets; else they are downloaded.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most prompts of each set.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = None,
    prompt: Annotated[
        Literal["chat", "alpaca"] | None, typer.Option("--prompt", help="How a model alone is asked; default chat.")
    ] = None,
    as_json: JsonOption = False,
    launch: DataParallelOption = None,
    processes: ProcessesOption = None,
    dry_run: DryRunOption = False,
    with_report: Annotated[
        bool, typer.Option("--report", help="Of a model alone: write a page about it, in OUT/report.")
    ] = False,
) -> None:
    """Answer prompt sets and judge the replies; run it again to go on after an interruption.

    Of a recipe or run the model before and after training is evaluated, with what its evaluate section says unless
    options say otherwise. A model alone needs no recipe, only --sets.

    Example: tasft evaluate smollm2-135m-instruct --sets demo-toxic-heldout,xstest --data-dir data --limit 20
    """
    import json

    named, judges = ([name for each in option or () for name in each.split(",") if name] for option in (sets, judge))
    if launch is not None and not dry_run:
        options = {
            "--out": out,
            "--sets": ",".join(named),
            "--judge": ",".join(judges),
            "--data-dir": data_dir,
            "--limit": limit,
            "--max-new-tokens": max_new_tokens,
            "--prompt": prompt,
        }
        given = [str(word) for option, value in options.items() if value for word in (option, value)]
        given += ["--json"] * as_json + ["--report"] * with_report
        _again(["evaluate", *given, "--", what, *(overrides or ())], launch, processes)

    from tasft.run import recipe_file

    wanted: set[Path] | None = None
    asked = {
        "evaluate.sets": named,
        "evaluate.judges": judges,
        "data.data_dir": data_dir and str(data_dir),
        "evaluate.limit": limit,
        "evaluate.max_new_tokens": max_new_tokens,
    }
    fields = [*(overrides or ()), *(f"{key}={json.dumps(value)}" for key, value in asked.items() if value)]
    with _alone(as_json):
        is_recipe = recipe_file.is_recipe(what)
        if is_recipe and prompt is not None:
            raise UserError("--prompt is for a model alone: override model.prompt, which trains it so, too")
        if overrides and not is_recipe:
            raise UserError(f"{what} is taken for a model, which has no field to override: {', '.join(overrides)}")
        if with_report and is_recipe:
            raise UserError(f"--report is for a model alone: tasft report {what} writes that of a run")
        if dry_run and not is_recipe:
            raise UserError(f"--dry-run needs a recipe, and {what} is taken for a model")
    if dry_run:
        _plan(what, fields, out, ["evaluate"], as_json)
        return
    with _resumable(), _alone(as_json):
        if is_recipe:
            opened = _open(what, fields, out)
            opened.go(("evaluate",))
            folder = opened.folder / "evaluate"
            # Not what an earlier form of the recipe left there.
            wanted = {step.folder for step in opened.steps("evaluate")}
        else:
            folder = _evaluate_model(what, named, judges, data_dir, limit, max_new_tokens, prompt, out)
    if os.environ.get("RANK", "0") != "0":
        return
    from tasft.evaluate.results import summaries, table

    rows = summaries(folder, wanted)
    page = _report_of_model(folder) if with_report else None
    if as_json:
        _print_json({"folder": str(folder), "results": rows, **({"report": str(page)} if page else {})})
    else:
        _table(table(rows))
        print(f"report: {page}" if page else f"all of it: {folder}")


def _report_of_model(folder: Path) -> Path:
    from tasft.core import provenance
    from tasft.report import write_model_report

    with provenance.private():
        return write_model_report(folder)


def _evaluate_model(
    name: str,
    sets: Sequence[str],
    judges: Sequence[str],
    data_dir: Path | None,
    limit: int | None,
    max_new_tokens: int | None,
    prompt: Literal["chat", "alpaca"] | None,
    out: Path | None,
) -> Path:
    from tasft.evaluate.alone import Alone, asked_of
    from tasft.judges import load_judge

    folder = out or Path("runs") / f"evaluate-{Path(name).name}"
    asked, notes = asked_of(sets, str(data_dir) if data_dir else None, limit)
    for note in notes if os.environ.get("RANK", "0") == "0" else ():
        print(f"note: {note}", flush=True)
    by = [load_judge(judge) for judge in judges or ("embedded", "refusal_matching")]
    Alone(name, prompt or "chat").evaluate(asked, by, max_new_tokens or 64, folder)
    return folder


@app.command()
def compare(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more: a run, its final model; a state such as RUN/evaluate/base; or --out of evaluate."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the page goes; default runs/compare-NAMES.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare evaluated models with the first on the prompts that both answered, and write one page for all.

    Paired differences, and McNemar's test; replies stand side by side on the page.

    Example: tasft compare runs/mine/evaluate/base runs/mine
    """
    from tasft.cli import compare as comparing
    from tasft.evaluate import results

    with _alone(as_json):
        found = comparing.compare(models, out)
    if as_json:
        _print_json(found)
        return
    for note in found["notes"]:
        print(f"note: {visible(note)}")
    first, *others = found["models"]
    for model in others:
        print(f"{visible(first)} first, {visible(model)} second:")
        _table(results.comparison({"rows": [row for row in found["rows"] if row["model"] == model]}))
    print(f"report: {found['report']}")


@app.command()
def view(
    folder: Annotated[Path, typer.Argument(help="A folder with runs, sweeps or evaluations below it.")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", min=0, help="Default: a free one.", show_default=False)] = 0,
) -> None:
    """Serve the reports under a folder to this machine, with a list of them: gate, rates, date.

    Example: tasft view runs
    """
    from tasft.cli.view import view as serve

    serve(folder, port)


@app.command()
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

        with _alone(as_json):
            page = write_sweep_report(Path(recipe))
            print(f"report: {page}")
        if as_json:
            _print_json({"folder": recipe, "report": str(page)})
        return
    _go(recipe, overrides, out, ["report"], as_json)


@app.command()
def check(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Name every fault of a recipe, or of all in a sweep file, and of the data, before a weight is loaded.

    Example: tasft check recipe.yaml train.penalty=nlcl
    """
    from tasft.run import recipe_file
    from tasft.run.checks import check_inputs
    from tasft.run.inputs import Inputs

    with _alone(as_json):
        if recipe_file.is_sweep(recipe):
            if overrides:
                raise UserError(f"{recipe} is a sweep file: it takes no fields")
            found, cells, notes = _checked_sweep(recipe)
            name, said = found.name, {"cells": [cell.name for cell in cells]}
        else:
            spec = recipe_file.load(recipe, overrides or ())
            inputs = Inputs(spec)
            check_inputs(inputs)
            name, said, notes = spec.name, {}, inputs.warnings()
            for note in notes:
                print(f"note: {note}")
            print(f"{name}: no fault found")
    if as_json:
        _print_json({"name": name, **said, "notes": notes, "faults": []})


def _checked_sweep(file: str) -> "tuple[Sweep, list[SweepCell], list[str]]":
    from tasft.run import sweep as sweeps

    found, cells = sweeps.load(file)
    notes = sweeps.check_cells(cells)
    for note in notes:
        print(f"note: {note}")
    print(f"{found.name}: {len(cells)} cells, no fault found", flush=True)
    return found, cells, notes


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep file, or a shipped name such as sweep-penalty-weight.")],
    out: Annotated[Path | None, typer.Option("--out", help="Default runs/<name>.", show_default=False)] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Run the cells on a Ray cluster, such as auto."),
    ] = None,
    gpus_per_task: Annotated[
        float | None, typer.Option("--gpus-per-task", min=0, help="With --ray: GPUs of a cell, default 0.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check all, list the cells, and say about how long they take.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a grid of recipes; run it again to go on, and to try again what failed.

    Exit code 0: all cells are done; 2: you can put right what failed; 1: a cell failed otherwise; 3: all are done,
    and none meets the gate of its recipe.

    Example: tasft sweep sweep.yaml --out runs/sweep
    """
    if gpus_per_task is not None and ray is None:
        raise UserError("--gpus-per-task goes with --ray")
    with _alone(as_json):
        found, cells, _ = _checked_sweep(file)
        folder = out or Path("runs") / found.name
        if dry_run:
            result = {"name": found.name, "cells": [{"name": cell.name, "fields": cell.fields} for cell in cells]}
            result |= _sweep_plan(cells, folder)
            failed, gates = [], []
        else:
            from tasft.core import provenance
            from tasft.run import sweep as sweeps

            with _resumable():
                outcomes = sweeps.go(found, cells, folder, ray, gpus_per_task or 0.0)
            failed = [outcome for outcome in outcomes if outcome.reason]
            gates = [outcome.gate for outcome in outcomes if outcome.gate is not None]
            result = {"folder": str(folder), **provenance.read_json(folder / "sweep.json")}
    if as_json:
        _print_json(result)
    if failed:
        print(f"tasft: {len(failed)} of {len(cells)} cells failed; run it again to try these again", file=sys.stderr)
        raise typer.Exit(1 if any(outcome.is_ours for outcome in failed) else 2)
    if not dry_run and gates and not any(gates):
        print(f"tasft: gate not met: none of {len(gates)} cells meets its gate", file=sys.stderr)
        raise typer.Exit(3)


def _sweep_plan(cells: "Sequence[SweepCell]", folder: Path) -> dict[str, Any]:
    from tasft.run import estimate
    from tasft.run import sweep as sweeps
    from tasft.run.pipeline import Pipeline

    for cell in cells:
        print(cell.name)
    waiting = sweeps.left(cells, folder)
    groups = sweeps.together(waiting)
    plan = estimate.plan_sweep([[Pipeline(cell.spec, folder / cell.folder) for cell in group] for group in groups])
    print(f"{len(cells) - len(waiting)} of {len(cells)} cells are done")
    for group, found in zip(groups, plan["groups"], strict=True):
        others = f", and {len(group) - 1} more that share what comes before its training" if len(group) > 1 else ""
        print(f"\n{group[0].name}{others}:")
        _table(estimate.table(found))
    if groups:
        if plan["seconds"] is not None:
            print(f"all, one after the other: about {estimate.spoken(plan['seconds'])}")
        if plan["memory_gib"] is not None:
            print(f"memory of training: about {plan['memory_gib']} GiB")
        print(next((found["not_estimated"] for found in plan["groups"] if "not_estimated" in found), estimate.RULE))
    return plan


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder whose final model was evaluated.")],
    folder: Annotated[Path, typer.Argument(help="Where the model goes: a folder that is not there or empty.")],
    push: Annotated[
        str | None, typer.Option("--push", metavar="NAME", help="Upload it to the hub too, after a question.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --push: do not ask.")] = False,
    ungated: Annotated[
        bool, typer.Option("--ungated", help="Also a model that does not meet the gate of its recipe.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the final model of a run as one that needs no adapter, with tokenizer and model card.

    Its logits are compared with those of the run's own model. --push makes a private repository if there is none, and
    uploads the files of the export alone.

    Example: tasft export runs/demo models/demo
    """
    from dataclasses import asdict

    address = None
    with _alone(as_json):
        if push and not (yes or sys.stdin.isatty()):
            raise UserError("--push asks first, and here is nobody to ask: say --yes")
        from tasft.run import export as exports

        if push:
            exports.check_push(push)
        done = exports.export(run, folder, push, ungated)
        for note in done.notes:
            print(note)
        print(f"model: {done.folder} ({sum(done.files.values()) / 1e6:,.0f} MB: {', '.join(done.files)})")
        if push and (yes or typer.confirm(f"Upload these {len(done.files)} files to {push} on the hub?")):
            address = exports.push(done, push)
            print(f"on the hub: {address}")
    if as_json:
        _print_json(asdict(done) | {"folder": str(done.folder), "hub": address})


@app.command()
def chat(
    base: Annotated[str, typer.Argument(help="A run; a state such as RUN/evaluate/base; or a model: name, folder.")],
    tuned: Annotated[
        str | None, typer.Argument(help="Likewise. Without it: base and final model of a run.", show_default=False)
    ] = None,
    judge: Annotated[str, typer.Option("--judge", help="Who judges, by commas.")] = "embedded",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.0,
    prompt: Annotated[Literal["chat", "alpaca"], typer.Option("--prompt", help="How a model alone is asked.")] = "chat",
) -> None:
    """Talk to two models at once; each reply has its verdict below it. Nothing that is said is kept.

    Example: tasft chat runs/demo
    """
    from tasft.cli import chat as chats
    from tasft.judges import load_judge
    from tasft.models.engine import Sampling

    judges = [load_judge(name) for name in judge.split(",") if name]
    if not judges:
        raise UserError("--judge: name at least one")
    sides = chats.sides_of(base, tuned, prompt)
    print("loading ...", flush=True)
    chats.talk_in_terminal(chats.Talk(sides, judges, Sampling(max_new_tokens, temperature)))


@app.command("judge")
def judge_file(
    file: Annotated[Path, typer.Argument(help="Pairs: JSONL, a JSON list or CSV, each also as .gz.")],
    judge: Annotated[str | None, typer.Option("--judge", help="Who judges, such as refusal_matching.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The judge's model: a hub name or folder.")] = None,
    server: Annotated[list[str] | None, typer.Option("--server", help="Address of a server that runs it.")] = None,
    server_model: Annotated[str | None, typer.Option("--server-model", help="What the server calls it.")] = None,
    rubric: Annotated[str | None, typer.Option("--rubric", help="For llm_judge: a name or a text file.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Two judges, or files of their verdicts, instead of --judge."),
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Column of human labels to compare with.")] = None,
    label_of: Annotated[Literal["harm", "refusal"], typer.Option("--label-of", help="What they are about.")] = "harm",
    prompt_column: Annotated[str, typer.Option("--prompt-column", help="What was asked.")] = "prompt",
    reply_column: Annotated[str, typer.Option("--reply-column", help="What was answered.")] = "completion",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Verdicts; default FILE.JUDGE.jsonl. Run again to go on.", show_default=False),
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print the texts of so many worst differences.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Score a file of prompts and replies with a judge, and the judge by human labels or by another one.

    Example: tasft judge replies.csv --judge classifier --labels harmful
    """
    one_judge = {"--model": model, "--server": server, "--rubric": rubric, "--labels": labels, "--out": out}
    faults = []
    if (judge is None) == (compare is None):
        faults.append("say either --judge NAME or --compare A B")
    if compare and (needless := [option for option, value in one_judge.items() if value]):
        faults.append(f"{', '.join(needless)}: not for --compare, which takes judges with their usual settings")
    if show and not (labels or compare):
        faults.append("--show: there are differences to show only with --labels or --compare")
    if bool(server) != bool(server_model):
        faults.append("--server and --server-model go together")
    from pydantic import ValidationError

    from tasft.evaluate import judge_quality
    from tasft.judges import JudgeSettings

    def read() -> judge_quality.Pairs:
        return judge_quality.read_pairs(file, prompt_column, reply_column, labels, label_of)

    with _resumable(), _alone(as_json):
        if faults:
            raise UserError(faults)
        if judge is None:
            assert compare is not None
            result = judge_quality.compare(file, read, compare, show)
        else:
            asked = {"model": model, "rubric": rubric, "server": server and {"urls": server, "model": server_model}}
            try:
                settings = JudgeSettings.model_validate(
                    {"kind": judge, **{key: value for key, value in asked.items() if value}}
                )
            except ValidationError as error:
                raise UserError(
                    [f"--server: {fault['msg'].removeprefix('Value error, ')}" for fault in error.errors()]
                ) from None
            result = judge_quality.score(file, read, settings, label_of, out, show)
    if as_json:
        _print_json(result)
    else:
        print(judge_quality.rendered(result))


def _asks(yes: bool) -> bool:
    return not yes and sys.stdin.isatty()


@app.command()
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


@app.command()
def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also ask the model hub, for 5 seconds at most.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can do: Python, torch, GPU, extras, models, memory, disk, hub.

    Exit code 2: something that tasft needs is missing.

    Example: tasft doctor --hub
    """
    from tasft.cli import doctor as doctors

    with _alone(as_json):
        found = doctors.examine(hub)
    if as_json:
        _print_json(found)
    else:
        _table(doctors.table(found))
    if found["faults"]:
        raise UserError(found["faults"])


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
        fault = _fault(error)
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
