"""The trainer: a transformers Trainer with two kinds of rows, each divided by its own count."""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import IntervalStrategy

from tasft.core.errors import UserError
from tasft.core.provenance import require
from tasft.data.encode import EncodingReport, Row, encode_rows
from tasft.loss import (
    IGNORE_INDEX,
    TokenSum,
    avoid_statistics,
    divergence,
    nll,
    shift,
)
from tasft.models.generation import check_rows, fit_padding, looks_back
from tasft.models.head import learn_tail
from tasft.models.load import load_model, load_tokenizer
from tasft.train.arguments import refuse_unheeded
from tasft.train.collate import Batch, Layout, collate
from tasft.train.config import TASFTConfig
from tasft.train.lower import LowerLayers, lower_layers
from tasft.train.metrics import MetricsFile, peak_mib
from tasft.train.penalties import penalty_of
from tasft.train.sampler import FilledSampler, StratifiedSampler, UniformSampler
from tasft.train.start import (
    QUESTION,
    REFERENCE,
    KnowsItsStart,
    Rows,
    final_states,
    head_calls,
    model_inputs,
    readable,
    refuse_adapted_head,
)
from tasft.train.stream import RowStream

# Older ones divide the loss by the micro-batches although `loss_is_scaled_for_ga` tells them not to.
require("transformers")

_TERMS = ("imitate_nll", "penalty", "retain")


