"""How rows become tokens, as a recipe says it."""

from typing import Any, Literal

from pydantic import Field

from tasft.core.settings import Settings

PromptFormat = Literal["chat", "alpaca"]
Turns = Literal["last", "all"]
Overlong = Literal["truncate", "drop", "error"]
Duplicates = Literal["keep", "drop", "error"]


class PromptSettings(Settings):
    """How prompts are written, in training and in generation."""

    prompt: PromptFormat = Field("chat", description="How prompts are written.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Given to the chat template: enable_thinking: false.")


class RowSettings(Settings):
    """Which tokens of a row are learned."""

    max_length: int = Field(512, ge=8, description="Longest row in tokens.")
    overlong: Overlong = Field("truncate", description="What becomes of longer rows.")
    duplicates: Duplicates = Field("keep", description="What becomes of rows that repeat one.")
    turns: Turns = Field("last", description="Assistant turns of a conversation that are learned.")


class AvoidSettings(Settings):
    """Which tokens of a row to avoid are penalised."""

    penalize_eos: bool = Field(False, description="Penalise the end token of avoid rows too, as the paper reads.")
