"""Penalties that measure how far, in meaning, the prediction stands from a token to avoid.

Against a one-hot target the only transport plan is the product, so the Earth Mover Distance
under cosine cost needs no V x V matrix, only the expected embedding mu:

    EMD_t = sum_w Q_t(w) (1 - <e_w, e_y>) = 1 - <mu_t, e_y>,    mu_t = sum_w Q_t(w) e_w

Shapes: N positions, M of them counted, V tokens, D width of the model, E width of the cost space.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss.tokens import CHUNK_ROWS, IGNORE_INDEX, Head, TokenSum, counted, map_rows

_NORM_ROWS = 8192  # Norms are taken over slices of the vocabulary, so that no V x E copy is made.


@dataclass(frozen=True, eq=False)
class CostSpace:
    """A frozen unit-norm embedding e_w of every token; the cost of w for y is 1 - <e_w, e_y>.

        e_w = (matrix[w] - mean) * inverse_norm[w]        mean: 0 unless centred

    A row of zeros (padding of the vocabulary) is no token: its embedding is the zero vector,
    at cost 1 from all others, and it has no part in the mean. Build one with `CostSpace.of`.

    Attributes:
        matrix: Rows before normalising. Not a copy, so it must not be trained: pass a clone
            of it where it is.
        inverse_norm: One over the norm of each row, 0 for the zero rows.
        mean: Mean row, if centred.
    """

    matrix: Float[Tensor, "V E"]
    inverse_norm: Float[Tensor, " V"]
    mean: Float[Tensor, " E"] | None

    @classmethod
    def of(cls, matrix: Float[Tensor, "V E"], center: bool = False) -> Self:
        """Take the rows of a matrix as the embeddings, scaled to unit norm.

        Args:
            matrix: Any V rows, often the output head; referred to, not copied.
            center: Subtract the mean row first. Rows of real heads share a large common
                part, which makes all tokens look alike.
        """
        matrix = matrix.detach()
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        real = torch.cat([rows.any(1) for rows in torch.split(matrix, _NORM_ROWS)])
        mean = matrix.sum(0, dtype=dtype) / real.sum().clamp(min=1) if center else None
        norms = torch.cat(
            [
                (rows.to(dtype) if mean is None else rows.to(dtype) - mean).norm(dim=1)
                for rows in torch.split(matrix, _NORM_ROWS)
            ]
        )
        nonzero = real & (norms > 0)
        return cls(matrix, torch.where(nonzero, norms, torch.inf).reciprocal(), mean)

    def expect(self, q: Float[Tensor, "N V"]) -> Float[Tensor, "N E"]:
        """Mean embedding under weights: sum_w q_w e_w, differentiable in `q`.

        Computed as (q * inverse_norm) @ matrix in the dtype of `matrix`, so that no V x E copy
        is made; the mean is one rank-one term.

        Raises:
            ValueError: The weights and the matrix disagree on the vocabulary.
        """
        if q.shape[1] != self.matrix.shape[0]:
            raise ValueError(f"the cost space has {self.matrix.shape[0]} tokens, the head {q.shape[1]}")
        weights = (q * self.inverse_norm).to(self.matrix.dtype)
        product = (weights @ self.matrix).to(q.dtype)
        if self.mean is None:
            return product
        # Of the rounded weights, so that what rounding added to the product leaves with the mean.
        return product - weights.sum(1, keepdim=True, dtype=q.dtype) * self.mean

    def embed(self, ids: Int[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """Unit embeddings of some tokens, in float32 or, for a float64 matrix, float64."""
        scale = self.inverse_norm[ids].unsqueeze(1)
        rows = self.matrix[ids].to(scale.dtype)
        return (rows if self.mean is None else rows - self.mean) * scale


def expected_embedding(
    hidden: Float[Tensor, "M D"], head: Head, space: CostSpace, *, chunk_rows: int = CHUNK_ROWS
) -> tuple[Float[Tensor, "M E"], Float[Tensor, " M"]]:
    """Where the prediction stands in meaning, mu = sum_w Q(w) e_w, and how open it is.

    Holds a few buffers of chunk_rows x V numbers, in forward and in backward, never M x V.

    Returns:
        mu, differentiable, of norm at most 1; and the entropy of Q in nats, detached.
    """

    def chunk(rows: Tensor) -> tuple[Tensor, Tensor]:
        q = head.logits(rows).softmax(1)
        with torch.no_grad():
            entropy = torch.special.entr(q).sum(1)
        return space.expect(q), entropy

    mu, entropy = map_rows(chunk, hidden, chunk_rows=chunk_rows)
    return mu, entropy


def emd(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenSum:
    """Push the expected embedding away from the token's own: the paper's penalty.

        -||mu_t - e_y||^2 = -(2 EMD_t - (1 - ||mu_t||^2)),  unitless, in [-4, 0]

    The second form shows that it also rewards a concentrated prediction.

    Args:
        hidden: Final hidden states.
        head: Maps them to logits.
        labels: The token at each position (shifted); `IGNORE_INDEX` does not count.
        space: The geometry; no gradient reaches it.
        chunk_rows: Positions scored at a time; changes memory, not the result.

    Returns:
        Sum over counted positions and their number.

    Raises:
        ValueError: Shapes disagree, or a label is not a token.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 5. It is their lower bound of
    the EMD with the constant dropped.
    """
    hidden, labels = counted(hidden, head, labels)
    mu, _ = expected_embedding(hidden, head, space, chunk_rows=chunk_rows)
    penalty = -(mu - space.embed(labels)).square().sum(1)
    return TokenSum(penalty.sum(), labels.new_tensor(labels.numel()))


def emd_exact(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenSum:
    """Push the Earth Mover Distance itself up.

        -EMD_t = -(1 - <mu_t, e_y>),  unitless, in [-2, 0]

    Its slope is half that of `emd`: double its weight when comparing. Arguments, result and
    errors as in `emd`.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 3 and 4, of which Eq. 5 is a
    lower bound. Departs from the paper in using no bound.
    """
    hidden, labels = counted(hidden, head, labels)
    cost = _cost(hidden, head, labels, space, chunk_rows)
    return TokenSum(-cost.sum(), labels.new_tensor(labels.numel()))


def emd_hinge(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    margins: Float[Tensor, " N"],
    chunk_rows: int = CHUNK_ROWS,
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
        chunk_rows: As in `emd`.

    Source: ours.
    """
    keep = labels != IGNORE_INDEX
    hidden, labels = counted(hidden, head, labels)
    cost = _cost(hidden, head, labels, space, chunk_rows)
    penalty = (margins[keep] - cost).relu()
    return TokenSum(penalty.sum(), labels.new_tensor(labels.numel()))


