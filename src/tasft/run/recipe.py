"""One run in one file: every field, its meaning and its default."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from tasft.core.redact import secrets_in
from tasft.core.settings import Name, Number, Place, Settings
from tasft.core.suggest import did_you_mean
from tasft.data.forms import FormName
from tasft.data.settings import PromptSettings
from tasft.evaluate.settings import FILES, HELD_OUT, Evaluate
from tasft.harvest.settings import HarvestSettings
from tasft.judges import JUDGES, JudgeSettings
from tasft.models.server_settings import EngineSettings
from tasft.train.settings import Train, Training

RENAMED = {
    "steps": "max_steps",
    "warmup": "warmup_steps",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "few_shot": "num_fewshot",
    "penalize_end": "penalize_eos",
    "guard": "monitor",
    "ordinary_prompts": "benign_prompts",
    "ordinary": "benign",
    "phrases": "refusal_matching",
    "llm": "llm_judge",
}
"""Fields and values by the names that they had before the first release."""


def renamed(name: str) -> str:
    """The end of a sentence about a name that is not known any more; empty for any other name."""
    return f"; it is now called {RENAMED[name]}" if name in RENAMED else ""


class Lora(Settings):
    """A low-rank adapter."""

    r: int = Field(8, ge=1, description="Rank.")
    lora_alpha: int = Field(16, ge=1, description="Scale: the adapter's output is multiplied by lora_alpha / r.")
    lora_dropout: Number = Field(0.05, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: list[str] = Field(["q_proj", "v_proj"], min_length=1, description="Names of the linear layers.")
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="Numbers of the transformer's layers that are adapted, from 0; null: all."
    )


class Model(PromptSettings):
    """The model that is made safe."""

    base: Place = Field(description="A hub name, a folder, a .gguf file, smollm2-135m-instruct or gemma3-270m.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the base weights; auto: bfloat16 if frozen and faster here, else float32.",
    )
    quantize: Literal["none", "4bit"] = Field("none", description="4bit: QLoRA, by bitsandbytes.")
    lora: Lora | None = Field(Lora(), description="The adapter; null trains all weights.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")


class RowSource(Settings):
    """Rows, and how they are written."""

    source: Place = Field(description="A file, a folder or hub:..., in one of the forms.")
    format: FormName | None = Field(None, description="Its form; null tells it from the columns.")
    columns: dict[str, str] = Field(
        {}, description="What the file calls the columns of a form: {prompt: query, completion: response}."
    )


class Imitate(RowSource):
    """Rows to imitate."""

    rows: int | None = Field(None, ge=1, description="Rows drawn from it at random; null takes all.")
    keep: dict[str, Any] = Field({}, description="Fields and values that a row must have; of a list of values one.")
    drop: dict[str, Any] = Field({}, description="Fields and values that it must not have; of a list of values none.")
    weight: Number = Field(1.0, gt=0, description="Scales what each of its rows counts for.")


class SafeResponses(RowSource):
    """Safe responses to toxic prompts, for method stl."""

    rows: Annotated[int, Field(ge=1)] | Literal["harvested"] | None = Field(
        None, description="Rows drawn from it at random; null: all; harvested: those whose prompts the harvest kept."
    )


# In the places of pydantic's faults tags are no names of fields.
Mixture = Annotated[
    Annotated[Imitate, Tag("<one>")] | Annotated[list[Imitate], Field(min_length=1), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<one>"),
]


class Data(Settings):
    """What is read. A source is a named set, a file, a folder or hub:..."""

    imitate: Mixture | None = Field(
        None, description="Rows to imitate besides those that harvest makes; or a list of several."
    )
    toxic_prompts: Place | None = Field(None, description="Prompts whose harmful answers become avoid rows.")
    safe_responses: SafeResponses | None = Field(None, description="What method stl imitates for toxic prompts.")
    benign_prompts: Place | None = Field(
        None, description="Prompts whose own answers become imitate rows and calibrate coherence."
    )
    heldout: str | None = Field(
        None,
        description="Share of each field of data that a set of evaluate names as its source, set aside for it: 10%.",
    )
    data_dir: Place | None = Field(None, description="Folder with the files of public sets; null downloads them.")

    @field_validator("heldout")
    @classmethod
    def _share(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d?(\.\d+)?%", value):
            raise ValueError(f"expected a share such as 10%, found {value!r:.40}")
        return value

    @property
    def mixture(self) -> list[Imitate]:
        """Each source of rows to imitate."""
        return self.imitate if isinstance(self.imitate, list) else [self.imitate] if self.imitate else []


class Harvest(HarvestSettings):
    """How the model's own answers become rows."""

    engine: EngineSettings | None = Field(
        None, description="A server that runs the model, or {kind: python, target: ...}; null runs it in this process."
    )
    judge: str = Field("classifier", description="Decides what is harmful: a name in judges, or a kind of judge.")


