"""In which precision a model computes where nobody says: decided here alone, by what this machine is quick at."""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import linear

from tasft.core import provenance

# Rows of a small batch, and a layer's weights: on a processor that has to imitate bfloat16, half a second in all.
_ROWS, _WIDTH, _TRIES = 32, 1024, 4

# How many times as fast bfloat16 must be; what is not a matrix product is not faster in it.
FASTER = 1.25


@dataclass(frozen=True)
class Choice:
    """A precision, and why.

    Attributes:
        dtype: Of weights that are frozen; name of a torch dtype.
        why: A sentence.
    """

    dtype: Literal["bfloat16", "float32"]
    why: str

    @property
    def autocast(self) -> Literal["bf16", "fp32"]:
        """That of the products in training, as `train.precision` names it."""
        return "bf16" if self.dtype == "bfloat16" else "fp32"


RECORD = "precision"
"""Where the manifest of a run, or the state of a sweep, keeps the choice."""


def remembered(path: Path) -> Choice:
    """What was chosen when a run, or a sweep, was begun; for a new one `fastest`.

    Work that goes on elsewhere keeps it: halves in two precisions would be of two models.

    Args:
        path: The manifest of the run, or the state of the sweep.
    """
    kept: dict[str, Any] | None = (provenance.read_json(path) or {}).get(RECORD)
    return Choice(**kept) if kept else fastest()


@cache
def fastest() -> Choice:
    """bfloat16 if the GPU has it or, without one, if this processor multiplies it faster; else float32.

    A processor is tried, once in a process, by a product of 32 rows with 1024 x 1024 weights.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bfloat16", "the GPU multiplies it")
        return Choice("float32", "the GPU does not multiply bfloat16")
    times = faster_by()
    reason = f"bfloat16 runs {times:.2g} times as fast as float32 on this processor"
    return Choice("bfloat16", reason) if times >= FASTER else Choice("float32", f"{reason}, {FASTER} are asked for")


@torch.inference_mode()
def faster_by() -> float:
    """How many times as fast this processor multiplies bfloat16 as float32; the best of each of a few turns.

    In one thread, by the time that it was given: threads that wait for one another while other work runs tell nothing.
    """
    parts = [
        (torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [[_seconds(*operands) for operands in parts] for _ in range(_TRIES)]
    finally:
        torch.set_num_threads(threads)
    full, half = map(min, zip(*turns, strict=True))
    return full / half


def _seconds(rows: torch.Tensor, weights: torch.Tensor) -> float:
    start = time.thread_time()
    linear(rows, weights)
    return time.thread_time() - start
