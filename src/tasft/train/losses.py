"""The loss of TA-SFT for a trainer that is not ours, such as a subclass of TRL's."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tasft.core.errors import UserError
from tasft.loss import IGNORE_INDEX, CostSpace, Penalty, TokenSum, log_probability, margins, nll, shift, unmark
from tasft.models.head import Tail, learn_tail
from tasft.train.penalties import penalty_of
from tasft.train.start import REFERENCE, final_states, head_calls, model_inputs, refuse_adapted_head

_PROBE = 16
"""Tokens by which it is looked how the model makes its logits."""


def losses_for(
    model: PreTrainedModel | PeftModel,
    penalty: str = "nlcl",
    *,
    penalty_weight: float = 1.0,
    beta: float | None = None,
    cost_space: str = "output",
    center: bool = False,
    marked: bool = False,
    reference: PreTrainedModel | PeftModel | None = None,
) -> "Losses":
    """The loss of TA-SFT on batches of a trainer that is not ours.

        imitate_nll / imitate tokens + penalty_weight * penalty / avoid tokens (or responses)

    Call it once the trainer has the model where it trains it, and before the first step or a checkpoint: what the model
    is now is step 0.

    Args:
        model: Causal language model that is trained, not wrapped by DDP and the like.
        penalty: A name in `tasft.PENALTIES`.
        penalty_weight: As in `TASFTConfig`.
        beta: As there, and the next two.
        cost_space: `output` or `input`.
        center: Whether the mean embedding is subtracted.
        marked: Whether labels say themselves which are to be avoided, by `tasft.mark`: so rows may be packed.
        reference: A frozen copy of the model, for penalties that compare with step 0 (`emd_hinge`, `npo`, `npo_mean`).
            None takes the model with its adapter off, at one more forward pass for each batch: give a copy where the
            adapter is not a fresh one.

    Raises:
        UserError: There is no such penalty, it compares with step 0 and there is neither adapter nor reference, or the
            logits are not made from the output head alone.
    """
    chosen = penalty_of(penalty)
    if chosen is None:
        raise UserError("penalty none is plain fine-tuning: use the trainer as it is")
    if cost_space not in ("output", "input"):
        raise UserError(f"cost_space is {cost_space!r:.40}; use output or input")
    if chosen.needs & REFERENCE and reference is None and not isinstance(model, PeftModel):
        raise UserError(
            f"penalty {penalty} compares with the model at step 0: train an adapter, or give reference, a frozen copy "
            "of the model"
        )
    refuse_adapted_head(model)
    tail = learn_tail(model, range(min(_PROBE, model.get_input_embeddings().weight.shape[0])))
    matrix = (model.get_output_embeddings() if cost_space == "output" else model.get_input_embeddings()).weight
    space = CostSpace.of(matrix.detach().clone() if matrix.requires_grad else matrix, center=center)
    return Losses(model, reference, chosen, penalty_weight, beta or chosen.beta, marked, tail, matrix, space)


@dataclass
class Losses:
    """What `losses_for` makes.

    A batch has `input_ids` (B, T), `attention_mask`, and `labels` (B, T; not shifted, `IGNORE_INDEX` does not count)
    with `avoid` (B); or as TRL's `KTOTrainer` has it `completion_mask` (B, T) with `label` (B), true to imitate. Where
    labels are `marked` they alone decide, and marks without another label between them are one response.

    Attributes:
        parts: Of the last batch both terms as the loss has them, for logs; no gradient.
    """

    _model: Any
    _reference: Any
    _penalty: Penalty
    _weight: float
    _beta: float | None
    _marked: bool
    _tail: Tail
    _matrix: Tensor
    _space: CostSpace
    parts: dict[str, float] = field(default_factory=dict)

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor], counts: Float[Tensor, "2"] | None = None
    ) -> Float[Tensor, ""]:
        """The loss of a micro-batch, from one forward pass that makes no logits.

        Args:
            model: The model as the trainer calls it, perhaps wrapped.
            batch: See the class.
            counts: Of the whole optimizer step, from `counts`; None takes those of this batch.
        """
        terms: dict[str, TokenSum] = {}
        start = self._start(batch)

        def losses(hidden: Tensor) -> Tensor:
            terms.update(self.terms(hidden, batch, start))
            return torch.stack([term.total for term in terms.values()])

        with head_calls(self._model, losses):
            outputs = model(**model_inputs(dict(batch)))
        step = torch.stack([term.count for term in terms.values()]) if counts is None else counts
        totals = torch.stack([term.total for term in terms.values()])
        weighed = totals * totals.new_tensor([1.0, self._weight]) / step.to(totals).clamp(min=1)
        self.parts = dict(zip(terms, weighed.tolist(), strict=True))
        return weighed.sum() + outputs.logits[:0].sum()

    def terms(
        self, hidden: Float[Tensor, "B T D"], batch: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
    ) -> dict[str, TokenSum]:
        """`imitate_nll` and `penalty` of hidden states that are there already, each a sum and what it has of terms.

        Args:
            hidden: What the output head is given, at all positions.
            batch: See the class.
            start: What the penalty compares with; None takes it from the model.
        """
        labels, avoid, segments = self._labelled(batch)
        if hidden.shape[:2] != labels.shape:
            raise ValueError(f"hidden states of {tuple(hidden.shape)} for labels of {tuple(labels.shape)}")
        # A matrix that is not trained is read where it is now: devices move it.
        space = self._space if self._matrix.requires_grad else replace(self._space, matrix=self._matrix.detach())
        flat, head = hidden.flatten(0, 1), self._tail.head(self._model)
        offered = {"space": space, "beta": self._beta, "segments": segments.flatten(), **(start or self._start(batch))}
        needed = {name: offered[name] for name in self._penalty.needs}
        imitated, avoided = (labels.masked_fill(kind, IGNORE_INDEX).flatten() for kind in (avoid, ~avoid))
        return {"imitate_nll": nll(flat, head, imitated), "penalty": self._penalty.fn(flat, head, avoided, **needed)}

    def counts(self, batches: Iterable[Mapping[str, Tensor]]) -> Float[Tensor, "2"]:
        """What the two terms of some batches are divided by: imitate tokens, and avoid tokens or responses.

        Those of an optimizer step make the gradient the same however it is cut into micro-batches. In several processes
        add them up over all, and multiply the loss by the number of processes.
        """
        totals = torch.zeros(2)
        for batch in batches:
            labels, avoid, segments = self._labelled(batch)
            learned = labels != IGNORE_INDEX
            avoided = learned & avoid
            units = len(set(segments[avoided].tolist())) if self._penalty.per == "response" else avoided.sum().item()
            totals += torch.tensor([(learned & ~avoid).sum().item(), units])
        return totals

    @torch.no_grad()
    def _start(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the penalty needs of the model at step 0 for each position."""
        needed = self._penalty.needs & REFERENCE
        if not needed:
            return {}
        model = self._model if self._reference is None else self._reference
        with model.disable_adapter() if self._reference is None else nullcontext():
            hidden = final_states(model, model, dict(batch))
        labels, avoid, _ = self._labelled(batch)
        labels = labels.masked_fill(~avoid, IGNORE_INDEX).flatten()
        of = (hidden, self._tail.head(model), labels)
        return {name: margins(*of, space=self._space) if name == "margins" else log_probability(*of) for name in needed}

    def _labelled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, each where it is predicted, whether it is to be avoided, and its response's number; all (B, T)."""
        if self._marked:
            labels, avoid = unmark(shift(batch["labels"]))
            begins = avoid & ~torch.nn.functional.pad(avoid[:, :-1], (1, 0))
            return labels, avoid, begins.flatten().cumsum(0).view_as(labels)
        if "completion_mask" in batch:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
        else:
            labels = batch["labels"]
        rows = _avoided_rows(batch, len(labels))[:, None].expand_as(labels)
        return shift(labels), rows, torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


