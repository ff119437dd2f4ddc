"""A model evaluated without a recipe."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from tasft.core import provenance, ranks
from tasft.core.errors import UserError
from tasft.data.rows import read_prompts
from tasft.data.sets import GROUPS, NAMED, expanded
from tasft.data.settings import PromptFormat
from tasft.data.sources import differences_of
from tasft.data.template import encode_prompt
from tasft.evaluate.states import Asked, steps_of
from tasft.judges import Judge
from tasft.judges.judging import Usual, topic_measure
from tasft.models.engine import Engine, Sampling
from tasft.models.load import attach_adapter, base_of, fingerprint, load_model, load_tokenizer
from tasft.models.local import TransformersEngine
from tasft.models.precision import RECORD, remembered


def asked_of(names: Sequence[str], data_dir: str | None, limit: int | None) -> tuple[list[Asked], list[str]]:
    """Named sets, read, and what tells their files from the published ones.

    Raises:
        UserError: No set is named, or one is not there; names all faults.
    """
    if not names:
        raise UserError(f"--sets: name some of {', '.join((*GROUPS, *NAMED))}")
    asked, notes, faults = [], [], []
    for name in expanded(list(names)):
        try:
            asked.append(Asked(name, NAMED[name].kind, name, read_prompts(name, data_dir), limit))
            notes += differences_of(name, data_dir)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(faults)
    return asked, notes


@dataclass
class Alone:
    """A model that answers prompt sets in a folder of its own.

    Attributes:
        name: A model as `tasft.models.load.locate` takes it, or the folder of an adapter, which names its base.
        prompt: How prompts are written.
        trust_remote_code: Run code that comes with the model.
        base: The model that an adapter is for; None is the one that it names.
    """

    name: str
    prompt: PromptFormat = "chat"
    trust_remote_code: bool = False
    base: str | None = None

    @cached_property
    def _adapter(self) -> Path | None:
        path = Path(self.name)
        return path if (path / "adapter_config.json").is_file() else None

    @cached_property
    def _base(self) -> str:
        if self.base and not self._adapter:
            raise UserError(f"--base is the model that an adapter is for, and {self.name} is no adapter: leave it out")
        return self.base or (base_of(self._adapter) if self._adapter else self.name)

    def evaluate(self, sets: Sequence[Asked], judges: Sequence[Judge], max_new_tokens: int, folder: Path) -> None:
        """Answer sets and have the replies judged; taken up where it was left.

        Args:
            sets: What is asked.
            judges: Who reads the replies.
            max_new_tokens: Longest reply; replies are greedy.
            folder: Gets what the folder of a state in a run has: `SET/replies.jsonl`, `SET/JUDGE/summary.json`.

        Raises:
            UserError: The model is not there or cannot write prompts, or the folder holds something else.
        """
        manifest = folder / "manifest.json"
        others = [path for path in folder.glob("*") if path.name[0] != "."]
        if (folder / "recipe.yaml").exists() or (others and not manifest.exists()):
            raise UserError(f"{folder} is there and holds something else: choose another with --out")
        held = (provenance.read_json(manifest) or {"model": self.name}).get("model")
        if held != self.name:
            raise UserError(f"{folder} holds the evaluation of {held}: choose another folder with --out")
        tokenizer = load_tokenizer(self._base, self.trust_remote_code, self._adapter)
        encode_prompt(tokenizer, "Hello?", self.prompt)
        weights = [fingerprint(str(source)) or str(source) for source in (self._base, self._adapter) if source]
        precision = remembered(manifest)
        reads = {"weights": weights, "prompt": self.prompt, "dtype": precision.dtype}
        origin = {"model": self.name, "commit": provenance.commit()}

        @cache
        def loaded() -> PreTrainedModel | PeftModel:
            base = load_model(self._base, precision.dtype, self.trust_remote_code)
            return attach_adapter(base, self._adapter) if self._adapter else base

        @contextmanager
        def engine() -> Iterator[Engine]:
            yield TransformersEngine(loaded(), tokenizer, self.prompt)

        written = {"model": self.name, **provenance.environment(), RECORD: asdict(precision)}
        private, first = provenance.private(), ranks.is_first()
        with ranks.joined(), private, provenance.lock(folder) if first else nullcontext():
            if ranks.is_first():
                provenance.write_json(manifest, written)
            usual = Usual(similarities=topic_measure())
            for step in steps_of(folder, engine, sets, judges, Sampling(max_new_tokens), reads, origin, usual):
                if not step.is_done:
                    step.run()
