"""Which model a run holds in memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from tasft.core import ranks
from tasft.core.errors import UserError
from tasft.models.engine import Engine, Reply
from tasft.models.load import add_lora, attach_adapter, detach, load_model, saved
from tasft.models.local import TransformersEngine
from tasft.run.inputs import Inputs


class Resident:
    """The base model, loaded once, with the adapter of one state at a time on it.

    Args:
        inputs: The recipe and its tokenizer.
        folder: The run folder, where adapters and weights are.
        tell: Says that the base model is being loaded.
    """

    def __init__(self, inputs: Inputs, folder: Path, tell: Callable[[str], None] = print) -> None:
        self._inputs = inputs
        self._tell = tell
        self._spec = inputs.spec.model
        self._folder = folder

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, in memory."""
        self._tell(f"loading {self._spec.base} ...")
        return self._load(self._spec.base)

    def _load(self, model: str | Path) -> PreTrainedModel:
        return load_model(str(model), self._spec.dtype, self._spec.trust_remote_code, self._spec.quantize)

    @contextmanager
    def state(self, state: str) -> Iterator[PreTrainedModel]:
        """The model as it is in a state: base, sft, final, or a checkpoint of train.

        Raises:
            UserError: It is not there, or its adapter does not fit.
        """
        if state == "base":
            yield self.base
            return
        weights = saved(self._folder, state)
        if not (weights / "adapter_config.json").is_file():
            yield self._load(weights)
            return
        try:
            adapted = attach_adapter(self.base, weights)
        except UserError as error:
            again = f"remove {weights.parent} to have it trained again"
            raise UserError([f"{fault}; {again}" for fault in error.faults]) from error
        try:
            yield adapted
        finally:
            detach(adapted)

    @contextmanager
    def to_train(
        self, start: Literal["base", "sft"], before: Path | None = None
    ) -> Iterator[PreTrainedModel | PeftModel]:
        """The model that a training begins with: all weights of `start`, or its adapter, or a new one on it.

        With `before`, the adapter in that folder.
        """
        lora = self._spec.lora
        set_seed(self._inputs.spec.seed)  # A new adapter's first weights are drawn.
        loaded: PreTrainedModel | PeftModel
        if before is not None:
            loaded = attach_adapter(self.base, before, trainable=True)
        elif start == "sft" and lora is None:
            loaded = self._load(self._folder / "sft" / "model")
        elif start == "sft":
            loaded = attach_adapter(self.base, self._folder / "sft" / "adapter", trainable=True)
        elif lora is not None:
            loaded = add_lora(self.base, **lora.model_dump())
        else:
            loaded = self.base
        yield loaded
        if lora is None or ranks.world_size() > 1:
            # Its weights may have changed or be spread: the next stage that wants the base model loads it again.
            self.__dict__.pop("base", None)
        else:
            detach(loaded)

    def engine_of(self, loaded: PreTrainedModel) -> TransformersEngine:
        """Who answers with a model."""
        spec = self._spec
        return TransformersEngine(
            loaded, self._inputs.tokenizer, spec.prompt, chat_template_kwargs=spec.chat_template_kwargs
        )

    @contextmanager
    def engine(self, state: str) -> Iterator[TransformersEngine]:
        """Who answers with the model in a state."""
        with self.state(state) as loaded:
            yield self.engine_of(loaded)

    def mean_losses(self, state: str, replies: Sequence[Reply]) -> list[float]:
        """How improbable replies are to the model in a state, in nats per token."""
        with self.engine(state) as engine:
            return engine.mean_losses(replies)

    def opened(self, state: str) -> Callable[[], AbstractContextManager[Engine]]:
        """Gives `engine` when somebody asks."""
        return partial(self.engine, state)