@torch.no_grad()
def margins(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    chunk_rows: int = CHUNK_ROWS,
) -> Float[Tensor, " N"]:
    """What the reference model's choices other than the token would cost, on average.

        m_t = sum_{w != y} Q_t(w) / (1 - Q_t(y)) (1 - <e_w, e_y>),  unitless, in [0, 2]

    The quotient is one softmax over the other tokens, exact even where Q_t(y) rounds to 1.

    Args:
        hidden: Final hidden states of the reference model.
        head: Its head.
        labels: As in `emd`.
        space: As in `emd`.
        chunk_rows: As in `emd`.

    Returns:
        The margin of each position, 0 where it is ignored; no gradient.
    """
    keep = labels != IGNORE_INDEX
    hidden, labels = counted(hidden, head, labels)

    def chunk(rows: Tensor, tokens: Tensor) -> tuple[Tensor]:
        others, _ = head.logits_of_others(rows, tokens)
        mu = space.expect(others.softmax(1))
        return (1 - (mu * space.embed(tokens)).sum(1),)

    (margin,) = map_rows(chunk, hidden, labels, chunk_rows=chunk_rows)
    return torch.zeros_like(keep, dtype=margin.dtype).masked_scatter(keep, margin)


class AvoidStatistics(NamedTuple):
    """What to watch on avoid tokens, whichever penalty is trained."""

    emd: TokenSum
    entropy: TokenSum


@torch.no_grad()
def avoid_statistics(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    chunk_rows: int = CHUNK_ROWS,
) -> AvoidStatistics:
    """How far the model has moved from the tokens to avoid, and whether it still hesitates.

    Distance that grows while entropy falls to 0 is the collapse that a bounded penalty allows.
    No gradient; one more product with the head. Arguments and errors as in `emd`.

    Returns:
        Sums over counted positions of EMD_t (unitless, in [0, 2]) and of the entropy of Q_t
        (nats, in [0, log V]).
    """
    hidden, labels = counted(hidden, head, labels)
    mu, entropy = expected_embedding(hidden, head, space, chunk_rows=chunk_rows)
    cost = 1 - (mu * space.embed(labels)).sum(1)
    count = labels.new_tensor(labels.numel())
    return AvoidStatistics(TokenSum(cost.sum(), count), TokenSum(entropy.sum(), count))


def _cost(
    hidden: Float[Tensor, "M D"],
    head: Head,
    labels: Int[Tensor, " M"],
    space: CostSpace,
    chunk_rows: int,
) -> Float[Tensor, " M"]:
    """EMD of each position, all of them counted."""
    mu, _ = expected_embedding(hidden, head, space, chunk_rows=chunk_rows)
    return 1 - (mu * space.embed(labels)).sum(1)
