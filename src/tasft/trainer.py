"""The trainer: a transformers Trainer with two kinds of rows, each divided by its own count."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tasft.data import Example
from tasft.encode import PromptFormat, collate, encode
from tasft.errors import UserError
from tasft.loss import (
    IGNORE_INDEX,
    PENALTIES,
    CostSpace,
    Head,
    TokenSum,
    avoid_statistics,
    log_probability,
    margins,
    nll,
    shift,
)
from tasft.model import load_model, load_tokenizer
from tasft.provenance import atomic_write_text

Rows = list[dict[str, Any]]


@dataclass
class TASFTConfig(TrainingArguments):
    """transformers' `TrainingArguments` and what TA-SFT adds.

    Attributes:
        penalty: A name in `tasft.loss.PENALTIES`, or `none`: avoid rows are left out.
        penalty_weight: lambda, the weight of the mean penalty beside the mean imitate loss.
        normalization: What each sum is divided by over one optimizer step, all micro-batches and ranks.
            `per_group`: imitate tokens and avoid tokens (responses for `nlcl`), each by its own count;
            `shared`: both by the count of all tokens, so the penalty shrinks with the avoid share;
            `paper`: per micro-batch, sums over tokens by the responses of that kind.
        sampling: `stratified` puts `avoid_per_step` avoid rows into each optimizer step; `uniform` shuffles all.
        avoid_per_step: Avoid rows in an optimizer step; None takes the share that the data has, at least 1.
        cost_space: Whose rows are the token embeddings of the Earth Mover Distance: `output` head or `input`.
        center: Whether the mean embedding is subtracted first.
        beta: How soon `npo` lets go of a response.
        prompt_format: How prompts are written: the tokenizer's `chat` template, or `alpaca`.
        max_length: Longest row in tokens; what is over is cut from the end.
    """

    penalty: str = "emd_exact"
    penalty_weight: float = 1.0
    normalization: Literal["per_group", "shared", "paper"] = "per_group"
    sampling: Literal["stratified", "uniform"] = "stratified"
    avoid_per_step: int | None = None
    cost_space: Literal["output", "input"] = "output"
    center: bool = False
    beta: float = 0.1
    prompt_format: PromptFormat = "chat"
    max_length: int = 1024
    # Rows are token lists of our own making: transformers must not look for the model's argument names.
    remove_unused_columns: bool = field(default=False, init=False)


class StratifiedSampler(Sampler[int]):
    """Row order in which each step of `step_size` rows holds `avoid_per_step` avoid rows.

    An epoch is one pass over the imitate rows; its last step may be smaller. Avoid rows are drawn without
    replacement and shuffled anew when used up, across epochs. The order is a function of seed and epoch alone.

    Args:
        avoid: For each row whether it is to be avoided.
        step_size: Rows in an optimizer step, all micro-batches and ranks.
        avoid_per_step: Of these, rows to avoid.
        seed: Of both orders.

    Raises:
        UserError: A step would hold no imitate row.
    """

    def __init__(self, avoid: Sequence[bool], step_size: int, avoid_per_step: int, seed: int) -> None:
        self.imitate_rows = [index for index, is_avoid in enumerate(avoid) if not is_avoid]
        self.avoid_rows = [index for index, is_avoid in enumerate(avoid) if is_avoid]
        self.avoid_per_step = avoid_per_step if self.avoid_rows else 0
        self.imitate_per_step = step_size - self.avoid_per_step
        self.seed = seed
        self.epoch = 0
        if self.imitate_per_step < 1 or not self.imitate_rows:
            raise UserError(
                f"a step of {step_size} rows with {self.avoid_per_step} to avoid and a data set with "
                f"{len(self.imitate_rows)} rows to imitate leaves nothing to imitate: raise train.batch_size, "
                "lower train.avoid_per_step or add rows"
            )
        self.steps = -(-len(self.imitate_rows) // self.imitate_per_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; the Trainer calls it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.imitate_rows) + self.steps * self.avoid_per_step

    def _shuffled(self, rows: list[int], kind: int, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 2 + kind) * 1_000_003 + turn)
        return [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]

    def _avoid_from(self, position: int) -> Iterator[int]:
        while True:
            turn, offset = divmod(position, len(self.avoid_rows))
            yield from self._shuffled(self.avoid_rows, 1, turn)[offset:]
            position += len(self.avoid_rows) - offset

    def __iter__(self) -> Iterator[int]:
        imitate = self._shuffled(self.imitate_rows, 0, self.epoch)
        avoid = self._avoid_from(self.epoch * self.steps * self.avoid_per_step) if self.avoid_per_step else iter(())
        for step in range(self.steps):
            yield from imitate[step * self.imitate_per_step : (step + 1) * self.imitate_per_step]
            yield from (next(avoid) for _ in range(self.avoid_per_step))


class MetricsFile(TrainerCallback):
    """Keeps `metrics.jsonl`: one row for each logging step, none twice after a resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop rows of steps that will be run again."""
        if state.is_world_process_zero:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            # A row is one write, so only the last line can be torn.
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state.global_step]
            atomic_write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append a row."""
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


