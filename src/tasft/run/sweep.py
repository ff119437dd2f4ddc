"""A grid of runs that share what they have in common, on this machine or as tasks of a Ray cluster."""

import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.core.progress import plain_without_terminal, without_needless_warnings
from tasft.core.redact import redacted
from tasft.core.settings import Name
from tasft.models.precision import RECORD, remembered
from tasft.report import write_sweep_report
from tasft.run import precision, recipe_file
from tasft.run.checks import check_inputs
from tasft.run.inputs import Inputs
from tasft.run.pipeline import Pipeline
from tasft.run.recipe import Recipe
from tasft.run.stages import STAGES

MAX_CELLS = 10_000
RETRIES = 5  # Nodes that may die under one cell.
LONGEST_NAME = 100

Fields = dict[str, Any]


class Sweep(BaseModel):
    """What a sweep file holds: a cell is one entry of `pairs`, one value of each field in `grid`, and one seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[Name, Field(max_length=80)] = Field(description="Name of the sweep and its folder.")
    base: str = Field(description="The recipe that is varied: a file beside this one, or a shipped name.")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="Values of recipe fields; all combinations are run."
    )
    pairs: list[Annotated[Fields, Field(min_length=1)]] = Field(
        [], description="Fields that change together; each entry is combined with the grid."
    )
    seeds: list[int] = Field([], description="Values of the recipe's seed.")

    def combinations(self) -> list[Fields]:
        """The fields of each cell, in the order of the file."""
        axes: list[list[Fields]] = [self.pairs] if self.pairs else []
        axes += [[{field: value} for value in values] for field, values in self.grid.items()]
        axes += [[{"seed": seed} for seed in self.seeds]] if self.seeds else []
        return [{field: value for part in parts for field, value in part.items()} for parts in itertools.product(*axes)]

    def faults(self) -> list[str]:
        """What is wrong between the fields of the file."""
        paired = {field for pair in self.pairs for field in pair}
        varied = [*paired, *self.grid, *(["seed"] if self.seeds else [])]
        faults = [f"{field}: varied twice" for field in sorted({f for f in varied if varied.count(f) > 1})]
        if not varied:
            faults.append("nothing is varied: give grid, pairs or seeds")
        if "name" in varied:
            faults.append("name: the cells of a sweep are named by what is varied")
        cells = math.prod([len(self.pairs) or 1, len(self.seeds) or 1, *map(len, self.grid.values())])
        if cells > MAX_CELLS:
            faults.append(f"{cells:,} cells are more than {MAX_CELLS:,}: vary less at a time")
        return faults


@dataclass(frozen=True)
class SweepCell:
    """One run of a sweep.

    Attributes:
        name: Of its folder, made of its fields.
        fields: What makes it differ from the base recipe.
        spec: Its recipe.
    """

    name: str
    fields: Fields
    spec: Recipe

    @property
    def folder(self) -> Path:
        """The run folder, within that of the sweep."""
        return Path("cells") / self.name


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        reason: Why it failed, on one line; None if it is done.
        is_ours: Whether no change of recipe or data would help: a fault of tasft, or a process that was killed.
        seconds: What it took, without what was done before.
        gate: Whether its gate is met; None without one, and where it failed.
    """

    reason: str | None = None
    is_ours: bool = False
    seconds: float = 0.0
    gate: bool | None = None


def load(source: str) -> tuple[Sweep, list[SweepCell]]:
    """Read a sweep file, or a shipped one by its name, and the recipe of every cell.

    Raises:
        UserError: Names every fault of the file, and of each cell's recipe.
    """
    path = recipe_file.find(source)
    try:
        sweep = Sweep.model_validate(recipe_file.read(path))
    except ValidationError as error:
        raise UserError(recipe_file.sentences(path, error)) from None
    if faults := sweep.faults():
        raise UserError([f"{path}: {fault}" for fault in faults])
    beside = path.parent / sweep.base
    base = str(beside) if os.path.exists(beside) else sweep.base
    combinations = sweep.combinations()
    short = _short([field for fields in combinations for field in fields])
    cells: list[SweepCell] = []
    cells_of: dict[str, list[str]] = {}  # Of each fault.
    for fields in combinations:
        name = _name(fields, short)
        if any(cell.name == name for cell in cells):
            cells_of[f"{path}: the cell {name} is there twice"] = []
            continue
        title = re.sub(r"[^A-Za-z0-9._-]", "-", f"{sweep.name}.{name}")
        overrides = [f"{field}={json.dumps(value, default=str)}" for field, value in {**fields, "name": title}.items()]
        try:
            cells.append(SweepCell(name, fields, recipe_file.load(base, overrides)))
        except UserError as error:
            _add(cells_of, error, name)
    _stop(cells_of)
    return sweep, cells


