"""How many rows a harvest makes, and which, as a recipe says it."""

from typing import Literal

from pydantic import Field

from tasft.core.settings import Number, Section
from tasft.models.server_settings import Server


class Contrastive(Section):
    """Rows to imitate for prompts that only seem toxic (paper 4.3.6)."""

    words: int = Field(100, ge=1, description="Toxic words of the toxic prompts that are used.")
    per_word: int = Field(5, ge=1, description="Prompts that are written for each.")
    engine: Server | None = Field(None, description="Who writes and answers them; null: the model itself.")


class HarvestSettings(Section):
    """How the model's own answers become rows."""

    samples: int = Field(1, ge=1, description="Most answers to each toxic prompt.")
    temperature: Number = Field(0.7, ge=0, description="Divides the logits; 0 is greedy.")
    top_p: Number = Field(0.95, gt=0, le=1, description="Nucleus of the distribution that is drawn from.")
    max_new_tokens: int = Field(48, ge=1, description="Longest answer.")
    rows: int = Field(1000, ge=1, description="Avoid rows that are wanted; no more is drawn then.")
    anchors: Literal["none", "own", "prefilled"] = Field(
        "none", description="Imitate rows for toxic prompts: none, own safe answers, continued refusals."
    )
    anchor_rows: int | None = Field(None, ge=1, description="Most anchors that are kept; null keeps all.")
    self_imitate: bool = Field(True, description="Its own answers to benign prompts become rows to imitate.")
    contrastive: Contrastive | None = Field(None, description="Rows for prompts that only seem toxic; null for none.")
