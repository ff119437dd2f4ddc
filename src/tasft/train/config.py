"""The settings of the trainer: transformers' and what TA-SFT adds."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import TrainingArguments

from tasft.core.settings import check_settings, setting
from tasft.data.encode import Encoding
from tasft.data.settings import Duplicates, Overlong, PromptFormat, PromptSettings, Turns
from tasft.train.settings import Train


@dataclass
class TASFTConfig(TrainingArguments):
    """transformers' `TrainingArguments` and what TA-SFT adds; defaults are those of a recipe's `train`.

    Attributes:
        penalty: A name in `tasft.loss.PENALTIES`; `python`: `own_penalty`; or `none`: avoid rows are left out.
        own_penalty: A penalty of one's own, `{"target": "mypkg.losses:mine"}`, see `tasft.train.penalties.penalty_of`.
        penalty_weight: lambda, the weight of the mean penalty beside the mean imitate loss.
        normalization: What each sum is divided by over one optimizer step, all micro-batches and ranks.
            `per_group`: imitate tokens and avoid tokens (responses for `nlcl`), each by its own count;
            `shared`: both by the count of all tokens, so the penalty shrinks with the avoid share;
            `paper`: per micro-batch, sums over tokens by the responses of that kind.
        sampling: `stratified` puts `avoid_per_step` avoid rows into each optimizer step; `uniform` shuffles all.
        avoid_per_step: Avoid rows in an optimizer step; None takes the share that the data has, at least 1.
        cost_space: Whose rows are the token embeddings of the Earth Mover Distance: `output` head or `input`.
        center: Whether the mean embedding is subtracted first.
        beta: How soon `npo`, `npo_mean` and `simnpo` let go of a response; None takes the usual value of each.
        retain: Weight of the mean divergence from the model at step 0 on the tokens of rows with `retain`; 0 for none.
        retain_nll: Whether rows that are retained are learned by their likelihood too.
        padding_free: Whether the rows of a micro-batch are laid end to end instead of padded: fastest with flash
            attention. With torch's own attention (`sdpa`) what all rows begin with, such as a system prompt, is
            computed once where that saves 64 tokens; not in a stream, nor where `max_length` is beyond a sliding
            window. A model that does not keep such rows apart is found out, and its rows are padded.
        kl_rows: Imitate rows of the evaluation set on which the divergence from step 0 is watched; 0 for none.
        log_term_gradients: Whether the gradient norm of each term is logged too, at a backward pass each per log.
        untouched: Whether penalties and `kl` compare with the model without its adapter, not with the one at step 0.
        prompt_format: How prompts are written: the tokenizer's `chat` template, or `alpaca`.
        max_length: This and the next are as in `tasft.data.encode.Encoding`: longest row in tokens.
        turns: The assistant turns that are learned or avoided: the `last`, or `all`.
        penalize_eos: Whether the end token of an avoid row is penalised too, as the paper reads.
        overlong: What becomes of longer rows: `truncate`, `drop` or `error`.
        duplicates: What becomes of rows that are there already: `keep`, `drop` or `error`.
        chat_template_kwargs: Given to the chat template, such as `{"enable_thinking": False}`.
    """

    penalty: str = setting(Train, "penalty")
    own_penalty: dict[str, Any] | None = setting(Train, "own_penalty")
    penalty_weight: float = setting(Train, "penalty_weight")
    normalization: Literal["per_group", "shared", "paper"] = setting(Train, "normalization")
    sampling: Literal["stratified", "uniform"] = setting(Train, "sampling")
    avoid_per_step: int | None = setting(Train, "avoid_per_step")
    cost_space: Literal["output", "input"] = setting(Train, "cost_space")
    center: bool = setting(Train, "center")
    beta: float | None = setting(Train, "beta")
    retain: float = setting(Train, "retain")
    retain_nll: bool = setting(Train, "retain_nll")
    padding_free: bool = setting(Train, "padding_free")
    kl_rows: int = setting(Train, "kl_rows")
    log_term_gradients: bool = False
    untouched: bool = False
    prompt_format: PromptFormat = setting(PromptSettings, "prompt")
    max_length: int = setting(Train, "max_length")
    turns: Turns = setting(Train, "turns")
    penalize_eos: bool = setting(Train, "penalize_eos")
    overlong: Overlong = setting(Train, "overlong")
    duplicates: Duplicates = setting(Train, "duplicates")
    chat_template_kwargs: dict[str, Any] | None = setting(PromptSettings, "chat_template_kwargs")

    def __post_init__(self) -> None:
        """Refuse what a recipe would refuse."""
        check_settings(Train, {name: getattr(self, name) for name in sorted(OWN & Train.model_fields.keys())})
        super().__post_init__()

    def encoding(self) -> Encoding:
        """How rows become tokens."""
        return Encoding(
            self.prompt_format,
            self.max_length,
            self.turns,
            self.penalize_eos,
            self.overlong,
            self.duplicates,
            self.chat_template_kwargs or {},
        )


OWN = {field.name for field in fields(TASFTConfig)} - {field.name for field in fields(TrainingArguments)}
"""Fields of `TASFTConfig` that transformers does not have."""
