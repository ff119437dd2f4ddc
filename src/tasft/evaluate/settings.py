"""What is measured, as a recipe says it."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tasft.core.errors import UserError
from tasft.core.settings import Name, Place, Settings
from tasft.data.sets import NAMED, expanded
from tasft.models.server_settings import Server

HELD_OUT: dict[str, Literal["toxic", "benign"]] = {
    "data.toxic_prompts": "toxic",
    "data.benign_prompts": "benign",
    "data.imitate": "benign",
}
"""Sources of prompt sets that are set aside from what a recipe trains on, and of which kind they are."""


class PromptSet(Settings):
    """Prompts to evaluate on."""

    source: Place = Field(description="A named set, a file, or what is held out of data: data.toxic_prompts.")
    kind: Literal["toxic", "benign"] = Field(
        description="Whether prompts should be refused or answered; known of a named set."
    )

    @model_validator(mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        kinds = HELD_OUT | {name: known.kind for name, known in NAMED.items()}
        if isinstance(value, dict) and "kind" not in value and (kind := kinds.get(str(value.get("source")))):
            return {**value, "kind": kind}
        return value


# Files beside the folders of judges.
FILES = ("begun.json", "done.json", "replies.jsonl", "set.json")
# Folders beside those of prompt sets.
RESERVED = ("capability", "quality", "jailbreak")


class JailbreakTemplates(Settings):
    """Texts that a prompt is put into."""

    source: Place = Field("jailbreak-wrappers", description="A named set, a file or hub:..., with #COLUMN if need be.")
    placeholder: str = Field("[INSERT PROMPT HERE]", min_length=1, description="Where the prompt goes in each.")
    limit: int | None = Field(
        None, ge=1, description="Most templates of it, the same ones for any seed; null takes all."
    )


class JailbreakPair(Settings):
    """PAIR: a model that rewrites prompts and learns from the replies."""

    attacker: Server | None = Field(None, description="Who rewrites; null: the base model, in this process.")
    streams: int = Field(3, ge=1, description="Conversations for each prompt.")
    iterations: int = Field(3, ge=1, description="Rounds of each.")
    max_new_tokens: int = Field(500, ge=1, description="Longest answer of the attacker.")


class Jailbreak(Settings):
    """Attacks on the model; each that is named is run."""

    set: str = Field(description="The toxic set of evaluate.sets whose prompts are used.")
    limit: int | None = Field(50, ge=1, description="Most of its prompts, the same ones for any seed; null takes all.")
    judge: str | None = Field(None, description="Who judges; null takes the first of evaluate.judges.")
    queries: int = Field(1000, ge=1, description="Most prompts that an attack may send to a model; more are refused.")
    prefix: str | None = Field(None, min_length=1, description='How replies are begun for the model: "Sure, here is".')
    templates: JailbreakTemplates | None = Field(None, description="Prompts inside templates; {} takes our three.")
    pair: JailbreakPair | None = Field(None, description="PAIR; {} takes its usual settings.")

    @property
    def attacks(self) -> list[str]:
        """Those that are run, by name."""
        return [name for name in ("prefix", "templates", "pair") if getattr(self, name) is not None]


class Capability(Settings):
    """Tasks of lm-eval, see `tasft.evaluate.capability`."""

    tasks: list[Name] = Field(
        ["boolq", "piqa", "openbookqa"], min_length=1, description="Names of lm-eval's tasks or groups."
    )
    limit: int | None = Field(300, ge=1, description="Items of each task, from the first; null takes all.")
    num_fewshot: int = Field(0, ge=0, description="Solved examples before each item.")
    batch_size: int = Field(16, ge=1, description="Items in a forward pass.")


class Annotator(Settings):
    """Who compares answers, for AlpacaEval."""

    config: str = Field(
        "weighted_alpaca_eval_gpt-4o-mini-2024-07-18",
        description="An annotator of alpaca_eval by name, or a folder with configs.yaml.",
    )
    server: Server | None = Field(None, description="Who runs it instead of the model that config names.")


class Quality(Settings):
    """Answers to instructions, see `tasft.evaluate.quality`."""

    prompts: Place = Field(description="Rows of instruction and output: AlpacaEval's model_outputs.json.")
    limit: int | None = Field(None, ge=1, description="Rows, from the first; null takes all.")
    annotator: Annotator | None = Field(None, description="Who compares answers with outputs; null for nobody.")
    max_new_tokens: int = Field(512, ge=1, description="Longest answer that is compared.")


class Evaluate(Settings):
    """What is measured, before and after."""

    sets: dict[Name, PromptSet] = Field(min_length=1, description="Prompt sets by name, or a list of named sets.")
    limit: int | None = Field(
        None, ge=1, description="Most prompts of each set, the same ones for any seed; null takes all."
    )
    checkpoints: bool = Field(False, description="Also evaluate every checkpoint of train; all are kept then.")
    judges: list[str] = Field(
        ["classifier", "refusal_matching"],
        min_length=1,
        description="Who judges; of several who tell a figure the first is quoted.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest reply; replies are greedy.")
    capability: Capability | None = Field(None, description="Tasks of lm-eval; null for none.")
    quality: Quality | None = Field(None, description="Answers to instructions; null for none.")
    jailbreak: Jailbreak | None = Field(None, description="Attacks on the model; null for none.")

    @property
    def jailbreak_judge(self) -> str | None:
        """Who judges the attacks; None when there are none."""
        return (self.jailbreak.judge or self.judges[0]) if self.jailbreak else None

    @field_validator("sets", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            return value
        try:
            return {name: {"source": name} for name in expanded(value)}
        except UserError as error:
            raise ValueError(*error.faults) from None

    @field_validator("sets")
    @classmethod
    def _not_reserved(cls, value: dict[str, PromptSet]) -> dict[str, PromptSet]:
        if taken := [name for name in value if name in RESERVED]:
            raise ValueError(f"{', '.join(taken)}: a name of another evaluation; choose another one for the set")
        first: dict[str, str] = {}
        for name, asked in value.items():
            if (other := first.setdefault(asked.source, name)) != name:
                raise ValueError(f"{other} and {name} have the same prompts, {asked.source}, which would count twice")
        return value