@contextmanager
def _head_calls(model: Any, function: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, the output head hands its hidden states (B, T, D) to `function` instead of making logits.

    The function runs inside the model's own forward, where sharded weights are gathered and hooks fire.
    """
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        function(hidden)
        # What the model does to its logits afterwards must still work.
        return hidden[..., :1]

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


class TASFTTrainer(Trainer):
    """Fine-tunes on rows to imitate and moves away from rows to avoid.

    Rows are in TRL's unpaired preference format (`prompt`, `completion`, `label`; text or chat messages):
    `label` true is learned by its negative log-likelihood, false is penalised by `args.penalty`. Both come
    from one forward pass, whose output head never makes logits for all positions, and one backward pass.

    Args:
        model: Causal language model, or the name of one.
        args: Settings.
        train_dataset: Rows: `Example`s, dictionaries, or a `datasets.Dataset`.
        eval_dataset: The same, for `evaluate`.
        processing_class: The tokenizer; by default the model's.
        peft_config: A LoRA configuration to put a fresh adapter on the model; None trains what requires a gradient.
        **kwargs: Passed on to transformers' Trainer.

    Raises:
        UserError: An unknown penalty, an adapter on the output head, or rows that cannot be encoded (names all).

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 6 and 8; departs from it in `normalization`
    and `sampling`, whose values `paper` and `uniform` are theirs.
    """

    # The loss is divided by the counts of the whole optimizer step here, not by the host.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TASFTConfig,
        train_dataset: Sequence[Example | dict[str, Any]],
        eval_dataset: Sequence[Example | dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args.penalty not in ("none", *PENALTIES):
            raise UserError(f"penalty is {args.penalty!r}; use none or one of {', '.join(PENALTIES)}")
        tokenizer = processing_class or load_tokenizer(model if isinstance(model, str) else model.config.name_or_path)
        if isinstance(model, str):
            model = load_model(model)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise UserError(
                "the adapter is on the output head, which the losses read directly: leave the head out of its "
                "target_modules, or train in full"
            )
        self.penalty = PENALTIES.get(args.penalty)
        self.space = _cost_space(model, args.cost_space, args.center)
        self._terms: dict[str, TokenSum] = {}
        self._logged: dict[str, list[float]] = {}
        self._tokens, self._since = 0, time.monotonic()
        rows = _encode_all(train_dataset, tokenizer, args)
        if self.penalty is None:
            rows = [row for row in rows if not row["avoid"]]
        evaluated = None if eval_dataset is None else _encode_all(eval_dataset, tokenizer, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=evaluated,
            processing_class=tokenizer,
            data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
            **kwargs,
        )
        self._add_reference(rows)
        self._add_reference(evaluated or [])
        self.add_callback(MetricsFile(Path(args.output_dir) / "metrics.jsonl"))

    def _head(self) -> Head:
        return _head_of(self.accelerator.unwrap_model(self.model))

    @torch.no_grad()
    def _add_reference(self, rows: Rows) -> None:
        """What the penalty needs of the reference for each avoid row, from the model as it is now, at step 0."""
        measures: dict[str, Callable[..., Tensor]] = {
            "margins": partial(margins, space=self.space),
            "reference": log_probability,
        }
        needed = [] if self.penalty is None else sorted(self.penalty.needs & measures.keys())
        model = self.model
        training = model.training
        model.eval()
        for row in rows if needed else []:
            row.update({name: [0.0] * len(row["input_ids"]) for name in needed})
            if not row["avoid"]:
                continue

            def keep(hidden: Tensor, row: dict[str, Any] = row) -> None:
                labels = shift(torch.tensor([row["labels"]], device=hidden.device))
                for name in needed:
                    row[name] = measures[name](hidden[0], self._head(), labels[0]).float().tolist()

            ids = torch.tensor([row["input_ids"]], device=model.device)
            with _head_calls(model, keep):
                model(input_ids=ids)
        model.train(training)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        avoid = [row["avoid"] for row in rows]
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if self.args.sampling == "uniform":
            return super()._get_train_sampler(train_dataset)
        share = sum(avoid) / len(avoid)
        per_step = self.args.avoid_per_step or max(1, round(share * step_size))
        return StratifiedSampler(avoid, step_size, per_step, self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """Imitate tokens, avoid tokens and avoid responses of the whole optimizer step, and its micro-batches."""
        if not batch_samples:
            return None
        counts = torch.stack([_counts(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        # Per rank: the `paper` mode averages over its own micro-batches.
        return torch.cat([counts, counts.new_tensor([len(batch_samples)])])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The two terms of one micro-batch, divided by the counts of the optimizer step."""
        labels, avoid = shift(inputs["labels"]), inputs["avoid"]

        def losses(hidden: Tensor) -> None:
            self._terms = self._losses(hidden, labels, avoid, inputs)

        with _head_calls(self.accelerator.unwrap_model(model), losses):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        if num_items_in_batch is None:
            num_items_in_batch = torch.cat([_counts(inputs), labels.new_tensor([1])])
        loss = self._combine(self._terms, num_items_in_batch.to(labels.device), _counts(inputs))
        if model.training:
            self._remember(inputs)
        return (loss, outputs) if return_outputs else loss

    def _losses(self, hidden: Tensor, labels: Tensor, avoid: Tensor, inputs: dict[str, Tensor]) -> dict[str, TokenSum]:
        """Sums over the micro-batch: `imitate_nll`, `penalty`, and `emd`, `entropy` and `top1` on avoid tokens."""
        head = self._head()
        imitate_labels, avoid_labels = labels[~avoid].flatten(), labels[avoid].flatten()
        terms = {"imitate_nll": nll(hidden[~avoid].flatten(0, 1), head, imitate_labels)}
        if self.penalty is None:
            return terms
        at_avoid = hidden[avoid].flatten(0, 1)
        offered: dict[str, Any] = {"space": self.space, "beta": self.args.beta}
        offered |= {name: inputs[name][avoid].flatten() for name in ("margins", "reference") if name in inputs}
        rows = torch.arange(int(avoid.sum()), device=labels.device)
        offered["segments"] = rows.repeat_interleave(labels.shape[1])
        needed = {name: offered[name] for name in self.penalty.needs}
        terms["penalty"] = self.penalty.fn(at_avoid, head, avoid_labels, **needed)
        statistics = avoid_statistics(at_avoid.detach(), head, avoid_labels, space=self.space)
        return terms | statistics._asdict()

    def _combine(self, terms: dict[str, TokenSum], step: Tensor, here: Tensor) -> Tensor:
        """One scalar. `step` and `here` count (imitate tokens, avoid tokens, avoid responses[, micro-batches])."""
        imitate = terms["imitate_nll"].total
        penalty = terms["penalty"].total if "penalty" in terms else imitate.new_zeros(())
        weight, mode = self.args.penalty_weight, self.args.normalization
        per_response = self.penalty is not None and self.penalty.per == "response"
        if mode == "paper":
            imitate_rows = here[3].clamp(min=1)
            return (imitate / imitate_rows + weight * penalty / here[2].clamp(min=1)) / step[-1]
        # Gradients are averaged over ranks; the counts are already those of all ranks.
        ranks = self.args.world_size
        if mode == "shared":
            return ranks * (imitate + weight * penalty) / (step[0] + step[1]).clamp(min=1)
        avoid_count = step[2] if per_response else step[1]
        return ranks * (imitate / step[0].clamp(min=1) + weight * penalty / avoid_count.clamp(min=1))

    def _remember(self, inputs: dict[str, Tensor]) -> None:
        for name, (total, count) in self._terms.items():
            have = self._logged.setdefault(name, [0.0, 0.0])
            have[0] += float(total.detach())
            have[1] += float(count)
        self._tokens += int(inputs["attention_mask"].sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of both terms since the last log, and tokens of prompt and reply per second."""
        if "loss" in logs:
            logs |= {name: total / count for name, (total, count) in self._logged.items() if count}
            now = time.monotonic()
            logs["tokens_per_s"] = self._tokens / (now - self._since)
            self._logged, self._tokens, self._since = {}, 0, now
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `Trainer.train`."""
        self._since = time.monotonic()
        return super().train(*args, **kwargs)


def _counts(batch: dict[str, Tensor]) -> Tensor:
    """Imitate tokens, avoid tokens, avoid responses and imitate responses of a batch, (4,)."""
    counted = (shift(batch["labels"]) != IGNORE_INDEX).sum(-1)
    avoid = batch["avoid"]
    kinds = [counted[~avoid], counted[avoid]]
    return torch.stack([kinds[0].sum(), kinds[1].sum(), (kinds[1] > 0).sum(), (kinds[0] > 0).sum()])


def _head_of(model: Any) -> Head:
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))


def _cost_space(model: Any, which: str, center: bool) -> CostSpace:
    module = model.get_output_embeddings() if which == "output" else model.get_input_embeddings()
    weight = module.weight
    # A frozen matrix is used in place; one that will be trained is kept as it was before training.
    return CostSpace.of(weight.detach().clone() if weight.requires_grad else weight, center=center)


def _encode_all(
    dataset: Sequence[Example | dict[str, Any]], tokenizer: PreTrainedTokenizerBase, args: TASFTConfig
) -> Rows:
    rows, faults = [], []
    for index in range(len(dataset)):
        row = dataset[index]
        if isinstance(row, dict):
            row = Example(**{"id": f"{index}", **{key: row[key] for key in row.keys() & Example.__annotations__}})
        try:
            encoded = encode(tokenizer, row, args.prompt_format, args.max_length)
        except UserError as error:
            faults += error.faults
            continue
        rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels, "avoid": encoded.avoid})
    if faults:
        raise UserError(faults)
    return rows
