"""Penalties that measure how far, in meaning, the prediction stands from a token to avoid.

Against a one-hot target the only transport plan is the product, so the Earth Mover Distance
under cosine cost needs no V x V matrix, only the expected embedding mu:

    EMD_t = sum_w Q_t(w) (1 - <e_w, e_y>) = 1 - <mu_t, e_y>,    mu_t = sum_w Q_t(w) e_w

Shapes: N positions, M of them counted, V tokens, D width of the model, E width of the cost space.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss.scan import other_embedding, other_tokens
from tasft.loss.space import CostSpace
from tasft.loss.tokens import IGNORE_INDEX, Head, TokenSum, at_counted, counted, total_of


def emd(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Push the expected embedding away from the token's own: the paper's penalty.

        -||mu_t - e_y||^2 = -(2 EMD_t - (1 - ||mu_t||^2)),  unitless, in [-4, 0]

    The second form shows that it also rewards a concentrated prediction.

    Args:
        hidden: Final hidden states.
        head: Maps them to logits.
        labels: The token at each position (shifted); `IGNORE_INDEX` does not count.
        space: The geometry; no gradient reaches it.
        weights: How much each counted position counts, above 0; None is 1.
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Returns:
        Sum over counted positions and their number (the sum of their weights).

    Raises:
        ValueError: Shapes disagree, or a label is not a token.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 5. It is their lower bound of
    the EMD with the constant dropped.
    """
    weights = at_counted(weights, labels)
    hidden, labels = counted(hidden, head, labels)
    log_odds, mean = other_embedding(hidden, head, labels, space, chunk_size)
    # mu - e_y = (1 - Q(y)) (mean of the others - e_y), without cancellation where Q(y) is near 1.
    distance = (mean - space.embed(labels)).square().sum(1)
    penalty = -(-log_odds).sigmoid().square() * distance
    return total_of(penalty, weights)


def emd_exact(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Push the Earth Mover Distance itself up.

        -EMD_t = -(1 - <mu_t, e_y>),  unitless, in [-2, 0]

    Its slope is half that of `emd`: double its weight when comparing. Arguments, result and
    errors as in `emd`.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 3 and 4, of which Eq. 5 is a
    lower bound. Departs from the paper in using no bound.
    """
    weights = at_counted(weights, labels)
    hidden, labels = counted(hidden, head, labels)
    cost = _emd(hidden, head, labels, space, chunk_size)
    return total_of(-cost, weights)


def emd_hinge(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    margins: Float[Tensor, " N"],
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Push the Earth Mover Distance up to what the reference model's other choices cost.

        max(0, m_t - EMD_t),  unitless, in [0, 2]

    A position that has got there has no gradient but stays in the count.

    Args:
        hidden: As in `emd`, as are the result and the errors.
        head: As in `emd`.
        labels: As in `emd`.
        space: As in `emd`.
        margins: m_t of the model at step 0, from `margins`; ignored positions are not read.
        weights: As in `emd`.
        chunk_size: As in `emd`.

    Source: ours.
    """
    margins, weights = margins[labels != IGNORE_INDEX], at_counted(weights, labels)
    hidden, labels = counted(hidden, head, labels)
    cost = _emd(hidden, head, labels, space, chunk_size)
    return total_of((margins - cost).relu(), weights)


@torch.no_grad()
def margins(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    chunk_size: int | None = None,
) -> Float[Tensor, " N"]:
    """What the reference model's choices other than the token would cost, on average.

        m_t = sum_{w != y} Q_t(w) / (1 - Q_t(y)) (1 - <e_w, e_y>),  unitless, in [0, 2]

    The quotient is one softmax over the other tokens, exact even where Q_t(y) rounds to 1.

    Args:
        hidden: Final hidden states of the reference model.
        head: Its head.
        labels: As in `emd`.
        space: As in `emd`.
        chunk_size: As in `emd`.

    Returns:
        The margin of each position, 0 where it is ignored; no gradient.
    """
    keep = labels != IGNORE_INDEX
    hidden, labels = counted(hidden, head, labels)
    margin = other_tokens(hidden, head, labels, space, chunk_size).cost
    assert margin is not None
    return torch.zeros_like(keep, dtype=margin.dtype).masked_scatter(keep, margin)


def _emd(
    hidden: Float[Tensor, "M D"], head: Head, labels: Int[Tensor, " M"], space: CostSpace, chunk_size: int | None
) -> Float[Tensor, " M"]:
    """EMD of each position, all of them counted: the share of the other tokens times their mean cost."""
    log_odds, cost = other_tokens(hidden, head, labels, space, chunk_size)
    assert cost is not None
    return (-log_odds).sigmoid() * cost
