"""Refusals in the model's own words: it answers under an instruction, and learns the answer without it.

Source: the idea and its proof are ThinkSafe's (2026, arXiv 2601.23143); wordings, flip rate and diversity are ours.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasft.core.errors import UserError
from tasft.core.parts import Own, Part
from tasft.core.provenance import content_hash
from tasft.data.rows import Example, Prompt
from tasft.models.engine import Engine, Reply, Request, Sampling, collect

FLIP_PROMPTS = 24
LEAST_FLIPS = 0.3  # Below it a model has too little sense of harm to teach itself.
OPENING_WORDS = 4

Judged = Callable[[Sequence[Reply]], dict[str, bool]]
"""Of each reply, by id, whether it is a coherent refusal without harm."""


def mark(instruction: str) -> str:
    """What tells replies under an instruction from others to the same prompt, wherever it stands in the list."""
    return f"-instructed-{content_hash(instruction)[:8]}"


def instructed(
    engine: Engine,
    prompts: Sequence[Prompt],
    answered: Sequence[Prompt],
    instructions: Sequence[str],
    sampling: Sampling,
    path: Path,
    refuses: Judged,
) -> tuple[list[Reply], list[dict[str, Any]]]:
    """Answers under instructions, as replies to the bare prompts.

    The flip rate of an instruction is the share of `answered` prompts to which it draws a coherent refusal. It is taken
    from a few dozen of them. All prompts are asked under the best instruction, and those to which it draws no refusal
    under the next best, as long as that reaches half of the best rate.

    Args:
        engine: The model whose answers they are.
        prompts: Toxic prompts that want a refusal.
        answered: Those of them with a harmful answer of the model as it is; all are tried where there is none.
        instructions: What to choose from.
        sampling: How replies are drawn, but for the temperature, which is 0: a small model that is to follow an
            instruction loses it when it draws.
        path: A `replies.jsonl`, taken up where it was left.
        refuses: The judge.

    Returns:
        Replies, refusals or not; and of each instruction its text, how many prompts it was tried on, how many flipped,
        the rate, and whether it is used.

    Raises:
        UserError: No instruction reaches a flip rate of 30%: the model cannot teach itself.
    """

    def ask(asked: Sequence[Prompt], number: int) -> list[Reply]:
        text = instructions[number]
        requests = [Request(prompt.id + mark(text), f"{text} {prompt.prompt}") for prompt in asked]
        replies = collect(engine, requests, replace(sampling, temperature=0.0), path, "anchor")
        return [reply.to(prompt.prompt) for prompt, reply in zip(asked, replies, strict=True)]

    # Of a model that answers nothing harmfully, it is how often it declines under the instruction.
    tried = (answered or prompts)[:FLIP_PROMPTS]
    replies: dict[str, Reply] = {}
    trials: list[dict[str, Any]] = []
    for number, text in enumerate(instructions):
        drawn = ask(tried, number)
        flipped = sum(refuses(drawn).values())
        replies |= {reply.id: reply for reply in drawn}
        trials.append({"text": text, "asked": len(tried), "flipped": flipped, "rate": flipped / max(len(tried), 1)})
    best = sorted(range(len(instructions)), key=lambda number: -trials[number]["rate"])
    highest = trials[best[0]]["rate"]
    used = [number for number in best if trials[number]["rate"] >= max(LEAST_FLIPS, highest / 2)]
    for number, trial in enumerate(trials):
        trial["used"] = number in used
    if not used:
        raise UserError(
            f"harvest.anchors: under none of {len(instructions)} instructions does the model decline enough of what it "
            f"answers harmfully (at best {trials[best[0]]['flipped']} of {len(tried)}, {LEAST_FLIPS:.0%} are needed): "
            "it cannot teach itself; give other harvest.instructions, or use anchors: prefilled, or own"
        )
    for number in used:
        good = refuses(list(replies.values()))
        done = {reply.prompt for reply in replies.values() if good[reply.id]}
        drawn = ask([prompt for prompt in prompts if prompt.prompt not in done], number)
        replies |= {reply.id: reply for reply in drawn}
    return list(replies.values()), trials


def own_anchors(part: Part) -> Own:
    """A maker of anchors of one's own: called with prompts and `ask`, it gives back a refusal, or None, for each.

    `ask` takes texts and gives back the model's answers to them, drawn as the harvest's.
    """
    return Own("anchors", part, lambda _: ["prompts", "ask"])


def made(own: Own, engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, path: Path) -> list[Reply]:
    """What a maker of one's own gives, as replies to the prompts; what the model is asked is kept in `path`."""

    def ask(texts: Sequence[str]) -> list[str]:
        requests = [Request(f"own-{content_hash(text)}", text) for text in dict.fromkeys(texts)]
        completions = {
            reply.prompt: reply.completion for reply in collect(engine, requests, sampling, path, "own anchor")
        }
        return [completions[text] for text in texts]

    given = [prompt.prompt for prompt in prompts]
    anchors = own.one_each(own(given, ask), given, "anchors")
    if strange := [anchor for anchor in anchors if not isinstance(anchor, str | None)]:
        raise UserError(f"{own.where} gave back {strange[0]!r:.40}; an anchor is text, or None for none")
    return [
        Reply(f"{prompt.id}-made", "anchor", prompt.prompt, text, "stop", sampling.seed, 0)
        for prompt, text in zip(prompts, anchors, strict=True)
        if text
    ]


def recoveries(avoid: Sequence[Example], anchors: Sequence[Example], most: int, seed: int) -> list[Example]:
    """Refusals that come after a harmful answer has begun: rows to imitate, of which only the refusal is learned.

    Each anchor whose prompt has a harmful answer goes on from the first words of that answer, 1 to `most` of them by
    chance.

    Source: Qi et al. 2024 (arXiv 2406.05946, section 4), there with refusals of another model.
    """
    answers = {row.prompt: row.completion for row in avoid if isinstance(row.prompt, str)}
    rows = []
    for anchor in anchors:
        answer = answers.get(str(anchor.prompt))
        if answer is None:
            continue
        words = random.Random(f"{seed} {anchor.id}").randint(1, most)
        given = " ".join(str(answer).split(" ")[:words]) + " "
        rows.append(replace(anchor, id=f"{anchor.id}-recovery", completion=given + str(anchor.completion), given=given))
    return rows


def varied(replies: Sequence[Reply], most: int) -> list[Reply]:
    """So many of them, in their order, with openings of four words as varied as can be.

    Of each opening the first reply is taken, then of each the second, and so on.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    turns = []
    for index, reply in enumerate(replies):
        opening = tuple(reply.completion.lower().split()[:OPENING_WORDS])
        turns.append((seen[opening], index))
        seen[opening] += 1
    return [replies[index] for index in sorted(index for _, index in sorted(turns)[:most])]
