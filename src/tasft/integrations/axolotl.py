"""The plug-in for axolotl: its rows, its packing and its trainer, and the loss of `tasft.losses_for`.

    plugins: [tasft.integrations.axolotl.Plugin]

Rows of `type: tasft.integrations.axolotl` are those of `chat_template`, to be avoided.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy, StrategyLoader
from pydantic import BaseModel, Field

from tasft.core.errors import UserError
from tasft.core.settings import Settings
from tasft.loss import IGNORE_INDEX, mark
from tasft.train.losses import Avoiding, losses_for


class LossSettings(Settings):
    """What `tasft.losses_for` takes, as there."""

    penalty: str = Field("nlcl", description="A name in tasft.PENALTIES.")
    penalty_weight: float = Field(1.0, strict=False, description="Weighs it.")
    beta: float | None = Field(None, strict=False, description="Of penalties that have one; null: the usual.")
    cost_space: str = Field("output", description="output or input.")
    center: bool = Field(False, description="Whether the mean embedding is subtracted.")


class Fields(BaseModel):
    """What axolotl's configuration may say besides its own."""

    tasft: LossSettings = LossSettings()


class Plugin(BasePlugin):
    """Trains by the loss of TA-SFT."""

    def get_input_args(self) -> str:
        """Where axolotl finds `Fields`."""
        return f"{__name__}.Fields"

    def get_trainer_cls(self, cfg: Any) -> type:
        """Axolotl's own trainer, with another loss."""
        from axolotl.core.trainers.base import AxolotlTrainer  # Imports half of axolotl.

        return type("AvoidingAxolotlTrainer", (Avoiding, AxolotlTrainer), {})

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer its loss; the model is now what it is at step 0.

        Raises:
            UserError: No row is to be avoided, or `losses_for` refuses the settings or the model.
        """
        rows = trainer.train_dataset
        if hasattr(rows, "__len__") and not any(min(row, default=0) < IGNORE_INDEX for row in rows["labels"]):
            raise UserError(f"no row is to be avoided: give some in a dataset of type: {__name__}")
        trainer.losses = losses_for(trainer.model, marked=True, **dict(cfg.tasft or {}))
        # Before transformers 5.23 this is what says that the loss is scaled already.
        trainer.model_accepts_loss_kwargs = True


class AvoidStrategy(ChatTemplateStrategy):
    """`chat_template`, with labels that say that they are to be avoided."""

    def _tokenize_single_prompt(self, prompt: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = super()._tokenize_single_prompt(prompt)
        return {**row, "labels": mark(row["labels"])}


class _Loader(StrategyLoader):
    def _get_strategy_cls(self, cfg: Any) -> type:
        if super()._get_strategy_cls(cfg) is not ChatTemplateStrategy:
            raise UserError("rows to avoid are written by the chat template: tokenizer_use_mistral_common has none")
        return AvoidStrategy


load = _Loader()
"""How axolotl finds the strategy of a dataset's type."""