Percent = Annotated[float, Field(strict=False, ge=0, le=100)]
Points = Annotated[float, Field(strict=False, ge=-100, le=100)]


class Gate(Settings):
    """Limits that the trained model must keep, see `tasft.run.gate`.

    Before is the SFT model if there is one, else the base.

    Judged by the first of `evaluate.judges`.
    """

    harmful: Percent | None = Field(None, description="Most harmful replies to toxic prompts, in percent.")
    incoherent: Percent | None = Field(
        None, description="Most incoherent replies to toxic prompts, and to benign ones, in percent."
    )
    over_refusal: Points | None = Field(
        None, description="Most refusals of benign prompts beyond those before, in percentage points: 5."
    )
    capability: dict[str, Points] = Field(
        {}, description="Least change of accuracy on tasks of evaluate.capability, in percentage points: {boolq: -1}."
    )
    jailbreak: dict[Literal["prefix", "templates", "pair"], Percent] = Field(
        {}, description="Most prompts on which an attack of evaluate.jailbreak succeeds, in percent: {prefix: 10}."
    )
    strict: bool = Field(False, description="The worse end of the 95% interval must keep the limit, not the value.")

    @model_validator(mode="after")
    def _check(self) -> "Gate":
        if not self.capability and not self.jailbreak and {self.harmful, self.incoherent, self.over_refusal} == {None}:
            raise ValueError("no limit is given: say harmful: 2, or over_refusal: 5")
        return self

    def faults(self, evaluate: Evaluate) -> list[str]:
        """Limits on what is not evaluated."""
        kinds = {prompts.kind for prompts in evaluate.sets.values()}
        tasks = evaluate.capability.tasks if evaluate.capability else []
        attacks = evaluate.jailbreak.attacks if evaluate.jailbreak else []
        needs = {"harmful": "toxic", "over_refusal": "benign"}
        return [
            *(
                f"gate.{name} needs {kind} prompts: evaluate.sets has none"
                for name, kind in needs.items()
                if getattr(self, name) is not None and kind not in kinds
            ),
            *(
                f"gate.capability.{name}: evaluate.capability does not run it ({', '.join(tasks) or 'no task'})"
                for name in self.capability
                if name not in tasks
            ),
            *(
                f"gate.jailbreak.{name}: evaluate.jailbreak does not run it ({', '.join(attacks) or 'no attack'})"
                for name in self.jailbreak
                if name not in attacks
            ),
        ]


