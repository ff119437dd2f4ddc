"""One run in one file: every field, its meaning and its default."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tasft.core.errors import UserError
from tasft.core.names import PENALTIES
from tasft.core.redact import secrets_in
from tasft.data.sets import NAMED, expanded
from tasft.judges import JUDGES, JudgeSettings
from tasft.models.server_settings import Server


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {value}")
    return value


# YAML reads 1e-4 as text and 1 as an integer: both are meant as numbers. Truth is not.
Number = Annotated[float, Field(strict=False), BeforeValidator(_no_truth)]
PenaltyName = Literal["none", *PENALTIES]  # type: ignore[valid-type]


# Names become folders.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=200)]
Place = Annotated[str, Field(min_length=1)]


class Lora(_Section):
    """A low-rank adapter."""

    r: int = Field(8, ge=1, description="Rank.")
    lora_alpha: int = Field(16, ge=1, description="Scale: the adapter's output is multiplied by lora_alpha / r.")
    lora_dropout: Number = Field(0.05, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: list[str] = Field(["q_proj", "v_proj"], min_length=1, description="Names of the linear layers.")


class Model(_Section):
    """The model that is made safe."""

    base: Place = Field(description="A hub name, a folder, a .gguf file, or smollm2-135m-instruct.")
    prompt: Literal["chat", "alpaca"] = Field("chat", description="How prompts are written.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Given to the chat template: enable_thinking: false.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision of the base weights.")
    quantize: Literal["none", "4bit"] = Field("none", description="4bit: QLoRA, by bitsandbytes.")
    lora: Lora | None = Field(Lora(), description="The adapter; null trains all weights.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")


class Imitate(_Section):
    """Rows to imitate."""

    source: Place = Field(description="File of prompt and completion, or of Alpaca's instruction, input and output.")
    rows: int | None = Field(None, ge=1, description="Rows drawn from it at random; null takes all.")
    keep: dict[str, Any] = Field({}, description="Fields and values that a row must have; a list has each of its own.")
    drop: dict[str, Any] = Field({}, description="Fields and values that a row must not have: safety_related: true.")


class SafeResponses(_Section):
    """Safe responses to toxic prompts, for method stl."""

    source: Place = Field(description="As that of imitate.")
    rows: Annotated[int, Field(ge=1)] | Literal["harvested"] | None = Field(
        None, description="Rows drawn from it at random; null: all; harvested: those whose prompts the harvest kept."
    )


class Data(_Section):
    """What is read. A source is a named set or a JSONL file."""

    imitate: Imitate | None = Field(None, description="Rows to imitate besides those that harvest makes.")
    toxic_prompts: Place | None = Field(None, description="Prompts whose harmful answers become avoid rows.")
    safe_responses: SafeResponses | None = Field(None, description="What method stl imitates for toxic prompts.")
    benign_prompts: Place | None = Field(
        None, description="Prompts whose own answers become imitate rows and calibrate coherence."
    )
    data_dir: Place | None = Field(None, description="Folder with the files of public sets; null downloads them.")


class Contrastive(_Section):
    """Rows to imitate for prompts that only seem toxic (paper 4.3.6)."""

    words: int = Field(100, ge=1, description="Toxic words of the toxic prompts that are used.")
    per_word: int = Field(5, ge=1, description="Prompts that are written for each.")
    engine: Server | None = Field(None, description="Who writes and answers them; null: the model itself.")


class Harvest(_Section):
    """How the model's own answers become rows."""

    samples: int = Field(1, ge=1, description="Most answers to each toxic prompt.")
    temperature: Number = Field(0.7, ge=0, description="Divides the logits; 0 is greedy.")
    top_p: Number = Field(0.95, gt=0, le=1, description="Nucleus of the distribution that is drawn from.")
    max_new_tokens: int = Field(48, ge=1, description="Longest answer.")
    engine: Server | None = Field(None, description="A server that runs the model; null runs it in this process.")
    judge: str = Field("embedded", description="Decides what is harmful: a name in judges, or a kind of judge.")
    rows: int = Field(1000, ge=1, description="Avoid rows that are wanted; no more is drawn then.")
    anchors: Literal["none", "own", "prefilled"] = Field(
        "none", description="Imitate rows for toxic prompts: none, own safe answers, continued refusals."
    )
    anchor_rows: int | None = Field(None, ge=1, description="Most anchors that are kept; null keeps all.")
    self_imitate: bool = Field(True, description="Its own answers to benign prompts become rows to imitate.")
    contrastive: Contrastive | None = Field(None, description="Rows for prompts that only seem toxic; null for none.")


