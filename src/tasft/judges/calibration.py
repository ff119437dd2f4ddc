"""How improbable a sensible reply of the untouched model can be: measured once, for all states and methods."""

import random
from collections.abc import Sequence
from pathlib import Path

from tasft.core import ranks
from tasft.core.provenance import read_json, write_json
from tasft.data.rows import Prompt
from tasft.judges.coherence import MIN_LOSSES, loss_limit
from tasft.judges.judging import Measure
from tasft.models.engine import Engine, Sampling, collect, requests_for

PROMPTS = 48
LONGEST = 64  # Tokens of a reply.


def calibrate(engine: Engine, losses: Measure, benign: Sequence[Prompt], seed: int, folder: Path) -> None:
    """Draw answers to benign prompts and write the largest loss that a coherent reply may have.

    Args:
        engine: The untouched model.
        losses: Mean loss of some replies under it, in nats per token.
        benign: At least `coherence.MIN_LOSSES` prompts, of which `PROMPTS` are drawn.
        seed: Of all draws.
        folder: Gets `replies.jsonl` and `summary.json`; taken up where it was left.
    """
    # The whole distribution of the model, not its likely half: a plain refusal is less probable than
    # anything that it says at a low temperature.
    sampling = Sampling(LONGEST, temperature=1.0, top_p=1.0, seed=seed)
    some = random.Random(seed).sample(benign, min(PROMPTS, len(benign)))
    replies = collect(engine, requests_for(some), sampling, folder / "replies.jsonl", "calibration")
    limit = loss_limit(losses(replies))
    if ranks.is_first():
        write_json(folder / "summary.json", {"replies": len(replies), "loss_limit_nats": limit})


def limit_of(folder: Path) -> float | None:
    """The limit in nats per token that `calibrate` wrote; None if it did not run there."""
    summary = read_json(folder / "summary.json")
    return None if summary is None else float(summary["loss_limit_nats"])


def can_calibrate(benign: Sequence[Prompt]) -> bool:
    """Whether there are prompts enough; without the limit no reply is found improbable."""
    return len(benign) >= MIN_LOSSES
