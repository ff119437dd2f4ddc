"""How a model is trained, as a recipe says it; the trainer, the monitor and KTO take their defaults from here."""

from typing import Literal

from pydantic import Field, model_validator

from tasft.core.names import PENALTIES
from tasft.core.parts import Part
from tasft.core.settings import Number, Settings
from tasft.data.settings import AvoidSettings, RowSettings

PenaltyName = Literal["none", "python", *PENALTIES]  # type: ignore[valid-type]


class Training(RowSettings):
    """One training, of the SFT model or of the safe one."""

    epochs: int | None = Field(None, ge=1, description="Passes over the imitate rows; or say max_steps.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; or say epochs.")
    batch_size: int = Field(8, ge=1, description="Rows in an optimizer step.")
    micro_batch_size: int | None = Field(None, ge=1, description="Most rows in a forward pass; null takes batch_size.")
    learning_rate: Number = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up; linear decay follows.")
    padding_free: bool = Field(
        False, description="Lay rows end to end instead of padding them, what all begin with once."
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "auto", description="Of products, whatever the weights are in; auto is bf16 where it is faster, else fp32."
    )
    activation_checkpointing: bool = Field(False, description="Compute activations again in backward: less memory.")
    save_steps: int = Field(20, ge=1, description="Steps between checkpoints, from which an interrupted run goes on.")
    report_to: list[str] = Field(
        [], description="Trackers that get figures, no texts: tensorboard, trackio, wandb or others of transformers."
    )

    @property
    def rows_together(self) -> int:
        """Rows in a forward pass of one process."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("say either epochs or max_steps")
        if self.batch_size % self.rows_together:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


NO_MATTER = {"save_steps", "report_to"}
"""Fields of a training on which its result does not depend."""


class MonitorSettings(Settings):
    """What happens when training collapses, and where a healthy one ends; a limit of null is switched off.

    The runs of docs/results (SmolLM2-135M, 80 steps) are what *healthy* refers to. At an entropy of 0.1 nats the
    likelier of two tokens has a probability of 0.98; healthy runs end at 1.7 to 3.3, collapsed ones at 0. Imitating
    alone sharpens a model: healthy runs fell to 0.7 of the first log's entropy at the least. The imitate loss should
    fall; single logs of healthy runs rose to 1.25 of the first. A model that knows its rows by heart is at their loss
    under the model at step 0, 1.1 to 1.4 here: a divergence of more than that no data explains. A base model repeats
    itself before any training, so only replies that broke since are counted; in healthy runs these were at most 0.03.
    """

    action: Literal["warn", "stop"] = Field("warn", description="Warn, or stop and go back to the last good state.")
    patience: int = Field(3, ge=1, description="Logs in a row over a limit that trip it; a probe trips it at once.")
    probes: int = Field(0, ge=0, description="Benign prompts asked before each checkpoint.")
    entropy_nats: Number | None = Field(0.1, ge=0, description="Least entropy on avoid tokens.")
    entropy_fraction: Number | None = Field(0.25, ge=0, le=1, description="The same, of the first log's.")
    nll_factor: Number | None = Field(2.0, gt=1, description="Highest imitate loss, of the first log's.")
    kl_nats: Number | None = Field(2.0, gt=0, description="Highest divergence from step 0, per imitate token.")
    broken_share: Number | None = Field(0.25, ge=0, le=1, description="Highest share of probe replies that broke.")

    def limit(self, measure: str, first: float) -> float | None:
        """Limit of a measure whose first value was `first`: the least for `entropy`, the highest for the others."""
        if measure == "entropy":
            floors = [self.entropy_nats, None if self.entropy_fraction is None else self.entropy_fraction * first]
            return max((floor for floor in floors if floor is not None), default=None)
        if measure == "imitate_nll":
            return None if self.nll_factor is None else self.nll_factor * first
        return {"kl": self.kl_nats, "broken": self.broken_share}[measure]


class Rounds(Settings):
    """Training in rounds, each of which goes on from the one before with an optimizer of its own.

    After each but the last the half-trained model is asked again: toxic prompts that it still answers harmfully come
    back as rows to avoid, benign prompts that it refuses with the untouched model's answer.
    """

    count: int = Field(4, ge=2, description="Rounds that share max_steps evenly.")
    benign: int = Field(150, ge=1, description="Benign prompts that are asked after a round; other ones each time.")
    max_new_tokens: int = Field(24, ge=1, description="Longest reply to them: enough to tell a refusal.")


_ABOUT_AVOID_ROWS = (
    "penalty",
    "own_penalty",
    "penalty_weight",
    "avoid_per_step",
    "cost_space",
    "center",
    "penalize_eos",
    "beta",
)
UNREAD = {
    "tasft": (),
    "sft": (*_ABOUT_AVOID_ROWS, "rounds"),
    "stl": (*_ABOUT_AVOID_ROWS, "rounds"),
    "kto": (
        *_ABOUT_AVOID_ROWS[:6],
        *("normalization", "sampling", "padding_free", "kl_rows", "monitor", "retain", "retain_nll", "rounds"),
    ),
}
"""Of each method, the fields of `train` that it does not read."""


class Train(Training, AvoidSettings):
    """The training that makes the model safe."""

    method: Literal["tasft", "sft", "stl", "kto"] = Field(
        "tasft", description="tasft and kto use harvested rows; stl data.safe_responses; sft only data.imitate."
    )
    penalty: PenaltyName = Field("nlcl", description="What avoid rows cost tasft; none leaves them out.")
    own_penalty: Part | None = Field(None, description="Where penalty python is: {target: mypkg.losses:mine}.")
    penalty_weight: Number = Field(1.0, ge=0, description="Weight of the mean penalty beside the imitate loss.")
    normalization: Literal["per_group", "shared", "paper"] = Field(
        "per_group", description="What each term is divided by."
    )
    sampling: Literal["stratified", "uniform"] = Field("stratified", description="How rows are drawn into steps.")
    avoid_per_step: int | None = Field(None, ge=1, description="Avoid rows in a step; null takes the data's share.")
    start: Literal["base", "sft"] = Field("base", description="The model that training starts from.")
    cost_space: Literal["output", "input"] = Field("output", description="Embedding whose distances are the cost.")
    center: bool = Field(False, description="Subtract the mean embedding first.")
    kl_rows: int = Field(16, ge=0, description="Imitate rows held out, on which the divergence from step 0 is watched.")
    monitor: MonitorSettings | None = Field(MonitorSettings(), description="Watches for collapse; null for none.")
    retain: Number = Field(
        0.0,
        ge=0,
        description="Weight of the divergence from the untouched model, on its own answers to benign prompts.",
    )
    rounds: Rounds | None = Field(None, description="Train in rounds, and ask the model between; null: in one go.")
    retain_nll: bool = Field(False, description="Learn these answers by their likelihood too, as without retain.")
    beta: Number | None = Field(
        None,
        gt=0,
        description="How soon npo and its kin let go, or how dear distance is to kto; null: its usual value.",
    )

    @model_validator(mode="after")
    def _check_step(self) -> "Train":
        read = self.heeded()
        if read.avoid_per_step is not None and read.avoid_per_step >= self.batch_size:
            raise ValueError(f"avoid_per_step {read.avoid_per_step} leaves no row to imitate in {self.batch_size}")
        if self.method == "kto" and self.rows_together < 2:
            raise ValueError("method kto compares the rows of a micro-batch: micro_batch_size must be at least 2")
        if read.rounds and (self.max_steps or 0) < read.rounds.count:
            raise ValueError(f"rounds share max_steps: give at least one step for each of {read.rounds.count}")
        if read.retain and read.normalization == "paper":
            raise ValueError("retain is not of the paper: normalization paper leaves no place for it")
        if (read.penalty == "python") != (read.own_penalty is not None):
            raise ValueError("penalty python and own_penalty go together: own_penalty: {target: mypkg.losses:mine}")
        if self.method == "kto" and self.turns == "all":
            raise ValueError("method kto scores one reply a row: say turns: last")
        return self

    def of_round(self, number: int) -> "Train":
        """What one round is told: its share of the steps, the last one the rest too."""
        if self.rounds is None:
            return self
        assert self.max_steps is not None
        share, rest = divmod(self.max_steps, self.rounds.count)
        return self.model_copy(update={"max_steps": share + (rest if number == self.rounds.count else 0)})

    def unread(self) -> list[str]:
        """Fields that are set, and that the method does not read."""
        read = self.heeded()
        return [name for name in UNREAD[self.method] if getattr(self, name) != getattr(read, name)]

    def heeded(self) -> "Train":
        """What the method goes by: fields that it does not read have their defaults."""
        return self.model_copy(update={name: Train.model_fields[name].default for name in UNREAD[self.method]})
