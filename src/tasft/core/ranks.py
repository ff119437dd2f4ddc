"""One command in several processes, each a rank of one training.

What a process must know of the others stands in its environment, under the names that torch and accelerate read:
a process that `accelerate launch` or `torchrun` started is told apart by nothing. Only there are torch
and accelerate imported.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_SHARED = ContextVar("within a part of a shared work", default=False)


def world_size() -> int:
    """How many processes share this work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str | None:
    """What shares one model between the processes; None where each has a whole one."""
    return next(
        (name for name in ("fsdp", "deepspeed") if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"), None
    )


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return os.environ.get("RANK", "0") == "0"


def share(parts: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
    """The work on each part, in their order, done by all ranks in turn; every rank gets all results.

    What comes out does not depend on how many ranks there are. Results travel between processes: plain data.
    What is shared within `work`, which each rank has another part of, that rank does alone.
    """
    if _SHARED.get():
        yield from map(work, parts)
        return
    ranks, own = world_size(), int(os.environ.get("RANK", "0"))
    for start in range(0, len(parts), ranks):
        together = parts[start : start + ranks]
        token = _SHARED.set(True)
        try:
            done = work(together[own]) if own < len(together) else None
        finally:
            _SHARED.reset(token)
        if ranks == 1:
            yield done  # type: ignore[misc]
            continue
        from torch import distributed as dist

        results: list[Any] = [None] * ranks
        dist.all_gather_object(results, done)
        yield from results[: len(together)]


def wait() -> None:
    """Go on when all ranks have got here; at once where there is only one."""
    if world_size() == 1:
        return
    from torch import distributed as dist

    if dist.is_initialized():
        dist.barrier()


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process is a rank of its launch: it has its device and can talk to the others."""
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState
    from torch import distributed as dist

    if os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        _shard_on_cpu()
    PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _shard_on_cpu() -> None:
    """Let accelerate shard a model on CPUs, which it does on accelerators alone: its own state must take us for one."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def prepare(*_: object, **__: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare
