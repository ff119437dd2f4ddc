"""What every penalty shares: which positions count, and what the head says of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that does not count (torch's own convention)."""

_FIRST_MARK = -1001


def mark(labels: Iterable[int]) -> list[int]:
    """Labels of a row that say themselves that they are to be avoided.

        marked = -1001 - label, where label is a token; `IGNORE_INDEX` stays

    Whatever pads, cuts or packs labels keeps the marks. `unmark` reads them.
    """
    return [label if label < 0 else _FIRST_MARK - label for label in labels]


def unmark(labels: Int[Tensor, "*N"]) -> tuple[Int[Tensor, "*N"], Bool[Tensor, "*N"]]:
    """Labels without the marks of `mark`, and where these were."""
    avoided = labels <= _FIRST_MARK
    return labels.where(~avoided, _FIRST_MARK - labels), avoided


class TokenSum(NamedTuple):
    """A sum and how many terms it has, not yet divided: only the trainer knows by what.

    Attributes:
        total: Sum over what counts, a scalar. With nothing to count, a zero that can
            still be back-propagated.
        count: Number of terms (tokens, or responses) or, where they are weighted, sum of weights.
    """

    total: Float[Tensor, ""]
    count: Real[Tensor, ""]  # type: ignore[assignment]  # hides tuple.count, of no use here


def shift(labels: Int[Tensor, "*B T"]) -> Int[Tensor, "*B T"]:
    """Put the label of token t+1 at position t, where the hidden state predicts it.

    This is the only shift there is; everything else takes labels so aligned. The last
    position predicts nothing and gets `IGNORE_INDEX`.
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


@dataclass(frozen=True, eq=False)
class Head:
    """The map from hidden states to the logits of a prediction Q = softmax(logits).

        z = (hidden @ weight.T + bias) * scale
        logits = z, or softcap * tanh(z / softcap)

    Attributes:
        weight: Output embedding; V tokens, width D.
        bias: Added to the product, if the model has one.
        scale: Logits are multiplied by it. Cohere's `logit_scale`; for Granite, one over
            its `logits_scaling`.
        softcap: Bound on the size of a logit (Gemma 2's `final_logit_softcapping`).
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None


def counted(
    hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "M D"], Int[Tensor, " M"]]:
    """Keep the positions that count, before any product with the head.

    Raises:
        ValueError: Hidden states and labels differ in number, or a label is no token of the
            head. A negative one would otherwise index from the end and train on a wrong token.
    """
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden states of {tuple(hidden.shape)}: a penalty takes positions and not rows of them; flatten both, "
            "hidden.flatten(0, 1) and shift(labels).flatten(), or use tasft.losses_for"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{labels.shape[0]} labels for {hidden.shape[0]} hidden states")
    keep = labels != IGNORE_INDEX
    kept = labels[keep]
    vocabulary = head.weight.shape[0]
    if wrong := kept[(kept < 0) | (kept >= vocabulary)].tolist():
        raise ValueError(f"labels {wrong[:5]} are not among the head's {vocabulary} tokens")
    return hidden[keep], kept


def at_counted(values: Float[Tensor, " N"] | None, labels: Int[Tensor, " N"]) -> Float[Tensor, " M"] | None:
    """Keep what belongs to positions that count."""
    return None if values is None else values[labels != IGNORE_INDEX]


def total_of(terms: Float[Tensor, " K"], weights: Float[Tensor, " K"] | None) -> TokenSum:
    """Add up terms, each times its weight."""
    if weights is None:
        return TokenSum(terms.sum(), torch.tensor(terms.numel(), device=terms.device))
    return TokenSum((terms * weights).sum(), weights.sum())
