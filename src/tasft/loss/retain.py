"""How far a prediction has moved since an earlier model: watched in training, and minimised to stay near it.

Shapes: N positions, M of them counted, V tokens, D width.
"""

from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss import scan
from tasft.loss.tokens import Head, TokenSum, at_counted, counted, total_of


def divergence(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    before: Float[Tensor, "M D"],
    head_before: Head,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Stay near an earlier model: the forward divergence, over the whole vocabulary.

        KL_t = sum_w Q0_t(w) (log Q0_t(w) - log Q_t(w)),  in nats, in [0, inf)

    Args:
        hidden: Final hidden states.
        head: Maps them to logits; frozen.
        labels: As in `nll`; only whether a position counts matters.
        before: Final hidden states of the earlier model at the counted positions; no gradient reaches them.
        head_before: Its head.
        weights: How much each counted position counts, above 0; None is 1.
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Returns:
        Sum over counted positions and their number (the sum of their weights).

    Raises:
        ValueError: Shapes disagree, a label is not a token, or the head is to be trained.

    Source: as a term of fine-tuning for safety, ThinkSafe (2026, arXiv 2601.23143), its variant with the divergence.
    """
    now, _ = counted(hidden, head, labels)
    if now.shape != before.shape:
        raise ValueError(f"{tuple(now.shape)} counted hidden states, {tuple(before.shape)} of the earlier model")
    return total_of(scan.divergence(now, head, before, head_before, chunk_size), at_counted(weights, labels))
