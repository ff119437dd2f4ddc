"""Commands for recipe files and grids of them: check, sweep."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tasft.cli.common import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    alone,
    print_json,
    print_table,
    resumable,
)
from tasft.core.errors import UserError

if TYPE_CHECKING:
    from tasft.run.sweep import Sweep, SweepCell


def check(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Name every fault of a recipe, or of all in a sweep file, and of the data, before a weight is loaded.

    Example: tasft check recipe.yaml train.penalty=nlcl
    """
    from tasft.run import recipe_file
    from tasft.run.checks import check_inputs
    from tasft.run.inputs import Inputs

    with alone(as_json):
        if recipe_file.is_sweep(recipe):
            if overrides:
                raise UserError(f"{recipe} is a sweep file: it takes no fields")
            grid, cells, notes = _checked_sweep(recipe)
            name, listed = grid.name, {"cells": [cell.name for cell in cells]}
        else:
            spec = recipe_file.load(recipe, overrides or ())
            inputs = Inputs(spec)
            check_inputs(inputs)
            name, listed, notes = spec.name, {}, inputs.warnings()
            for note in notes:
                print(f"note: {note}")
            print(f"{name}: no fault found")
    if as_json:
        print_json({"name": name, **listed, "notes": notes, "faults": []})


def _checked_sweep(file: str) -> "tuple[Sweep, list[SweepCell], list[str]]":
    from tasft.run import sweep as sweeps

    grid, cells = sweeps.load(file)
    notes = sweeps.check_cells(cells)
    for note in notes:
        print(f"note: {note}")
    print(f"{grid.name}: {len(cells)} cells, no fault found", flush=True)
    return grid, cells, notes


def sweep(
    file: Annotated[str, typer.Argument(help="A sweep file, or a shipped name such as sweep-penalty-weight.")],
    out: Annotated[Path | None, typer.Option("--out", help="Default runs/<name>.", show_default=False)] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Run cells side by side by Ray: local, or a cluster, such as auto."
        ),
    ] = None,
    gpus_per_task: Annotated[
        float | None,
        typer.Option("--gpus-per-task", min=0, help="With --ray: GPUs of a cell; default 1 if there are any."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check all, list the cells, and say what there is to do.")
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
    with alone(as_json):
        grid, cells, _ = _checked_sweep(file)
        folder = out or Path("runs") / grid.name
        if dry_run:
            result = {"name": grid.name, "cells": [{"name": cell.name, "fields": cell.fields} for cell in cells]}
            result |= _sweep_plan(cells, folder)
            failed, gates = [], []
        else:
            from tasft.core import provenance
            from tasft.run import sweep as sweeps

            with resumable():
                outcomes = sweeps.go(grid, cells, folder, ray, gpus_per_task)
            failed = [outcome for outcome in outcomes if outcome.reason]
            gates = [outcome.gate for outcome in outcomes if outcome.gate is not None]
            result = {"folder": str(folder), **provenance.read_json(folder / "sweep.json")}
    if as_json:
        print_json(result)
    if failed:
        print(f"tasft: {len(failed)} of {len(cells)} cells failed; run it again to try these again", file=sys.stderr)
        raise typer.Exit(1 if any(outcome.is_ours for outcome in failed) else 2)
    if not dry_run and gates and not any(gates):
        print(f"tasft: gate not met: none of {len(gates)} cells meets its gate", file=sys.stderr)
        raise typer.Exit(3)


def _sweep_plan(cells: "Sequence[SweepCell]", folder: Path) -> dict[str, Any]:
    from tasft.run import plan
    from tasft.run import sweep as sweeps
    from tasft.run.pipeline import Pipeline

    for cell in cells:
        print(cell.name)
    waiting = sweeps.left(cells, folder)
    print(f"{len(cells) - len(waiting)} of {len(cells)} cells are done")
    groups = []
    for group in sweeps.together(waiting):
        first = plan.plan(Pipeline(group[0].spec, folder / group[0].folder))
        groups.append(first | {"cells": len(group)})
        others = f", and {len(group) - 1} more that share what comes before its training" if len(group) > 1 else ""
        print(f"\n{group[0].name}{others}:")
        print_table(plan.table(first))
    return {"groups": groups}