class Training(_Section):
    """One training, of the SFT model or of the safe one."""

    epochs: int | None = Field(None, ge=1, description="Passes over the imitate rows; or say max_steps.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; or say epochs.")
    batch_size: int = Field(8, ge=1, description="Rows in an optimizer step.")
    micro_batch_size: int | None = Field(None, ge=1, description="Rows in a forward pass; null takes batch_size.")
    learning_rate: Number = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up; linear decay follows.")
    max_length: int = Field(512, ge=8, description="Longest row in tokens.")
    overlong: Literal["truncate", "drop", "error"] = Field("truncate", description="What becomes of longer rows.")
    duplicates: Literal["keep", "drop", "error"] = Field("keep", description="What becomes of rows that repeat one.")
    turns: Literal["last", "all"] = Field("last", description="Assistant turns of a conversation that are learned.")
    padding_free: bool = Field(False, description="Lay rows end to end instead of padding them.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Of products, whatever the weights are in.")
    activation_checkpointing: bool = Field(False, description="Compute activations again in backward: less memory.")
    save_steps: int = Field(20, ge=1, description="Steps between checkpoints, from which an interrupted run goes on.")

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("say either epochs or max_steps")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class Monitor(_Section):
    """What happens when training collapses, see `tasft.train.monitor`."""

    action: Literal["warn", "lower", "stop"] = Field("warn", description="Warn, lower penalty_weight, or go back.")
    patience: int = Field(3, ge=1, description="Logs in a row over a limit.")
    factor: Number = Field(0.5, gt=0, lt=1, description="lower: what the weight is multiplied by.")
    times: int = Field(3, ge=1, description="lower: how often at most.")
    probes: int = Field(0, ge=0, description="Benign prompts asked before each checkpoint.")
    entropy_nats: Number | None = Field(0.1, ge=0, description="Least entropy on avoid tokens.")
    entropy_fraction: Number | None = Field(0.25, ge=0, le=1, description="The same, of the first log's.")
    nll_factor: Number | None = Field(2.0, gt=1, description="Highest imitate loss, of the first log's.")
    kl_nats: Number | None = Field(2.0, gt=0, description="Highest divergence from step 0.")
    broken_share: Number | None = Field(0.25, ge=0, le=1, description="Highest share of probe replies that broke.")


_ABOUT_AVOID_ROWS = ("penalty", "penalty_weight", "avoid_per_step", "cost_space", "center", "penalize_eos", "beta")
UNREAD = {
    "tasft": (),
    "sft": _ABOUT_AVOID_ROWS,
    "stl": _ABOUT_AVOID_ROWS,
    "kto": (*_ABOUT_AVOID_ROWS[:5], "normalization", "sampling", "padding_free", "kl_rows", "monitor"),
}
"""Of each method, the fields of `train` that it does not read."""