def _add(cells_of: dict[str, list[str]], error: UserError, cell: str) -> None:
    for fault in error.faults:
        cells_of.setdefault(fault, []).append(cell)


def _stop(cells_of: Mapping[str, Sequence[str]]) -> None:
    """Raise the faults, if there are any; a fault of many cells is said once."""
    if cells_of:
        raise UserError([f"{fault}{_in(cells)}" for fault, cells in cells_of.items()])


def _in(cells: Sequence[str]) -> str:
    if not cells:
        return ""
    return f" (cell {cells[0]}" + (f" and {len(cells) - 1} more)" if len(cells) > 1 else ")")


def _short(fields: Sequence[str]) -> dict[str, str]:
    """Names of fields without their sections, where that is enough to tell them apart."""
    last = {field: field.rpartition(".")[2] for field in dict.fromkeys(fields)}
    names = list(last.values())
    return {field: name if names.count(name) == 1 else field for field, name in last.items()}


def _name(fields: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """The name of a cell's folder: readable, the same every time, and no other cell's."""
    texts = {
        field: value if isinstance(value, str) else json.dumps(value, default=str) for field, value in fields.items()
    }
    whole = ",".join(f"{short[field]}={text}" for field, text in texts.items())
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", whole)[:LONGEST_NAME]
    return safe if safe == whole else f"{safe}-{provenance.content_hash(texts)[:8]}"


def check_cells(cells: Sequence[SweepCell]) -> list[str]:
    """Read what the cells read, as far as they differ in it; what a reader of the results will ask about.

    Raises:
        UserError: Names every fault.
    """
    cells_of: dict[str, list[str]] = {}  # Of each fault.
    warnings: list[str] = []
    # Neither the seed nor the training decides whether something can be read, but for how rows are encoded and for what
    # is named.
    others = {"name", "seed", "sft", "train"}
    encoding = {"method", "max_length", "turns", "overlong", "duplicates", "own_penalty", "report_to"}
    distinct = {
        provenance.content_hash(
            [
                cell.spec.model_dump(exclude=others),
                cell.spec.train.model_dump(include=encoding),
                cell.spec.sft and cell.spec.sft.model_dump(include=encoding),
            ]
        ): cell
        for cell in cells
    }
    for cell in distinct.values():
        inputs = Inputs(cell.spec)
        try:
            check_inputs(inputs)
            warnings += inputs.warnings()
        except UserError as error:
            _add(cells_of, error, cell.name)
    _stop(cells_of)
    return list(dict.fromkeys(warnings))


def go(
    sweep: Sweep, cells: Sequence[SweepCell], folder: Path, ray: str | None = None, gpus: float | None = None
) -> list[CellOutcome]:
    """Run the cells that are not done; one that fails does not keep the others from being run.

    Args:
        sweep: The file.
        cells: Its cells.
        folder: Of the sweep: `cells/` are run folders, `shared/` holds what they have in common, `sweep.json` says how
            each ended.
        ray: Address of a Ray cluster whose nodes see the folder, `local` for one of this machine alone; None runs one
            cell after the other here.
        gpus: GPUs of a cell there, also a part of one; None is 1, and 0 where the cluster has no GPU.

    Returns:
        How each cell ended.

    Raises:
        UserError: The folder holds something else, another process is at work in it, the cluster is not reached, or
            this machine has fewer GPUs than a cell is to have.
    """
    if ray and find_spec("ray") is None:
        raise UserError("--ray needs Ray: pip install '.[ray]'")
    if ray == "local" and gpus and gpus > (there := torch.accelerator.device_count()):
        raise UserError(f"--gpus-per-task {gpus:g}: this machine has {there} GPUs")
    _refuse_other(sweep, folder)
    folder = folder.resolve()
    with provenance.private(), provenance.lock(folder):
        choice = remembered(folder / "sweep.json")
        waiting = left(cells, folder)
        names = {cell.name for cell in waiting}
        ended = {cell.name: CellOutcome() for cell in cells if cell.name not in names}

        def note() -> None:
            state = _state(sweep, cells, ended) | {RECORD: asdict(choice)}
            provenance.write_json(folder / "sweep.json", state)

        note()
        if ended:
            print(f"{len(ended)} of {len(cells)} cells: done before", flush=True)
        run = _in_order(waiting, folder) if ray is None else _on_ray(waiting, folder, ray, gpus)
        for cell, outcome in run:
            ended[cell.name] = outcome
            note()
            end = f"FAILED: {outcome.reason}" if outcome.reason else f"done in {outcome.seconds:.0f} s"
            if _gate(cell, folder, outcome) is False:
                end += ", gate not met"
            print(f"[{len(ended)}/{len(cells)}] {cell.name}: {end}", flush=True)
        if any(outcome.reason is None for outcome in ended.values()):
            print(f"report: {write_sweep_report(folder)}", flush=True)
    return [replace(ended[cell.name], gate=_gate(cell, folder, ended[cell.name])) for cell in cells]


def _gate(cell: SweepCell, folder: Path, outcome: CellOutcome) -> bool | None:
    """Whether a cell that is done meets its gate."""
    if cell.spec.gate is None or outcome.reason:
        return None
    return bool((provenance.read_json(folder / cell.folder / "report" / "gate.json") or {}).get("met"))


def _refuse_other(sweep: Sweep, folder: Path) -> None:
    state = provenance.read_json(folder / "sweep.json")
    if state and state.get("name") != sweep.name:
        raise UserError(
            f"{folder} holds the sweep {state.get('name')!r}, not {sweep.name!r}: choose another with --out"
        )
    if state is None and folder.exists() and (not folder.is_dir() or any(p.name[0] != "." for p in folder.iterdir())):
        raise UserError(f"{folder} is there and is not the folder of a sweep: choose another with --out")


def _state(sweep: Sweep, cells: Sequence[SweepCell], ended: Mapping[str, CellOutcome]) -> dict[str, Any]:
    def row(cell: SweepCell) -> dict[str, Any]:
        entry: dict[str, Any] = {"fields": cell.fields, "folder": str(cell.folder), "state": "waiting"}
        if outcome := ended.get(cell.name):
            entry |= {"state": "failed", "reason": outcome.reason} if outcome.reason else {"state": "done"}
        return entry

    # As JSON knows it: a date of YAML is text there.
    rows = json.loads(json.dumps([row(cell) for cell in cells], default=str))
    return {"name": sweep.name, "base": sweep.base, "cells": rows}


def _is_done(cell: SweepCell, folder: Path) -> bool:
    run = folder / cell.folder
    try:
        return (run / "report" / "done.json").is_file() and Pipeline(cell.spec, run).is_done
    except (UserError, OSError):  # The cell itself will say so.
        return False


def _work(spec: Recipe, folder: Path, here: Path, untrained: bool = False) -> CellOutcome:
    """One cell, in a process of its own.

    Args:
        spec: Its recipe.
        folder: Its run folder, in `cells/` of the sweep.
        here: Where the recipe's relative paths begin.
        untrained: Only what other cells may share.
    """
    os.chdir(here)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plain_without_terminal()
    without_needless_warnings()
    started = time.monotonic()
    try:
        stages = ("sft", "harvest", "evaluate") if untrained else tuple(STAGES)
        Pipeline(spec, folder, folder.parents[1] / "shared").go(stages, untrained=untrained)
    except UserError as error:
        return CellOutcome("; ".join(error.faults))
    except Exception as error:
        print(redacted(traceback.format_exc()), file=sys.stderr)
        return CellOutcome(_line(f"{type(error).__name__}: {error}"), is_ours=True)
    return CellOutcome(seconds=time.monotonic() - started)


def _line(text: str) -> str:
    return " ".join(redacted(text).split())[:500]


def _child(answer: Connection, *arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):  # The sweep says so.
        answer.send(_work(*arguments))


def _end_with_parent() -> None:
    """Whoever kills the sweep ends its cell too: the next sweep must find the folder free."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _in_order(cells: Sequence[SweepCell], folder: Path) -> Iterator[tuple[SweepCell, CellOutcome]]:
    """One after the other, each in a process of its own: what ends that does not end the sweep."""
    context = multiprocessing.get_context("spawn")
    for cell in cells:
        print(f"{cell.name}:", flush=True)
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(its, cell.spec, folder / cell.folder, Path.cwd()))
        process.start()
        its.close()
        try:
            outcome: CellOutcome | None = mine.recv()
        except EOFError:
            outcome = None
        except BaseException:
            process.terminate()
            raise
        process.join()
        yield cell, outcome or CellOutcome(_ending(process.exitcode), is_ours=True)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by signal {-code}" + (", as when memory runs out" if code == -9 else "")
    return f"its process ended with exit code {code}"


def _on_ray(
    cells: Sequence[SweepCell], folder: Path, address: str, gpus: float | None
) -> Iterator[tuple[SweepCell, CellOutcome]]:
    """As tasks of a cluster, those that draw what others share first; as they end."""
    import ray

    try:
        ray.init(address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster is reached there ({_line(str(error))})") from None
    wanted = min(1.0, ray.cluster_resources().get("GPU", 0.0)) if gpus is None else gpus
    # A process for each task, so that no memory is held for the next. Ray starts one again when its node dies.
    task = ray.remote(max_calls=1, max_retries=RETRIES, num_gpus=wanted, scheduling_strategy="SPREAD")(_work)

    def outcomes(cells: Sequence[SweepCell], untrained: bool) -> Iterator[tuple[SweepCell, CellOutcome]]:
        running = {task.remote(cell.spec, folder / cell.folder, Path.cwd(), untrained): cell for cell in cells}
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            try:
                outcome = ray.get(ready)
            except ray.exceptions.RayError as error:
                outcome = CellOutcome(_line(str(error)), is_ours=True)
            yield running.pop(ready), outcome

    try:
        leaders = [group[0] for group in together(cells)]
        for number, (cell, outcome) in enumerate(outcomes(leaders, untrained=True), 1):
            # One that failed fails again as a cell, and is counted then.
            print(f"[shared {number}/{len(leaders)}] {cell.name}: {outcome.reason or 'done'}", flush=True)
        yield from outcomes(cells, untrained=False)
    finally:
        ray.shutdown()


def left(cells: Sequence[SweepCell], folder: Path) -> list[SweepCell]:
    """Cells of a sweep in a folder that are not done; what they leave to the machine is decided once for all."""
    choice = remembered(folder / "sweep.json")
    settled = [replace(cell, spec=precision.settled(cell.spec, choice)) for cell in cells]
    return [cell for cell in settled if not _is_done(cell, folder)]


def together(cells: Sequence[SweepCell]) -> list[list[SweepCell]]:
    """Cells that share what comes before training; first the one that draws most, which keeps no other waiting."""
    groups: dict[str, list[SweepCell]] = {}
    for cell in sorted(cells, key=_rows, reverse=True):
        shared = {"seed", "model", "data", "sft"}
        harvest = cell.spec.harvest and cell.spec.harvest.model_dump(exclude={"rows"})
        key = [cell.spec.model_dump(include=shared), harvest if cell.spec.harvests else None]
        groups.setdefault(provenance.content_hash(key), []).append(cell)
    return list(groups.values())


def _rows(cell: SweepCell) -> int:
    return cell.spec.harvest.rows if cell.spec.harvest else 0
