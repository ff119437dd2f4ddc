"""Which rows an optimizer step holds."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from tasft.errors import UserError


class StratifiedSampler(Sampler[int]):
    """Row order in which each step of `step_size` rows holds `avoid_per_step` avoid rows.

    An epoch is one pass over the imitate rows; its last step may be smaller. Avoid rows are drawn without
    replacement and shuffled anew when used up, across epochs. Within a step rows stand by length, so that
    micro-batches need little padding. What a step holds is a function of seed and epoch alone.

    Args:
        avoid: For each row whether it is to be avoided.
        lengths: Of each row, in tokens.
        step_size: Rows in an optimizer step, all micro-batches and ranks.
        avoid_per_step: Of these, rows to avoid.
        seed: Of both orders.

    Raises:
        UserError: A step would hold no imitate row.
    """

    def __init__(
        self, avoid: Sequence[bool], lengths: Sequence[int], step_size: int, avoid_per_step: int, seed: int
    ) -> None:
        self.imitate_rows = [index for index, is_avoid in enumerate(avoid) if not is_avoid]
        self.lengths = lengths
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
            rows = imitate[step * self.imitate_per_step : (step + 1) * self.imitate_per_step]
            rows += [next(avoid) for _ in range(self.avoid_per_step)]
            yield from sorted(rows, key=self.lengths.__getitem__)
