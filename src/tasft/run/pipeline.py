"""A recipe at work in a folder: what is done, what is stale, what is redone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from tasft.core import provenance, ranks
from tasft.core.errors import UserError
from tasft.core.step import Step
from tasft.data.encode import encode_rows
from tasft.data.preview import preview
from tasft.models.precision import RECORD, remembered
from tasft.run import precision, recipe_file, training
from tasft.run.checks import check_inputs
from tasft.run.context import Context
from tasft.run.inputs import Inputs
from tasft.run.recipe import Recipe
from tasft.run.stages import STAGES, sft, train


class Pipeline:
    """A recipe at work in a folder.

    Args:
        spec: The recipe.
        folder: Made if it is not there.
        store: Where the runs of a sweep share their steps; None for a run that stands alone.

    Raises:
        UserError: The folder holds a run of another name, or something else.
    """

    def __init__(self, spec: Recipe, folder: Path, store: Path | None = None) -> None:
        if (folder / "recipe.yaml").is_file():
            other = recipe_file.load(str(folder)).name
            if other != spec.name:
                raise UserError(
                    f"{folder} holds the run {other!r}, not {spec.name!r}: choose another folder with --out"
                )
        elif folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise UserError(f"{folder} is there and is not a run folder: choose another with --out")
        provenance.refuse_links(folder)
        self.precision = None if precision.is_settled(spec) else remembered(folder / "manifest.json")
        self.spec = precision.settled(spec, self.precision) if self.precision else spec
        self.folder = folder
        self.store = store
        self.context = Context(self.spec, folder, is_quiet=store is not None)

    @property
    def inputs(self) -> Inputs:
        """What the recipe reads besides weights."""
        return self.context.inputs

    def steps(self, stage: str) -> Iterator[Step]:
        """The steps of one stage; later ones may read what earlier ones wrote."""
        return STAGES[stage](self.context)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return all(step.is_done for stage in STAGES for step in self.steps(stage))

    def go(self, stages: Sequence[str] = tuple(STAGES), *, untrained: bool = False) -> None:
        """Run stages in order, each only as far as it is not done.

        Args:
            stages: Which.
            untrained: Leave out what needs the result of `train`.

        Raises:
            UserError: A fault of recipe or data, found before anything is written; or another process
                is at work in the folder.
        """
        check_inputs(self.inputs)
        self._require_what_comes_before(stages[0])
        if ranks.sharding() and not {"sft", "train"}.issuperset(stages):
            raise UserError(
                "only sft and train can share one model between processes: use --launch ddp for other stages"
            )
        if ranks.world_size() > 1 and "report" in stages:
            raise UserError("the report is written by one process: start that stage alone")
        # The process that was at work in a cell of a sweep may be on its way out.
        wait = self.store is not None
        with (
            provenance.writing(self.folder),
            ranks.joined(),
            provenance.private(),
            provenance.lock(self.folder, wait) if ranks.is_first() else nullcontext(),
        ):
            self._go(stages, untrained)

    def _go(self, stages: Sequence[str], untrained: bool) -> None:
        manifest_path = self.folder / "manifest.json"
        manifest = provenance.read_json(manifest_path) or {"started": datetime.now(UTC).isoformat(), "stages": {}}
        manifest |= self._described()
        in_sweep = self.store is not None

        def note(step: str, seconds: float) -> None:
            manifest["stages"][step] = {"seconds": round(seconds, 1)}
            if ranks.is_first():
                provenance.write_json(manifest_path, manifest)

        if ranks.is_first():
            provenance.atomic_write_text(self.folder / "recipe.yaml", recipe_file.dump(self.spec))
            provenance.write_json(manifest_path, manifest)
            # A sweep has said them once, of all its cells.
            for warning in () if in_sweep else self.inputs.warnings():
                print(f"note: {warning}", flush=True)
        for stage in stages:
            how = self._stage(stage, untrained, note)
            if how and ranks.is_first() and not (in_sweep and stage == "report"):
                print(f"{stage}: {how}", flush=True)
        if "report" in stages and not in_sweep:
            print(f"report: {self.folder / 'report' / 'index.html'}", flush=True)

    def _stage(self, stage: str, untrained: bool, note: Callable[[str, float], None]) -> str:
        """Do what is left of a stage; how it went, in words, empty for a stage without steps.

        Args:
            stage: Which.
            untrained: As in `go`.
            note: Told each step that was done here, with its seconds.
        """
        taken: list[float] = []
        before = shared = 0
        for step in self.steps(stage):
            where = step.folder.relative_to(self.folder)
            if untrained and where.parts[0] == "evaluate" and where.parts[1] not in ("base", "sft"):
                continue
            if step.is_done:
                before += 1
                continue
            seconds = step.share(self.store, where) if self.store and stage != "report" else step.run()
            if seconds is None:
                shared += 1
            else:
                taken.append(seconds)
                note(str(where), seconds)
        others = [f"{count} {how}" for count, how in ((before, "done before"), (shared, "shared")) if count]
        if taken:
            steps = len(taken) + before + shared
            return f"done in {sum(taken):.0f} s" + (f" ({', '.join(others)}, of {steps} steps)" if others else "")
        return "shared" if shared else "done before" if before else ""

    def _described(self) -> dict[str, Any]:
        """What the manifest says of the machine and of what is read."""
        return provenance.environment() | {
            "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
            **({RECORD: asdict(self.precision)} if self.precision else {}),
            "processes": ranks.world_size(),
            "seed": self.spec.seed,
            "hashes": self.inputs.hashes,
            "licences": self.inputs.licences,
            "judges": self.inputs.judge_versions,
        }

    def _require_what_comes_before(self, stage: str) -> None:
        for earlier in takewhile(lambda name: name != stage, STAGES):
            for step in self.steps(earlier):
                if not step.is_done:
                    raise UserError(
                        f"{step.folder} is not done, or was done with other settings: run tasft {earlier} with this "
                        "recipe first, or tasft run for all stages"
                    )

    @property
    def gate(self) -> dict[str, Any] | None:
        """What `tasft.run.gate` found when the report was written; None without limits."""
        return provenance.read_json(self.folder / "report" / "gate.json")

    def preview(self, stage: str, count: int = 3) -> Iterator[Text]:
        """The first rows of each kind, as `sft` or `train` would see them.

        Raises:
            UserError: A fault of recipe or data, or the stage before is not done.
        """
        check_inputs(self.inputs)
        self._require_what_comes_before(stage)
        spec = self.spec.train.heeded() if stage == "train" else sft.settings_of(self.spec)
        if spec is None:
            raise UserError("the recipe has no sft section: there is nothing to show")
        rows = train.rows_of(self.context) if stage == "train" else self.inputs.imitate
        chosen = [row for kind in (True, False) for row in [row for row in rows if row.label == kind][:count]]
        encoding = training.arguments(self.spec, spec, self.folder / stage).encoding()
        encoded, _ = encode_rows(chosen, self.inputs.tokenizer, encoding)
        return preview(encoded, self.inputs.tokenizer)
