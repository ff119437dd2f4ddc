"""The model's own answers to toxic prompts, judged: rows to avoid, and rows that show where to go instead."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tasft.coherence import MIN_LOSSES, loss_limit
from tasft.data import Example, Prompt
from tasft.engines import Engine, Reply, Sampling, collect, requests_for
from tasft.judges import Judge
from tasft.judges.judging import judge_replies
from tasft.provenance import write_json, write_jsonl

# The one sentence of the demo that a person wrote: prefilled anchors begin with it.
REFUSAL = "I'm sorry, but I can't help with that."
CALIBRATION = 48  # Ordinary prompts whose answers say how improbable a sensible reply can be.


@dataclass(frozen=True)
class HarvestSettings:
    """What `harvest` needs to know besides the prompts.

    Attributes:
        sampling: How all replies are drawn.
        samples: Replies to each toxic prompt.
        rows: Most avoid rows that are kept.
        anchor_rows: Most anchors that are kept; None keeps all.
        anchors: Imitate rows for toxic prompts: `none`; `own`, the model's harmless and coherent samples;
            `prefilled`, its continuations of one refusing sentence.
    """

    sampling: Sampling
    samples: int
    rows: int
    anchors: Literal["none", "own", "prefilled"]
    anchor_rows: int | None = None


def harvest(
    engine: Engine,
    mean_losses: Callable[[Sequence[Reply]], list[float]],
    judge: Judge,
    toxic: Sequence[Prompt],
    ordinary: Sequence[Prompt],
    settings: HarvestSettings,
    folder: Path,
) -> dict[str, Any]:
    """Fill a `harvest/` folder; taken up where it was left when the folder holds replies.

    Args:
        engine: The model whose answers they are.
        mean_losses: Mean loss of each reply under that model, in nats per token.
        judge: Decides what is harmful.
        toxic: Prompts whose harmful answers become avoid rows.
        ordinary: Prompts whose answers become imitate rows, and whose losses calibrate coherence.
        settings: See there.
        folder: Gets `replies.jsonl`, `verdicts.jsonl`, `avoid.jsonl`, `anchor.jsonl`, `imitate.jsonl`
            and `summary.json`.

    Returns:
        The summary: how many replies were tried and kept, and why the others were not.
    """
    path = folder / "replies.jsonl"
    own = collect(engine, requests_for(ordinary, mark="-own"), settings.sampling, path, "ordinary")
    asked = requests_for(toxic, samples=settings.samples)
    answers = collect(engine, asked, settings.sampling, path, "toxic")
    prefilled: list[Reply] = []
    if settings.anchors == "prefilled":
        wanted = requests_for(toxic, prefix=REFUSAL, mark="-anchor")
        prefilled = collect(engine, wanted, settings.sampling, path, "anchor")

    limit = None
    if len(ordinary) >= MIN_LOSSES:
        # The whole distribution of the model, not its likely half: a plain refusal is less probable than
        # anything that it says at a low temperature.
        everything = replace(settings.sampling, temperature=1.0, top_p=1.0)
        some = random.Random(settings.sampling.seed).sample(ordinary, min(CALIBRATION, len(ordinary)))
        wanted = requests_for(some, mark="-calibration")
        limit = loss_limit(mean_losses(collect(engine, wanted, everything, path, "calibration")))

    replies = own + answers + prefilled
    losses = mean_losses(replies)
    verdicts = {
        verdict.id: verdict for verdict in judge_replies(judge, replies, losses, limit, folder / "verdicts.jsonl")
    }

    def harmful(reply: Reply) -> str | None:
        verdict = verdicts[reply.id]
        if verdict.harmful is None:
            return "no verdict"
        return None if verdict.harmful and verdict.coherent else verdict.reason or "not harmful"

    def harmless(reply: Reply) -> str | None:
        verdict = verdicts[reply.id]
        if verdict.harmful is None:
            return "no verdict"
        return (verdict.reason or None) if not verdict.harmful else "harmful"

    def coherent(reply: Reply) -> str | None:
        # The prompts are ordinary by the user's word; judges err most on those that only seem toxic.
        return verdicts[reply.id].reason or None

    def refusing(reply: Reply) -> str | None:
        return harmless(reply) or (None if verdicts[reply.id].refusal else "not a refusal")

    avoid, avoid_left = _keep(answers, harmful, settings.rows, settings.sampling.seed)
    source, test = (prefilled, refusing) if settings.anchors == "prefilled" else (answers, harmless)
    if settings.anchors == "none":
        source = []
    anchors, anchors_left = _keep(source, test, settings.anchor_rows, settings.sampling.seed)
    imitate, imitate_left = _keep(own, coherent)
    for name, kept, label in (
        ("avoid", avoid, False),
        ("anchor", anchors, True),
        ("imitate", imitate, True),
    ):
        write_jsonl(folder / f"{name}.jsonl", [_example(reply, label, name).row() for reply in kept])
    summary = {
        "judge": judge.name,
        "tried": len(answers),
        "kept": len(avoid),
        "wanted": settings.rows,
        "reasons": dict(avoid_left),
        "anchors": {
            "mode": settings.anchors,
            "tried": len(source),
            "kept": len(anchors),
            "reasons": dict(anchors_left),
        },
        "imitate": {"tried": len(own), "kept": len(imitate), "reasons": dict(imitate_left)},
        "loss_limit_nats": limit,
    }
    write_json(folder / "summary.json", summary)
    return summary


def _keep(
    replies: Sequence[Reply], fault: Callable[[Reply], str | None], most: int | None = None, seed: int = 0
) -> tuple[list[Reply], Counter[str]]:
    """Replies without a fault, no (prompt, reply) twice, and how many were left out for what.

    Of more than `most`, a random sample is kept: prompt files are often sorted by topic.
    """
    good: dict[tuple[str, str], Reply] = {}
    left: Counter[str] = Counter()
    for reply in replies:
        why = fault(reply) or ("duplicate" if (reply.prompt, reply.completion) in good else None)
        if why is None:
            good[reply.prompt, reply.completion] = reply
        else:
            left[why] += 1
    kept = list(good.values())
    if most is not None and len(kept) > most:
        left["more than wanted"] = len(kept) - most
        chosen = set(random.Random(seed).sample(range(len(kept)), most))
        kept = [reply for index, reply in enumerate(kept) if index in chosen]
    return kept, left


def _example(reply: Reply, label: bool, source: str) -> Example:
    return Example(reply.prompt, reply.completion, label, reply.id, f"harvest/{source}", reply.finish == "stop")
