"""What every stage of a run is given."""

from functools import cached_property
from pathlib import Path
from typing import Any

from tasft.core import provenance, ranks
from tasft.models.load import fingerprint
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
