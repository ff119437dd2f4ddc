"""The geometry of a vocabulary: what one token costs for another."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        along: matrix @ mean, if centred: what a product with `matrix` holds of the mean.
    """

    matrix: Float[Tensor, "V E"]
    inverse_norm: Float[Tensor, " V"]
    mean: Float[Tensor, " E"] | None = None
    along: Float[Tensor, " V"] | None = None

    @classmethod
    def of(cls, matrix: Float[Tensor, "V E"], center: bool = False) -> "CostSpace":
        """Take the rows of a matrix as the embeddings, scaled to unit norm.

        Args:
            matrix: Any V rows, often the output head; referred to, not copied.
            center: Subtract the mean row first. Rows of real heads share a large common
                part, which makes all tokens look alike.
        """
        matrix = matrix.detach()
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        slices = torch.split(matrix, _NORM_ROWS)
        real = torch.cat([rows.any(1) for rows in slices])
        if not center:
            norms = torch.cat([rows.to(dtype).norm(dim=1) for rows in slices])
            return cls(matrix, _inverse(norms))
        mean = matrix.sum(0, dtype=dtype) / real.sum().clamp(min=1)
        norms = torch.cat([(rows.to(dtype) - mean).norm(dim=1) for rows in slices])
        along = torch.cat([rows.to(dtype) @ mean for rows in slices])
        return cls(matrix, _inverse(norms) * real, mean, along)

    def embed(self, ids: Int[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """Unit embeddings of some tokens, in float32 or, for a float64 matrix, float64."""
        scale = self.inverse_norm[ids].unsqueeze(1)
        rows = self.matrix[ids].to(scale.dtype)
        return (rows if self.mean is None else rows - self.mean) * scale


def _inverse(norms: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    return torch.where(norms > 0, norms, torch.inf).reciprocal()