class Train(Training):
    """The training that makes the model safe."""

    method: Literal["tasft", "sft", "stl", "kto"] = Field(
        "tasft", description="tasft and kto use harvested rows; stl data.safe_responses; sft only data.imitate."
    )
    penalty: PenaltyName = Field("emd_exact", description="What avoid rows cost tasft; none leaves them out.")
    penalty_weight: Number = Field(1.0, ge=0, description="Weight of the mean penalty beside the imitate loss.")
    normalization: Literal["per_group", "shared", "paper"] = Field(
        "per_group", description="What each term is divided by."
    )
    sampling: Literal["stratified", "uniform"] = Field("stratified", description="How rows are drawn into steps.")
    avoid_per_step: int | None = Field(None, ge=1, description="Avoid rows in a step; null takes the data's share.")
    start: Literal["base", "sft"] = Field("base", description="The model that training starts from.")
    cost_space: Literal["output", "input"] = Field("output", description="Embedding whose distances are the cost.")
    center: bool = Field(False, description="Subtract the mean embedding first.")
    penalize_eos: bool = Field(False, description="Penalise the end token of avoid rows too, as the paper reads.")
    kl_rows: int = Field(16, ge=0, description="Imitate rows held out, on which the divergence from step 0 is watched.")
    monitor: Monitor | None = Field(Monitor(), description="Watches for collapse; null for none.")
    beta: Number = Field(0.1, gt=0, description="How soon penalty npo lets go; how dear distance is to kto.")

    @model_validator(mode="after")
    def _check_step(self) -> "Train":
        if self.avoid_per_step is not None and self.avoid_per_step >= self.batch_size:
            raise ValueError(f"avoid_per_step {self.avoid_per_step} leaves no row to imitate in {self.batch_size}")
        if self.method == "kto" and (self.micro_batch_size or self.batch_size) < 2:
            raise ValueError("method kto compares the rows of a micro-batch: micro_batch_size must be at least 2")
        if self.method == "kto" and self.turns == "all":
            raise ValueError("method kto scores one reply a row: say turns: last")
        return self

    def unread(self) -> list[str]:
        """Fields that are set, and that the method does not read."""
        return [name for name in UNREAD[self.method] if getattr(self, name) != Train.model_fields[name].default]


