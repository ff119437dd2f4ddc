"""What every penalty shares: which positions count, what the head says, how memory stays small."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""Label of a position that does not count (torch's own convention)."""

CHUNK_ROWS = 256
"""Rows whose scores are alive at once; with V = 262,144 a float32 buffer of them is 256 MiB."""


class TokenSum(NamedTuple):
    """A sum and how many terms it has, not yet divided: only the trainer knows by what.

    Attributes:
        total: Sum over what counts, a scalar. With nothing to count, a zero that can
            still be back-propagated.
        count: Number of terms (tokens, or responses), an integer scalar.
    """

    total: Float[Tensor, ""]
    count: Int[Tensor, ""]  # type: ignore[assignment]  # hides tuple.count, of no use here


def shift(labels: Int[Tensor, "*B T"]) -> Int[Tensor, "*B T"]:
    """Put the label of token t+1 at position t, where the hidden state predicts it.

    This is the only shift there is; everything else takes labels so aligned. The last
    position predicts nothing and gets `IGNORE_INDEX`.
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


@dataclass(frozen=True, eq=False)
class Head:
    """The map from hidden states to next-token logits.

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

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Score every token, in float32 or, for a float64 head, float64.

        The product runs in the dtype of `weight`, as in the model, so that no V x D copy
        is made; rounding to that dtype is the last loss of precision.
        """
        # Raise bf16 to fp32, but keep fp64 so that gradcheck sees the real function.
        product = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def logits_of_others(
        self, hidden: Float[Tensor, "N D"], labels: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
        """Score the tokens other than the label (which gets -inf), and the label itself."""
        logits = self.logits(hidden)
        own = logits[torch.arange(len(labels), device=labels.device), labels]
        # In place spares an N x V copy. It would not do after `gather`, which keeps its input for
        # backward, and inside a checkpoint autograd does not notice.
        return logits.scatter_(1, labels.unsqueeze(1), -torch.inf), own


def counted(
    hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "M D"], Int[Tensor, " M"]]:
    """Keep the positions that count, before any product with the head.

    Raises:
        ValueError: Hidden states and labels differ in number, or a label is no token of the
            head. A negative one would otherwise index from the end and train on a wrong token.
    """
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{labels.shape[0]} labels for {hidden.shape[0]} hidden states")
    keep = labels != IGNORE_INDEX
    kept = labels[keep]
    vocabulary = head.weight.shape[0]
    if wrong := kept[(kept < 0) | (kept >= vocabulary)].tolist():
        raise ValueError(f"labels {wrong[:5]} are not among the head's {vocabulary} tokens")
    return hidden[keep], kept


def map_rows(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor, chunk_rows: int) -> tuple[Tensor, ...]:
    """Apply a row-wise function to chunks of rows and join the results.

    What `function` allocates lives for one chunk only, in backward too: there it is computed
    again instead of kept.
    """
    chunks = [
        checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(torch.split(tensor, chunk_rows) for tensor in rows), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