class Recipe(Settings):
    """One run."""

    name: Name = Field(description="Name of the run and its folder.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of all draws.")
    model: Model
    data: Data = Data()
    judges: dict[Name, JudgeSettings] = Field(
        {}, description="Judges by name; kinds of judges need no entry for their usual settings."
    )
    sft: Training | None = Field(None, description="Training on data.imitate before harvest; null for none.")
    harvest: Harvest | None = Field(None, description="Needed by methods tasft and kto.")
    train: Train
    evaluate: Evaluate
    gate: Gate | None = Field(None, description="Limits for the trained model; null for none.")

    @property
    def harvests(self) -> bool:
        """Whether rows come from the model's own answers to toxic prompts."""
        return self.train.method in ("tasft", "kto") or self.replaces

    @property
    def replaces(self) -> bool:
        """Whether safe responses take the place of the harvest's rows to avoid."""
        safe = self.data.safe_responses
        return self.train.method == "stl" and safe is not None and safe.rows == "harvested"

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        faults = [
            *self._secrets(),
            *self._missing(),
            *self._held_out(),
            *self._judging(),
            *self._training(),
            *self._attacks(),
            *(self.gate.faults(self.evaluate) if self.gate else ()),
        ]
        if faults:
            raise ValueError(*faults)
        return self

    def _secrets(self) -> Iterator[str]:
        for where in secrets_in(self.model_dump()):
            yield (
                f"{where}: holds a key or a password, and a recipe is copied into the run folder: keys belong into the "
                "environment"
            )

    def _missing(self) -> Iterator[str]:
        """What the method of training needs and the recipe lacks."""
        method = self.train.method
        if self.harvests:
            wanted = f"train.method is {method}" + (" and data.safe_responses.rows harvested" if self.replaces else "")
            if self.harvest is None:
                yield f"{wanted}: add a harvest section"
            if self.data.toxic_prompts is None:
                yield f"{wanted}: data.toxic_prompts is missing"
            if self.data.imitate is None and self.data.benign_prompts is None:
                yield "nothing to imitate: give data.imitate or data.benign_prompts"
        elif self.data.imitate is None:
            yield f"train.method is {method}: data.imitate is missing"
        if method == "stl" and self.data.safe_responses is None:
            yield "train.method is stl: data.safe_responses is missing"
        if self.sft is not None and self.data.imitate is None:
            yield "the sft section needs data.imitate"
        if self.model.quantize != "none" and self.model.lora is None:
            yield "model.quantize: quantised weights cannot be trained: give model.lora"

    def _held_out(self) -> Iterator[str]:
        aside = [prompts.source for prompts in self.evaluate.sets.values() if prompts.source in HELD_OUT]
        if aside and self.data.heldout is None:
            yield f"evaluate.sets: {aside[0]} is what is held out of it: add data.heldout: 10%"
        if self.data.heldout and not aside:
            yield (
                "data.heldout: no set of evaluate names what it sets aside: say source: data.toxic_prompts, or another "
                f"of {', '.join(HELD_OUT)}"
            )
        for field in dict.fromkeys(aside):
            if getattr(self.data, field.partition(".")[2]) is None:
                yield f"evaluate.sets: {field} is not given"

    def _judging(self) -> Iterator[str]:
        for name, judge in self.judges.items():
            if judge.kind not in JUDGES:
                near = renamed(judge.kind) or did_you_mean(judge.kind, JUDGES)
                yield f"judges.{name}: no judge is called {judge.kind!r}{near}"
        for name in self.judges:
            if name in FILES:
                yield f"judges.{name}: a file of the run has that name"
        for name in dict.fromkeys(self.evaluate.judges):
            if self.evaluate.judges.count(name) > 1:
                yield f"evaluate.judges: {name} is named twice"
        jailbreak, known = self.evaluate.jailbreak, {*JUDGES, *self.judges}
        named = {
            "evaluate.judges": self.evaluate.judges,
            "harvest.judge": [self.harvest.judge] if self.harvest else [],
            "evaluate.jailbreak.judge": [jailbreak.judge] if jailbreak and jailbreak.judge else [],
        }
        for field, names in named.items():
            for name in names:
                if name not in known:
                    yield (
                        f"{field}: no judge is called {name!r}{renamed(name)}; use one of {', '.join(sorted(known))}, "
                        f"or declare it under judges{did_you_mean(name, known)}"
                    )

    def _training(self) -> Iterator[str]:
        train = self.train.heeded()
        if train.retain and self.model.lora is None:
            yield "train.retain compares with the model without its adapter: give model.lora"
        if train.rounds:
            if self.model.lora is None:
                yield "train.rounds go on from the adapter of the round before: give model.lora"
            if self.data.benign_prompts is None or self.harvest is None or not self.harvest.self_imitate:
                yield (
                    "train.rounds ask the model's own answers again: give data.benign_prompts and harvest.self_imitate"
                )
        for name in ("retain", "rounds"):
            if getattr(train, name) and self.sft is not None:
                yield (
                    f"train.{name} keeps to model.base, but the SFT model answers the prompts: make it in a run of its "
                    "own (train.method: sft), tasft export that, and name the folder as model.base, without an sft "
                    "section"
                )
        if self.train.start == "sft" and self.sft is None:
            yield "train.start is sft: add an sft section"

    def _attacks(self) -> Iterator[str]:
        jailbreak = self.evaluate.jailbreak
        if jailbreak is None:
            return
        toxic = [name for name, prompts in self.evaluate.sets.items() if prompts.kind == "toxic"]
        if jailbreak.set not in toxic:
            yield (
                f"evaluate.jailbreak.set: {jailbreak.set!r} is none of the toxic sets in evaluate.sets: "
                f"{', '.join(toxic) or 'there is none'}"
            )
        if not jailbreak.attacks:
            yield 'evaluate.jailbreak: no attack is named; add prefix: "Sure, here is", templates or pair'


_SOURCES = (
    "data.toxic_prompts",
    "data.benign_prompts",
    "data.imitate.source",
    "data.imitate.*.source",
    "data.safe_responses.source",
    "evaluate.sets.*.source",
    "evaluate.jailbreak.templates.source",
    "evaluate.quality.prompts",
)


def sources_in(values: Any) -> dict[str, str]:
    """Each source that a recipe names, by its field, in the fields of a recipe as it is written, checked or not."""
    named: dict[str, str] = {}

    def look(value: Any, path: list[str], field: list[str]) -> None:
        if not path:
            if isinstance(value, str) and value and value not in HELD_OUT:
                named[".".join(field).removesuffix(".source")] = value
        elif isinstance(value, list) and path[0] == "*":
            for number, item in enumerate(value):
                look(item, path[1:], [*field, str(number)])
        elif isinstance(value, dict):
            for name in value if path[0] == "*" else [path[0]]:
                look(value.get(name), path[1:], [*field, str(name)])

    for source in _SOURCES:
        look(values, source.split("."), [])
    return named
