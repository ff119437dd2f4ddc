"""What ordinary replies of the untouched model are like: measured once, and all states and methods are held to it."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tasft import launch
from tasft.coherence import MIN_REPLIES, NO_LIMITS, Limits, incoherence, loss_limit, similarity_limit
from tasft.data import Prompt
from tasft.engines import Engine, Sampling, collect, requests_for
from tasft.judges.judging import Measure, has_topic
from tasft.provenance import read_json, write_json

PROMPTS = 48
LONGEST = 64  # Tokens of a reply.


def calibrate(
    engine: Engine,
    losses: Measure,
    similarities: Measure | None,
    ordinary: Sequence[Prompt],
    seed: int,
    folder: Path,
) -> None:
    """Draw answers to ordinary prompts and write what limits coherent replies keep.

    Args:
        engine: The untouched model.
        losses: Mean loss of some replies under it, in nats per token.
        similarities: Cosine of the sentence embeddings of some replies and their prompts; None leaves that limit out,
            as do too few replies that have a topic.
        ordinary: At least `coherence.MIN_REPLIES` prompts, of which `PROMPTS` are drawn.
        seed: Of all draws.
        folder: Gets `replies.jsonl` and `summary.json`; taken up where it was left.
    """
    # The whole distribution of the model, not its likely half: a plain refusal is less probable than
    # anything that it says at a low temperature.
    sampling = Sampling(LONGEST, temperature=1.0, top_p=1.0, seed=seed)
    some = random.Random(seed).sample(ordinary, min(PROMPTS, len(ordinary)))
    replies = collect(engine, requests_for(some), sampling, folder / "replies.jsonl", "calibration")
    similarity = None
    answers = [each for each in replies if has_topic(each) and incoherence(each.prompt, each.completion) is None]
    if similarities and len(answers) >= MIN_REPLIES:
        similarity = similarity_limit(similarities(answers))
    limits = Limits(loss_limit(losses(replies)), similarity)
    if launch.is_first():
        write_json(folder / "summary.json", {"replies": len(replies), "limits": asdict(limits)})


def limits_of(folder: Path) -> Limits:
    """The limits that `calibrate` wrote; none if it did not run there."""
    summary = read_json(folder / "summary.json")
    return NO_LIMITS if summary is None else Limits(**summary["limits"])


def can_calibrate(ordinary: Sequence[Prompt]) -> bool:
    """Whether there are prompts enough; without limits no reply is found improbable or off its topic."""
    return len(ordinary) >= MIN_REPLIES