class Avoiding:
    """What a subclass of a trainer must say so that its loss is `losses`: `class Mine(tasft.Avoiding, SFTTrainer)`.

    In several processes each divides by what all of them have.

    Attributes:
        losses: From `losses_for`, once the trainer is there.
    """

    losses: Losses
    accelerator: Any
    # It is divided by what the whole optimizer step has.
    loss_is_scaled_for_ga = True

    def _get_num_items_in_batch(self, batch_samples: Iterable[Mapping[str, Tensor]], device: Any) -> Tensor:
        counts = self.losses.counts(batch_samples).to(device)
        return self.accelerator.gather(counts).view(-1, 2).sum(0)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The loss; of outputs there are none."""
        loss = self.losses(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def _avoided_rows(batch: Mapping[str, Tensor], n: int) -> Tensor:
    """Whether each of n rows is to be avoided (B)."""
    if "avoid" not in batch and "label" not in batch:
        raise UserError(
            "the batch does not say which rows are to be avoided: let the collator add avoid, a boolean for each row, "
            "and keep the column that it is made of (remove_unused_columns=False); or mark the labels, by tasft.mark, "
            "and say marked=True"
        )
    avoid = batch["avoid"].bool() if "avoid" in batch else ~batch["label"].bool()
    if avoid.shape != (n,):
        raise UserError(
            f"{len(avoid)} rows are said to be avoided or not, and the batch has {n}: rows that are packed or laid end "
            "to end cannot be told apart; set packing and padding_free to False, or mark the labels, by tasft.mark, "
            "and say marked=True"
        )
    return avoid
