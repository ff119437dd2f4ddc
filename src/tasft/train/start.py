"""What a model in training is made of, and what it was at step 0, which penalties and the divergence look back to."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor

from tasft.core.errors import UserError
from tasft.data.encode import Row
from tasft.loss import IGNORE_INDEX, CostSpace, Head, Penalty, TokenSum, divergence, log_probability, margins, shift
from tasft.models.generation import context_of
from tasft.models.head import Tail, replaced_head
from tasft.train.collate import WORTH, Batch, Layout, collate
from tasft.train.config import TASFTConfig
from tasft.train.finite import FiniteSteps

Rows = list[Row]

QUESTION = "What is a compost heap?"
"""What a model is asked to see how its logits are made from its output head."""

REFERENCE = frozenset({"margins", "reference"})
"""What penalties need of the model at step 0, one number for each token."""


def head_calls(model: Any, function: Callable[[Tensor], Tensor | None]) -> AbstractContextManager[None]:
    """Within, the output head hands its hidden states (B, T, D) to `function` instead of making logits.

    What the function returns adds nothing to the model's output, but the output comes to depend on it: DDP takes for
    unused what the output does not depend on.
    """

    def forward(hidden: Tensor) -> Tensor:
        sums = function(hidden)
        # What the model does to its logits afterwards must still work.
        logits = hidden[..., :1]
        return logits if sums is None else logits + sums[:0].sum()

    return replaced_head(model, forward)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Of a batch, what the model is called with."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: batch[name] for name in names if name in batch} | {"use_cache": False}


@torch.no_grad()
def final_states(model: Any, whole: Any, batch: Batch) -> Tensor:
    """Final hidden states (N, D) of all positions of a batch, the model being in evaluation mode.

    Args:
        model: As the trainer calls it, perhaps wrapped.
        whole: The same, not wrapped.
        batch: What it is called with, among others.
    """
    kept: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        with head_calls(whole, kept.append):
            model(**model_inputs(batch))
    finally:
        model.train(training)
    return kept[0].flatten(0, 1)


def readable(model: Any, ids: Sequence[int], share: bool) -> Layout:
    """The layout that saves most, of those in which rows have the final states that they have side by side.

    Models with states instead of attention read across rows, and some take no mask. It is tried on two rows.

    Args:
        model: Not wrapped.
        ids: Tokens to try it with, more than one.
        share: Whether `shared` will do.
    """
    begin = [*ids] * -(-WORTH // len(ids))
    # Other attention takes a mask for something else, or reads beyond what it has on a GPU.
    takes_masks = getattr(model.config.get_text_config(), "_attn_implementation", None) == "sdpa"
    share = share and takes_masks and len(begin) + len(ids) <= (context_of(model) or math.inf)
    if not _alike(model, [], ids, "end_to_end"):
        return "padded"
    # Rows that have too little in common to share lie end to end all the same.
    return "shared" if share and _alike(model, begin, ids, "shared") else "end_to_end"


def _alike(model: Any, before: list[int], ids: Sequence[int], layout: Layout) -> bool:
    """Whether the second of two rows that begin alike has the same final states in a layout as side by side."""
    # What precedes the second row's own tokens must not be what they come after.
    rows = [
        {"input_ids": row, "labels": [IGNORE_INDEX] * (len(row) - 1) + row[-1:], "avoid": False}
        for row in ([*before, *reversed(ids)], [*before, *ids])
    ]
    try:
        padded, other = (
            final_states(model, model, {name: part.to(model.device) for name, part in batch.items()})[-len(ids) :]
            for batch in (collate(rows, 0), collate(rows, 0, layout))
        )
    except Exception:  # Those of every architecture.
        return False
    tolerance = max(1e-4, 8 * torch.finfo(padded.dtype).eps)
    return bool((other.float() - padded.float()).abs().max() <= tolerance * padded.float().abs().max())


def refuse_adapted_head(model: Any) -> None:
    """See that the head is one weight, all of it trained or none.

    Raises:
        UserError: An adapter is on it, or on an embedding that is the head too.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        raise UserError(
            "trainable_token_indices trains some rows of the output head, which the losses read directly and which may "
            "be the embedding: leave it out, or train in full"
        )
    if isinstance(head, BaseTunerLayer):
        raise UserError(
            "the adapter is on the output head, which the losses read directly: leave the head out of its "
            "target_modules, or name it in modules_to_save to train it in full"
        )
    if isinstance(embedding, BaseTunerLayer) and head is not None and embedding.weight is head.weight:
        raise UserError(
            "the adapter is on the embedding, which is the output head too and which the losses read directly: leave "
            "it out of its target_modules, or train in full"
        )


