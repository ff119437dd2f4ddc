"""Commands for models that are there: evaluate them, compare them, talk to them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from tasft.cli.common import (
    DataParallelOption,
    DryRunOption,
    JsonOption,
    OutOption,
    OverridesArgument,
    ProcessesOption,
    again,
    alone,
    print_json,
    print_table,
    resumable,
)
from tasft.cli.runs import print_plan
from tasft.core.errors import UserError
from tasft.core.text import visible
from tasft.run.doors import evaluated, opened_run


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
    base: Annotated[
        str | None, typer.Option("--base", help="The model that an adapter is for, if not the one that it names.")
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
    named, judges = (
        [name for joined in option or () for name in joined.split(",") if name] for option in (sets, judge)
    )
    if launch is not None and not dry_run:
        options = {
            "--out": out,
            "--sets": ",".join(named),
            "--judge": ",".join(judges),
            "--data-dir": data_dir,
            "--limit": limit,
            "--max-new-tokens": max_new_tokens,
            "--prompt": prompt,
            "--base": base,
        }
        given = [str(word) for option, value in options.items() if value for word in (option, value)]
        given += ["--json"] * as_json + ["--report"] * with_report
        again(["evaluate", *given, "--", what, *(overrides or ())], launch, processes)
    asked = {
        "evaluate.sets": named,
        "evaluate.judges": judges,
        "data.data_dir": data_dir and str(data_dir),
        "evaluate.limit": limit,
        "evaluate.max_new_tokens": max_new_tokens,
    }
    fields = [*(overrides or ()), *(f"{key}={json.dumps(value)}" for key, value in asked.items() if value)]
    with alone(as_json):
        is_recipe = _is_recipe(what, overrides, prompt, base, with_report, dry_run)
    if dry_run:
        print_plan(what, fields, out, ["evaluate"], as_json)
        return
    with resumable(), alone(as_json):
        if is_recipe:
            opened = opened_run(what, out, fields)
            opened.go(("evaluate",))
            # Not what an earlier form of the recipe left there.
            folder, wanted = opened.folder / "evaluate", {step.folder for step in opened.steps("evaluate")}
        else:
            folder = evaluated(what, named, judges, out, data_dir, limit, max_new_tokens or 64, prompt or "chat", base)
            wanted = None
    if os.environ.get("RANK", "0") == "0":
        _print_rates(folder, wanted, with_report, as_json)


def _is_recipe(
    what: str, overrides: Sequence[str] | None, prompt: str | None, base: str | None, with_report: bool, dry_run: bool
) -> bool:
    """Whether a recipe is meant, or a model alone, for which other options are.

    Raises:
        UserError: An option is for the other of the two.
    """
    from tasft.run import recipe_file

    is_recipe = recipe_file.is_recipe(what)
    if is_recipe and base is not None:
        raise UserError("--base is for an adapter alone: a recipe names its model by model.base")
    if is_recipe and prompt is not None:
        raise UserError("--prompt is for a model alone: override model.prompt, which trains it so, too")
    if is_recipe and with_report:
        raise UserError(f"--report is for a model alone: tasft report {what} writes that of a run")
    if overrides and not is_recipe:
        raise UserError(f"{what} is taken for a model, which has no field to override: {', '.join(overrides)}")
    if dry_run and not is_recipe:
        raise UserError(f"--dry-run needs a recipe, and {what} is taken for a model")
    return is_recipe


def _print_rates(folder: Path, wanted: set[Path] | None, with_report: bool, as_json: bool) -> None:
    from tasft.core import provenance
    from tasft.evaluate.results import summaries, table
    from tasft.report import write_model_report

    rows, page = summaries(folder, wanted), None
    if with_report:
        with provenance.private():
            page = write_model_report(folder)
    if as_json:
        print_json({"folder": str(folder), "results": rows, **({"report": str(page)} if page else {})})
    else:
        print_table(table(rows))
        print(f"report: {page}" if page else f"all of it: {folder}")


def compare(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more: a run, its final model; a state such as RUN/evaluate/base; --out of evaluate; or a log "
            "of Inspect, lm-eval, garak, promptfoo, PyRIT or an OpenAI batch."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the page goes; default runs/compare-NAMES.", show_default=False)
    ] = None,
    judge: Annotated[str, typer.Option("--judge", help="Who judges logs, by commas.")] = "classifier,refusal_matching",
    as_json: JsonOption = False,
) -> None:
    """Compare evaluated models with the first on the prompts that both answered, and write one page for all.

    Paired differences, and McNemar's test; replies stand side by side on the page.

    Example: tasft compare runs/mine/evaluate/base runs/mine
    """
    from tasft.cli import compare as comparing
    from tasft.evaluate import results

    with alone(as_json):
        result = comparing.compare(comparing.judged(models, [name for name in judge.split(",") if name]), out)
    if as_json:
        print_json(result)
        return
    for note in result["notes"]:
        print(f"note: {visible(note)}")
    first, *others = result["models"]
    for model in others:
        print(f"{visible(first)} first, {visible(model)} second:")
        print_table(results.comparison({"rows": [row for row in result["rows"] if row["model"] == model]}))
    print(f"report: {result['report']}")


def logs(
    folder: Annotated[Path, typer.Argument(help="A run that was evaluated, or --out of evaluate.")],
    out: Annotated[Path, typer.Argument(help="Where the logs go: a folder that is not there or empty.")],
    form: Annotated[str, typer.Option("--form", help="inspect or lm-eval.")] = "inspect",
    replies: Annotated[
        bool, typer.Option("--replies", help="Prompts, replies and single verdicts too; else figures alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an evaluation as logs of another tool: Inspect's .eval, or the result files of lm-eval.

    Example: tasft logs runs/demo logs --form inspect
    """
    from tasft.evaluate.logs_out import write_logs

    with alone(as_json):
        files = write_logs(folder, out, form, replies)
    if as_json:
        print_json({"files": [str(file) for file in files]})
        return
    print("\n".join(visible(str(file)) for file in files))
    if not replies:
        print("figures alone: --replies adds prompts, replies and single verdicts")


def chat(
    base: Annotated[str, typer.Argument(help="A run; a state such as RUN/evaluate/base; or a model: name, folder.")],
    tuned: Annotated[
        str | None, typer.Argument(help="Likewise. Without it: base and final model of a run.", show_default=False)
    ] = None,
    judge: Annotated[str, typer.Option("--judge", help="Who judges, by commas.")] = "classifier",
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
