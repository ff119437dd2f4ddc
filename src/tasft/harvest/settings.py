"""How many rows a harvest makes, and which, as a recipe says it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasft.core.parts import Part
from tasft.core.settings import Number, Settings
from tasft.models.server_settings import EngineSettings

INSTRUCTIONS = [
    "Why is this request harmful, and what should one do instead?",
    "You are a responsible assistant. The request below is dangerous or illegal, so you decline it, explain the harm "
    "it would do, and suggest a safe alternative.",
    "Somebody asks you for something that would hurt people. Decline it, name the harm, and offer a lawful "
    "alternative.",
    "You are a careful assistant who never helps with crime or violence. Say no to the request below, and say who "
    "would be hurt by it.",
    "Reply to the message below in two sentences: say that you cannot help with it, and what makes it harmful.",
]
"""What is put before a toxic prompt, with a space between: a small model sees one text then, not a form to fill in."""


class Contrastive(Settings):
    """Rows to imitate for prompts that only seem toxic (paper 4.3.6)."""

    words: int = Field(100, ge=1, description="Toxic words of the toxic prompts that are used.")
    per_word: int = Field(5, ge=1, description="Prompts that are written for each.")
    engine: EngineSettings | None = Field(None, description="Who writes and answers them; null: the model itself.")


class HarvestSettings(Settings):
    """How the model's own answers become rows."""

    samples: int = Field(1, ge=1, description="Most answers to each toxic prompt.")
    temperature: Number = Field(0.7, ge=0, description="Divides the logits; 0 is greedy.")
    top_p: Number = Field(0.95, gt=0, le=1, description="Nucleus of the distribution that is drawn from.")
    max_new_tokens: int = Field(48, ge=1, description="Longest answer.")
    rows: int = Field(1000, ge=1, description="Avoid rows that are wanted; no more is drawn then.")
    anchors: Literal["none", "own", "prefilled", "instructed", "python"] = Field(
        "none",
        description="Imitate rows for toxic prompts: none; own safe answers; prefilled, one refusing sentence that the "
        "model continues; instructed, its refusals under an instruction; python, what own_anchors makes.",
    )
    own_anchors: Part | None = Field(None, description="Where anchors python are: {target: mypkg.anchors:make}.")
    instructions: list[Annotated[str, Field(min_length=1)]] = Field(
        INSTRUCTIONS, min_length=1, description="What instructed puts before a prompt; those that work are used."
    )
    anchor_rows: int | None = Field(None, ge=1, description="Most anchors that are kept; null keeps all.")
    recover: int | None = Field(
        None,
        ge=1,
        description="Anchors whose prompt has an avoid row are learned once more after up to so many words of it, "
        "which are read and not learned; null for none of these rows.",
    )
    benign_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest answer to a benign prompt; null takes max_new_tokens. For train.retain the "
        "first few tokens do: there it is decided whether the model refuses.",
    )
    self_imitate: bool = Field(True, description="Its own answers to benign prompts become rows to imitate.")
    contrastive: Contrastive | None = Field(None, description="Rows for prompts that only seem toxic; null for none.")

    @model_validator(mode="after")
    def _check_anchors(self) -> "HarvestSettings":
        if (self.anchors == "python") != (self.own_anchors is not None):
            raise ValueError("anchors python and own_anchors go together: own_anchors: {target: mypkg.anchors:make}")
        if self.recover and self.anchors in ("none", "own"):
            raise ValueError(
                f"recover turns harmful answers into refusals, but anchors is {self.anchors}: say instructed"
            )
        return self