class KnowsItsStart(FiniteSteps):
    """A trainer that looks at its model at step 0, before it is sharded, and again later.

    Attributes:
        penalty: None where avoid rows are left out.
    """

    args: TASFTConfig
    penalty: Penalty | None
    _tail: Tail
    _starts: dict[str, list[tuple[Rows, Tensor]]]
    _kept_space: CostSpace | None = None
    _start_head: Head | None = None

    @contextmanager
    def _whole_model(self) -> Iterator[None]:
        """Within, before the model is sharded, this process has all of its weights on its device."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.cpu_ram_efficient_loading:
            raise UserError(
                "every process looks at the whole model at step 0: set fsdp_cpu_ram_efficient_loading: false in "
                "accelerate's configuration"
            )
        if self._shards():
            # transformers leaves it where it is until it is sharded.
            self.model.to(self.accelerator.device)
        # transformers loads it in shards under ZeRO-3.
        sharded = [parameter for parameter in self.model.parameters() if hasattr(parameter, "ds_id")]
        if not sharded:
            yield
            return
        from deepspeed import zero

        with zero.GatheredParameters(sharded):
            yield

    def _head(self) -> Head:
        return self._tail.head(self.accelerator.unwrap_model(self.model))

    def _space(self) -> CostSpace:
        """The cost space as it was at step 0."""
        model = self.accelerator.unwrap_model(self.model)
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        matrix = head if self.args.cost_space == "output" else embedding
        # Where weights are sharded only those of the head are whole when the head is at work.
        copied = matrix.requires_grad or (matrix is not head and self._shards())
        if self._kept_space is None:
            kept = matrix.detach().clone() if copied else matrix
            self._kept_space = CostSpace.of(kept, center=self.args.center)
        # A frozen matrix is read where it is now: sharding and devices move it.
        return self._kept_space if copied else replace(self._kept_space, matrix=matrix.detach())

    def _shards(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @torch.no_grad()
    def _look(self, batches: Iterable[Batch], function: Callable[..., None]) -> None:
        """Hand the hidden states (B, T, D) of each batch to `function`, the model being in evaluation mode."""
        model = self.model_wrapped
        training = model.training
        model.eval()
        for batch in batches:
            batch = self._prepare_inputs(batch)
            with head_calls(self.accelerator.unwrap_model(self.model), partial(function, batch=batch)):
                model(**model_inputs(batch))
        model.train(training)

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        size = self.args.eval_batch_size
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _add_reference(self, rows: Any) -> None:
        """What the penalty needs of the reference for each avoid row, from the model as it is now, at step 0."""
        measures: dict[str, Callable[..., Tensor]] = {
            "margins": lambda *args: margins(*args, space=self._space()),
            "reference": log_probability,
        }
        needed = [] if self.penalty is None else sorted(self.penalty.needs & REFERENCE)
        if not needed or not rows:
            return
        for row in rows:
            row.update({name: [0.0] * len(row["input_ids"]) for name in needed})
        avoid = [row for row in rows if row["avoid"]]
        upcoming = iter(avoid)

        def keep(hidden: Tensor, batch: Batch) -> None:
            labels, segments = shift(batch["labels"]).flatten(), batch["segments"].flatten()
            measured = {name: measures[name](hidden.flatten(0, 1), self._head(), labels) for name in needed}
            for index in range(int(segments.max()) + 1):
                row = next(upcoming)
                for name, values in measured.items():
                    row_values = values[segments == index].float().tolist()
                    # A beginning that stood once, in the first row, has no label.
                    row[name] = [0.0] * (len(row["input_ids"]) - len(row_values)) + row_values

        self._look(map(self.data_collator, self._parts(avoid)), keep)

    def _remember_start(self, rows: Any) -> list[tuple[Rows, Tensor]]:
        """The first imitate rows to evaluate on, by batches, with the hidden states at step 0 where they count."""
        if not isinstance(rows, list) or not self.args.kl_rows:
            return []
        imitate = [row for row in rows if not row["avoid"]][: self.args.kl_rows]
        before: list[Tensor] = []

        def keep(hidden: Tensor, batch: Batch) -> None:
            counts = shift(batch["labels"]).flatten() != IGNORE_INDEX
            before.append(hidden.flatten(0, 1)[counts].clone())

        parts = list(self._parts(imitate))
        self._look(map(self.data_collator, parts), keep)
        head = self._head()
        if head.weight.requires_grad:
            bias = None if head.bias is None else head.bias.detach().clone()
            self._start_head = replace(head, weight=head.weight.detach().clone(), bias=bias)
        return list(zip(parts, before, strict=True))

    def _divergence(self, names: Iterable[str] | None = None) -> float | None:
        """Mean KL from the model at step 0 on evaluation sets, by default all, in nats per token; None without rows."""
        start = [pair for name in (self._starts if names is None else names) for pair in self._starts.get(name, ())]
        if not start:
            return None
        sums: list[TokenSum] = []
        before = iter(hidden for _, hidden in start)

        def measure(hidden: Tensor, batch: Batch) -> None:
            head, labels = self._head(), shift(batch["labels"]).flatten()
            earlier = self._start_head or head
            sums.append(divergence(hidden.flatten(0, 1), head, labels, before=next(before), head_before=earlier))

        self._look((self.data_collator(rows) for rows, _ in start), measure)
        return float(sum(part.total for part in sums)) / int(sum(part.count for part in sums))