class TASFTTrainer(KnowsItsStart):
    """Fine-tunes on rows to imitate and moves away from rows to avoid.

    Rows are in TRL's unpaired preference format (`prompt`, `completion`, `label`; text or chat messages):
    `label` true is learned by its negative log-likelihood, false is penalised by `args.penalty`. Both come
    from one forward pass, whose output head never makes logits for all positions, and one backward pass.

    Rows to imitate that have `retain` are held where the model at step 0 was, by `args.retain`: the same model with its
    adapter off, at one more forward pass.

    Logged, in training and evaluation: `imitate_nll`, `penalty`, `retain` (nats per token); on avoid tokens `emd`,
    `entropy` (nats) and `top1` (largest probability); `kl` (nats per token), of this model from the model at step 0. In
    training also tokens of each kind, `tokens_per_s` and `peak_mib`. `emd`, `entropy`, `top1` and `kl` are those of the
    logged step, the others means since the last log. A beginning that is shared counts once in `tokens_per_s`.
    `eval_loss` is always the sum of the terms, each times its weight.

    Args:
        model: Causal language model, or the name of one.
        args: Settings. One process works on one device: start one for each with accelerate or torchrun.
        train_dataset: Rows: `Example`s, dictionaries, or a `datasets.Dataset`; or a stream of them without a length,
            which needs `max_steps`.
        eval_dataset: Rows for `evaluate`, or several sets of them by name. Rows that `evaluate` is given itself have no
            `kl`, and a penalty that looks at the model at step 0 takes them before training alone.
        processing_class: The tokenizer; by default the model's.
        peft_config: A LoRA configuration to put a fresh adapter on the model; None trains what requires a gradient.
        **kwargs: Passed on to transformers' Trainer.

    Attributes:
        encoding: What became of the training rows; None for a stream.

    Raises:
        UserError: An argument of transformers' that is not heeded, an unknown penalty, an adapter on the output head,
            `retain` without an adapter, rows that cannot be encoded (names all); in `train`, a step that is not finite.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 6 and 8; departs from it in `normalization`
    and `sampling`, whose values `paper` and `uniform` are theirs.
    """

    # The loss is divided by the counts of the whole optimizer step here, not by the host.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TASFTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, TASFTConfig):
            raise UserError(
                f"args is a {type(args).__name__}: give TASFTConfig, which takes the same fields and its own"
            )
        refuse_unheeded(args, kwargs)
        self.penalty = penalty_of(args.penalty, args.own_penalty)
        if args.log_term_gradients and args.world_size > 1:
            raise UserError("log_term_gradients looks at the gradients of one process: run it in one")
        tokenizer = processing_class or load_tokenizer(model if isinstance(model, str) else model.config.name_or_path)
        if isinstance(model, str):
            model = load_model(model)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        refuse_adapted_head(model)
        fit_padding(model, tokenizer)
        if args.retain:
            _refuse_to_retain(model, args)
        self.encoding: EncodingReport | None = None
        rows, self.encoding = self._encode(train_dataset, tokenizer, args)
        named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        sets = {name: self._encode(dataset, tokenizer, args)[0] for name, dataset in named.items()}
        evaluated = sets if isinstance(eval_dataset, dict) else sets[""]
        for encoded in (rows, *sets.values()):
            if isinstance(encoded, list):
                check_rows(model, tokenizer, [row["input_ids"] for row in encoded], "max_length")
        if args.n_gpu > 1:
            args._n_gpu = 1  # transformers would copy the model to all of them, and the copies share what is counted.
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=evaluated,
            processing_class=tokenizer,
            data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
            **kwargs,
        )
        # Of a stream, too, each rank takes its own rows; one rank can only hand out batches of one length.
        self.accelerator.dataloader_config.dispatch_batches = False
        # Where weights are sharded a layer that is left out would not be gathered; NEFTune adds noise in one pass only.
        alike = args.retain and not self._shards() and not args.neftune_noise_alpha
        self._lower = lower_layers(self.accelerator.unwrap_model(self.model)) if alike else LowerLayers([])
        self._terms: dict[str, TokenSum] = {}
        self._window: dict[str, Tensor] = {}
        self._term_gradients: dict[str, list[Tensor]] = {}
        self._since = time.monotonic()
        self._evaluated: str | None = None
        with self._whole_model(), self.model.disable_adapter() if args.untouched else nullcontext():
            question = tokenizer(QUESTION).input_ids
            self._tail = learn_tail(self.accelerator.unwrap_model(self.model), question)
            if args.padding_free:
                pad, layout = tokenizer.pad_token_id, self._layout(question)
                self.data_collator = partial(collate, pad_token_id=pad, layout=layout)
            if self.penalty is not None:
                self._space()  # now: a head that is trained will be another once a checkpoint is loaded
            for encoded in (rows, *sets.values()):
                self._add_reference(encoded)
            self._starts = {name: self._remember_start(encoded) for name, encoded in sets.items()}
        self.add_callback(MetricsFile(Path(args.output_dir) / "metrics.jsonl"))

    def _encode(
        self, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: TASFTConfig
    ) -> tuple[Any, EncodingReport | None]:
        """Rows to train or evaluate on, without those to avoid if there is no penalty, and what became of them."""
        if dataset is None or _is_encoded(dataset):
            return dataset, None
        encoding = args.encoding()
        if not hasattr(dataset, "__len__"):
            if self.penalty is not None and self.penalty.needs & REFERENCE:
                raise UserError(
                    f"penalty {args.penalty} looks at every row at step 0, which a stream does not allow: take another "
                    "penalty, or a data set with a length"
                )
            return RowStream(dataset, tokenizer, encoding, self.penalty is not None), None
        rows, report = encode_rows(dataset, tokenizer, encoding)
        if not args.retain:
            for row in rows:
                row.pop("retain", None)
        return [row for row in rows if self.penalty is not None or not row["avoid"]], report

    def _layout(self, question: Sequence[int]) -> Layout:
        """How the rows of a micro-batch lie without padding, if the model keeps them apart."""
        whole = self.accelerator.unwrap_model(self.model)
        # Rows of a stream are looked at in batches, where they must be whole.
        share = isinstance(self.train_dataset, list) and self.args.max_length <= looks_back(whole)
        layout = readable(whole, question, share)
        if layout == "padded" and self.args.process_index == 0:
            print("the model does not keep rows apart that are laid end to end: they are padded", file=sys.stderr)
        return layout

    # --- One step ----------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, list):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.sampling == "uniform":
            return UniformSampler(len(rows), seed)
        avoid = [row["avoid"] for row in rows]
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        share = sum(avoid) / len(avoid)
        per_step = self.args.avoid_per_step or max(1, round(share * step_size))
        lengths = [len(row["input_ids"]) for row in rows]
        return StratifiedSampler(avoid, lengths, step_size, per_step, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As transformers'; other rows than those of the trainer are encoded as they were."""
        if isinstance(eval_dataset, str) or eval_dataset is None or eval_dataset is self.eval_dataset:
            self._evaluated = eval_dataset if isinstance(eval_dataset, str) else ""
            return super().get_eval_dataloader(eval_dataset)
        # transformers' own would give the loader of the trainer's rows where workers persist.
        return self.get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As transformers'; rows are encoded as those of the trainer were."""
        self._evaluated = None
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        rows, report = self._encode(test_dataset, self.processing_class, self.args)
        if report is not None and self.penalty is not None and self.penalty.needs & REFERENCE:
            if self.state.global_step:
                raise UserError(
                    f"penalty {self.args.penalty} compares each row with the model at step 0, which is not there any "
                    "more: give these rows to the trainer as its eval_dataset"
                )
            self._add_reference(rows)
        return super().get_test_dataloader(rows)

    def _set_signature_columns_if_needed(self) -> None:
        # Rows are token lists of our own making: those are the columns that are used, not the model's arguments.
        self._signature_columns = ["input_ids", "labels", "avoid", "weight", "retain", *sorted(REFERENCE)]

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, **kwargs: Any
    ) -> DataLoader[Any]:
        """As transformers'; rows in which nothing counts come last where ranks would get unlike numbers of rows.

        accelerate would give some rows again, which would count twice.
        """
        if self.args.world_size > 1 and isinstance(dataset, list) and dataset:
            order = (sampler_fn and sampler_fn(dataset)) or SequentialSampler(dataset)
            filled = FilledSampler(order, batch_size * self.args.world_size, len(dataset))
            dataset, sampler_fn = _Filled(dataset, filled), lambda _: filled
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        """`_counts` of the whole optimizer step, and its micro-batches."""
        if not batch_samples:
            return None
        if isinstance(self.train_dataset, RowStream):
            for batch in batch_samples:
                ids, rows = batch["input_ids"], batch["segments"]
                read = [ids[rows == row].tolist() for row in torch.unique(rows[rows >= 0])]
                check_rows(self.model, self.processing_class, read, "max_length")
        counts = torch.stack([self._counts(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        # Per rank: the `paper` mode averages over its own micro-batches.
        return torch.cat([counts, counts.new_tensor([len(batch_samples)])])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The terms of one micro-batch, divided by the counts of the optimizer step."""
        watch = not model.training or self._will_log()
        before = self._before(model, inputs) if self.args.retain else None

        def losses(hidden: Tensor) -> Tensor:
            self._terms = self._losses(hidden.flatten(0, 1), before, inputs, watch)
            return torch.stack([self._terms[name].total for name in _TERMS if name in self._terms])

        with head_calls(self.accelerator.unwrap_model(model), losses), self._lower.skipping():
            outputs = model(**model_inputs(inputs))
        here = self._counts(inputs)
        step = torch.cat([here, here.new_tensor([1])]) if num_items_in_batch is None else num_items_in_batch
        parts = self._divide(self._terms, step.to(here.device), here)
        if watch and self.args.log_term_gradients and model.training:
            self._add_term_gradients(model, parts)
        self._remember(inputs, here)
        # Backward must pass through the model's output first: there ZeRO-3 gathers the head's weights again.
        loss = sum(parts.values()) + outputs.logits[:0].sum()
        return (loss, outputs) if return_outputs else loss

    def _will_log(self) -> bool:
        """Whether the step at hand ends with a log."""
        step = self.state.global_step + 1
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return self.args.logging_strategy == IntervalStrategy.EPOCH
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def _before(self, model: nn.Module, batch: Batch) -> Float[Tensor, "N D"]:
        """Final hidden states of the model at step 0: this one without its adapter."""
        whole = self.accelerator.unwrap_model(model)
        with whole.disable_adapter():
            return self._lower.before(lambda: final_states(model, whole, batch))

    def _kinds(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each position whether it belongs to a row to imitate, to avoid, to retain."""
        avoid = batch["avoid"]
        retain = batch["retain"] if "retain" in batch else torch.zeros_like(avoid)
        return ~avoid & (~retain | self.args.retain_nll), avoid, retain

    def _losses(
        self, hidden: Float[Tensor, "N D"], before: Float[Tensor, "N D"] | None, batch: Batch, watch: bool
    ) -> dict[str, TokenSum]:
        """Sums over the micro-batch: `imitate_nll`, `retain`, `penalty`, and what is watched on avoid tokens."""
        head, labels = self._head(), shift(batch["labels"]).flatten()
        flat = {name: values.flatten() for name, values in batch.items()}
        imitate_labels, avoid_labels, retain_labels = (
            labels.masked_fill(~kind, IGNORE_INDEX) for kind in self._kinds(flat)
        )
        terms = {"imitate_nll": nll(hidden, head, imitate_labels, weights=flat.get("weight"))}
        if before is not None:
            then, weights = before[retain_labels != IGNORE_INDEX], flat.get("weight")
            terms["retain"] = divergence(hidden, head, retain_labels, before=then, head_before=head, weights=weights)
        if self.penalty is None:
            return terms
        offered = flat | {"space": self._space(), "beta": self.args.beta or self.penalty.beta}
        needed = {name: offered[name] for name in self.penalty.needs}
        terms["penalty"] = self.penalty.fn(hidden, head, avoid_labels, weights=flat.get("weight"), **needed)
        if watch:
            terms |= avoid_statistics(hidden.detach(), head, avoid_labels, space=self._space())._asdict()
        return terms

    def _weights(self) -> dict[str, float]:
        # Looked up each time: the monitor may lower that of the penalty.
        return {"imitate_nll": 1.0, "penalty": self.args.penalty_weight, "retain": self.args.retain}

    def _divide(self, terms: dict[str, TokenSum], step: Tensor, here: Tensor) -> dict[str, Tensor]:
        """The terms of the loss. `step` and `here` are `_counts`, `step` with the number of micro-batches."""
        weights = self._weights()
        parts = {name: weights[name] * terms[name].total for name in _TERMS if name in terms}
        if self.args.normalization == "paper":
            responses = {"imitate_nll": here[3], "penalty": here[2]}
            return {name: part / _present(responses[name]) / step[-1] for name, part in parts.items()}
        # Gradients are averaged over ranks; the counts are already those of all ranks.
        per_response = self.penalty is not None and self.penalty.per == "response"
        counts = {"imitate_nll": step[0], "penalty": step[2] if per_response else step[1], "retain": step[4]}
        if self.args.normalization == "shared":
            counts = dict.fromkeys(counts, step[5])
        return {name: self.args.world_size * part / _present(counts[name]) for name, part in parts.items()}

    def _counts(self, batch: Batch) -> Float[Tensor, "6"]:
        """Imitate tokens, avoid tokens, avoid responses, imitate responses, retained tokens and all of these tokens.

        Or the sums of their weights.
        """
        counts = shift(batch["labels"]) != IGNORE_INDEX
        imitate, avoid, retain = self._kinds(batch)
        weight = batch["weight"] if "weight" in batch else torch.ones_like(counts, dtype=torch.float32)
        # A response counts once, at the first of its tokens. Segments rise along the batch.
        begun = batch["segments"].masked_fill(~counts, -1).flatten().cummax(0).values
        first = (begun != F.pad(begun[:-1], (1, 0), value=-1)).view_as(counts)
        kinds = (counts & imitate, counts & avoid, first & avoid, first & imitate, counts & retain, counts)
        return torch.stack([(weight * kind).sum() for kind in kinds])

    # --- What is seen of it --------------------------------------------------------------------

    def _remember(self, batch: Batch, here: Tensor) -> None:
        counts = {"tokens": (batch["segments"] >= 0).sum(), "imitate_tokens": here[0], "avoid_tokens": here[1]}
        one = torch.ones_like(here[0])
        for name, (total, count) in (self._terms | {name: TokenSum(n, one) for name, n in counts.items()}).items():
            sums = torch.stack([total.detach().to(torch.float32), count.to(torch.float32)])
            self._window[name] = self._window[name] + sums if name in self._window else sums

    def _window_sums(self) -> dict[str, list[float]]:
        """Total and count of each name since the last time, over all ranks."""
        names = sorted(self._window)
        sums = torch.stack([self._window[name] for name in names])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        self._window = {}
        return dict(zip(names, sums.tolist(), strict=True))

    def _add_term_gradients(self, model: nn.Module, terms: dict[str, Tensor]) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, term in terms.items():
            if not term.requires_grad:
                continue
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
            have = self._term_gradients.get(name)
            self._term_gradients[name] = (
                list(gradients) if have is None else [a + b for a, b in zip(have, gradients, strict=True)]
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was seen since the last log."""
        if "loss" in logs and self._window:
            sums = self._window_sums()
            now = time.monotonic()
            tokens = {name: sums.pop(name)[0] for name in ("tokens", "imitate_tokens", "avoid_tokens")}
            logs |= {name: total / count for name, (total, count) in sums.items() if count}
            logs |= {"tokens_per_s": tokens.pop("tokens") / (now - self._since), **tokens, "peak_mib": peak_mib()}
            for name, gradients in self._term_gradients.items():
                logs[f"{name}_grad_norm"] = float(nn.utils.get_total_norm(gradients))
            if (kl := self._divergence()) is not None:
                logs["kl"] = kl
            self._term_gradients, self._since = {}, time.monotonic()
        super().log(logs, start_time)

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        """The loss of a batch; what was said of `log` holds for evaluation as a whole."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers'; each term is a mean over all rows to evaluate on, not over batches."""
        kept, self._window = self._window, {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, self._window = self._window_sums(), kept
        means = {name: total / count for name, (total, count) in sums.items() if count and "tokens" not in name}
        watched = () if self._evaluated is None else (self._evaluated,)
        if (kl := self._divergence(watched)) is not None:
            means["kl"] = kl
        weights = self._weights()
        means["loss"] = sum(weight * means.get(name, 0.0) for name, weight in weights.items())
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `Trainer.train`."""
        self._since = time.monotonic()
        return super().train(*args, **kwargs)


class _Filled(list[Row]):
    """Rows, and one in which nothing counts."""

    def __init__(self, rows: Rows, order: FilledSampler) -> None:
        empty = {"input_ids": [0], "labels": [IGNORE_INDEX], "avoid": False, "margins": [0.0], "reference": [0.0]}
        super().__init__([*rows, {name: (empty | {"weight": 1.0, "retain": False})[name] for name in rows[0]}])
        self.order = order

    def set_epoch(self, epoch: int) -> None:
        """Passed on: when a run is taken up, accelerate does not find the sampler below its own."""
        self.order.set_epoch(epoch)


def _is_encoded(dataset: Any) -> bool:
    """Whether these are rows that a trainer has encoded already."""
    return isinstance(dataset, RowStream) or (
        isinstance(dataset, list)
        and bool(dataset)
        and isinstance(dataset[0], dict)
        and {"input_ids", "labels", "avoid"} <= dataset[0].keys()
    )


def _present(count: Tensor) -> Tensor:
    """What a sum is divided by: an absent kind is 0 / 1. Weights can add up to less than 1."""
    return torch.where(count > 0, count, 1.0)


def _refuse_to_retain(model: Any, args: TASFTConfig) -> None:
    if not isinstance(model, PeftModel):
        raise UserError("retain compares with the model without its adapter: train one, as model.lora does")
    if model.get_output_embeddings().weight.requires_grad:
        raise UserError("retain keeps to the output head that is there: leave it out of what is trained")
    if args.normalization == "paper":
        raise UserError("retain is not of the paper: normalization paper leaves no place for it; use per_group")
