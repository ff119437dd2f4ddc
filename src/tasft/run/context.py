"""What every stage of a run is given."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tasft.core import provenance, ranks
from tasft.core.errors import UserError
from tasft.models.load import fingerprint, saved
from tasft.run.inputs import Inputs
from tasft.run.recipe import Recipe
from tasft.run.resident import Resident
from tasft.train.settings import NO_MATTER


class Context:
    """A recipe, what it reads, its folder, and the models in memory; nothing here is written.

    Attributes:
        spec: The recipe.
        folder: The run folder.
        inputs: What the recipe reads besides weights.
        models: The models in memory.
        is_quiet: Whether only the end of each stage is told, as of the many cells of a sweep.
    """

    def __init__(self, spec: Recipe, folder: Path, is_quiet: bool = False) -> None:
        self.spec = spec
        self.folder = folder
        self.is_quiet = is_quiet
        self.inputs = Inputs(spec)
        self.models = Resident(self.inputs, folder, self.tell)

    def tell(self, line: str) -> None:
        """Print what a stage has found out."""
        if ranks.is_first() and not self.is_quiet:
            print(line, flush=True)

    @property
    def before(self) -> str:
        """The state that safety training is compared with: it answered the toxic prompts."""
        return "sft" if self.spec.sft else "base"

    def trained(self, state: str) -> Path:
        """The folder with the weights of a state: sft, final, or a checkpoint of train.

        Raises:
            UserError: It is not there, or it was trained by another recipe than that of the run.
        """
        folder = self.folder / ("sft" if state == "sft" else "train")
        was = (provenance.read_json(folder / "begun.json") or {}).get("reads", {})
        settings = {"lora": self.spec.model.lora, "sft": self.spec.sft, "train": self.spec.train.heeded()}
        dumped = {part: found.model_dump(exclude=NO_MATTER) for part, found in settings.items() if found}
        now = json.loads(json.dumps(self.base_reads | dumped))
        others = [
            f"{part}.{name}"
            for part in ("model", *dumped)
            for name, value in now[part].items()
            # An earlier version may have had fewer fields.
            if (was.get(part) or {}).get(name, value) != value
        ]
        if was.get("weights", now["weights"]) != now["weights"]:
            others.append("model.base")
        if others:
            raise UserError(
                f"{folder} was trained with other {', '.join(others)} than {self.folder / 'recipe.yaml'} says now: "
                f"tasft run {self.folder} trains it anew"
            )
        return saved(self.folder, state)

    # What results depend on, as JSON: parts of the keys of steps.

    @cached_property
    def base_reads(self) -> dict[str, Any]:
        """What the base model depends on."""
        spec = self.spec.model
        return {
            "model": spec.model_dump(exclude={"base", "lora", "trust_remote_code"}),
            # A model whose content is known is the same wherever it is.
            "weights": fingerprint(spec.base) or spec.base,
            "seed": self.spec.seed,
        }

    @property
    def training_reads(self) -> dict[str, Any]:
        """What any training depends on besides its own settings."""
        wanted, lora = self.spec.data.mixture or None, self.spec.model.lora
        rows = wanted and provenance.content_hash([row.row() for row in self.inputs.imitate])
        return self.base_reads | {"lora": lora and lora.model_dump(), "imitate": rows}

    @property
    def before_reads(self) -> dict[str, Any]:
        """What the model depends on that answers the toxic prompts."""
        if self.spec.sft is None:
            return self.base_reads
        return self.training_reads | {"sft": self.spec.sft.model_dump(exclude=NO_MATTER)}

    @property
    def about(self) -> dict[str, Any]:
        """What each summary says besides its figures."""
        return {"recipe": provenance.content_hash(self.spec.model_dump()), "commit": provenance.commit()}