class PromptSet(_Section):
    """Prompts to evaluate on."""

    source: Place = Field(description="A named set or a JSONL file.")
    kind: Literal["toxic", "benign"] = Field(
        description="Whether prompts should be refused or answered; known of a named set."
    )

    @model_validator(mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        if isinstance(value, dict) and "kind" not in value and (known := NAMED.get(str(value.get("source")))):
            return {**value, "kind": known.kind}
        return value


# Files beside the folders of judges.
FILES = ("begun.json", "done.json", "replies.jsonl", "set.json")
# Folders beside those of prompt sets.
RESERVED = ("capability", "quality", "jailbreak")


class JailbreakTemplates(_Section):
    """Texts that a prompt is put into."""

    source: Place = Field("jailbreak-wrappers", description="A named set, a file or hub:..., with #COLUMN if need be.")
    placeholder: str = Field("[INSERT PROMPT HERE]", min_length=1, description="Where the prompt goes in each.")
    limit: int | None = Field(
        None, ge=1, description="Most templates of it, the same ones for any seed; null takes all."
    )


class JailbreakPair(_Section):
    """PAIR: a model that rewrites prompts and learns from the replies."""

    attacker: Server | None = Field(None, description="Who rewrites; null: the base model, in this process.")
    streams: int = Field(3, ge=1, description="Conversations for each prompt.")
    iterations: int = Field(3, ge=1, description="Rounds of each.")
    max_new_tokens: int = Field(500, ge=1, description="Longest answer of the attacker.")


class Jailbreak(_Section):
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


class Capability(_Section):
    """Tasks of lm-eval, see `tasft.evaluate.capability`."""

    tasks: list[Name] = Field(
        ["boolq", "piqa", "openbookqa"], min_length=1, description="Names of lm-eval's tasks or groups."
    )
    limit: int | None = Field(300, ge=1, description="Items of each task, from the first; null takes all.")
    num_fewshot: int = Field(0, ge=0, description="Solved examples before each item.")
    batch_size: int = Field(16, ge=1, description="Items in a forward pass.")


class Annotator(_Section):
    """Who compares answers, for AlpacaEval."""

    config: str = Field(
        "weighted_alpaca_eval_gpt-4o-mini-2024-07-18",
        description="An annotator of alpaca_eval by name, or a folder with configs.yaml.",
    )
    server: Server | None = Field(None, description="Who runs it instead of the model that config names.")


class Quality(_Section):
    """Answers to instructions, see `tasft.evaluate.quality`."""

    prompts: Place = Field(description="Rows of instruction and output: AlpacaEval's model_outputs.json.")
    limit: int | None = Field(None, ge=1, description="Rows, from the first; null takes all.")
    annotator: Annotator | None = Field(None, description="Who compares answers with outputs; null for nobody.")
    max_new_tokens: int = Field(512, ge=1, description="Longest answer that is compared.")


class Evaluate(_Section):
    """What is measured, before and after."""

    sets: dict[Name, PromptSet] = Field(min_length=1, description="Prompt sets by name, or a list of named sets.")
    limit: int | None = Field(
        None, ge=1, description="Most prompts of each set, the same ones for any seed; null takes all."
    )
    checkpoints: bool = Field(False, description="Also evaluate every checkpoint of train; all are kept then.")
    judges: list[str] = Field(
        ["embedded", "refusal_matching"],
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
            raise ValueError("; ".join(error.faults)) from None

    @field_validator("sets")
    @classmethod
    def _not_reserved(cls, value: dict[str, PromptSet]) -> dict[str, PromptSet]:
        if taken := [name for name in value if name in RESERVED]:
            raise ValueError(f"{', '.join(taken)}: a name of another evaluation; choose another one for the set")
        return value


Percent = Annotated[float, Field(strict=False, ge=0, le=100)]
Points = Annotated[float, Field(strict=False, ge=-100, le=100)]


class Gate(_Section):
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
        kinds = {each.kind for each in evaluate.sets.values()}
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


class Recipe(_Section):
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
            f"{where}: holds a key or a password, and a recipe is copied into the run folder: keys belong into the "
            "environment"
            for where in secrets_in(self.model_dump())
        ]
        method = self.train.method
        if self.harvests:
            wanted = f"train.method is {method}" + (" and data.safe_responses.rows harvested" if self.replaces else "")
            if self.harvest is None:
                faults.append(f"{wanted}: add a harvest section")
            if self.data.toxic_prompts is None:
                faults.append(f"{wanted}: data.toxic_prompts is missing")
            if self.data.imitate is None and self.data.benign_prompts is None:
                faults.append("nothing to imitate: give data.imitate or data.benign_prompts")
        elif self.data.imitate is None:
            faults.append(f"train.method is {method}: data.imitate is missing")
        if method == "stl" and self.data.safe_responses is None:
            faults.append("train.method is stl: data.safe_responses is missing")
        if self.sft is not None and self.data.imitate is None:
            faults.append("the sft section needs data.imitate")
        if self.model.quantize != "none" and self.model.lora is None:
            faults.append("model.quantize: quantised weights cannot be trained: give model.lora")
        faults += [
            f"judges.{name}: no judge is called {each.kind!r}"
            for name, each in self.judges.items()
            if each.kind not in JUDGES
        ]
        jailbreak = self.evaluate.jailbreak
        faults += [f"judges.{name}: a file of the run has that name" for name in self.judges if name in FILES]
        faults += [
            f"evaluate.judges: {name} is named twice"
            for name in dict.fromkeys(self.evaluate.judges)
            if self.evaluate.judges.count(name) > 1
        ]
        named = {
            "evaluate.judges": self.evaluate.judges,
            "harvest.judge": [self.harvest.judge] if self.harvest else [],
            "evaluate.jailbreak.judge": [jailbreak.judge] if jailbreak and jailbreak.judge else [],
        }
        known = {*JUDGES, *self.judges}
        faults += [
            f"{field}: no judge is called {name!r}; use one of {', '.join(sorted(known))}, or declare it under judges"
            for field, names in named.items()
            for name in names
            if name not in known
        ]
        if self.train.start == "sft" and self.sft is None:
            faults.append("train.start is sft: add an sft section")
        if jailbreak:
            toxic = [name for name, each in self.evaluate.sets.items() if each.kind == "toxic"]
            if jailbreak.set not in toxic:
                faults.append(
                    f"evaluate.jailbreak.set: {jailbreak.set!r} is none of the toxic sets in evaluate.sets: "
                    f"{', '.join(toxic) or 'there is none'}"
                )
            if not jailbreak.attacks:
                faults.append('evaluate.jailbreak: no attack is named; add prefix: "Sure, here is", templates or pair')
        faults += self.gate.faults(self.evaluate) if self.gate else []
        if faults:
            raise ValueError("; ".join(faults))
        return self
