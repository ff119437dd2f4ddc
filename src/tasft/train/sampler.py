"""Which rows an optimizer step holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from tasft.core.errors import UserError


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

    def _avoid_from(self, position: int) -> Iterator[int]:
        while True:
            turn, offset = divmod(position, len(self.avoid_rows))
            yield from _shuffled(self.avoid_rows, self.seed * 2 + 1, turn)[offset:]
            position += len(self.avoid_rows) - offset

    def __iter__(self) -> Iterator[int]:
        imitate = _shuffled(self.imitate_rows, self.seed * 2, self.epoch)
        avoid = self._avoid_from(self.epoch * self.steps * self.avoid_per_step) if self.avoid_per_step else iter(())
        for step in range(self.steps):
            rows = imitate[step * self.imitate_per_step : (step + 1) * self.imitate_per_step]
            rows += [next(avoid) for _ in range(self.avoid_per_step)]
            yield from sorted(rows, key=self.lengths.__getitem__)


class UniformSampler(Sampler[int]):
    """All rows, shuffled anew in each epoch, as a function of seed and epoch alone."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; the Trainer calls it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        yield from _shuffled(range(self.rows), self.seed * 2, self.epoch)


def _shuffled(rows: Sequence[int], seed: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]


class FilledSampler(Sampler[int]):
    """Another sampler's order, filled up to a multiple.

    Args:
        sampler: Gives the order.
        multiple: Rows that all ranks take at once.
        filler: The index that is added, of a row in which nothing counts.
    """

    def __init__(self, sampler: Any, multiple: int, filler: int) -> None:
        self.sampler, self.multiple, self.filler = sampler, multiple, filler

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass, if the order has several."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) + -len(self.sampler) % self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from [self.filler] * (-len(self.sampler) % self.multiple)
