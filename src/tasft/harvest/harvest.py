"""The model's own answers to toxic prompts, judged: rows to avoid, and rows that show where to go instead."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasft.core import ranks
from tasft.core.provenance import write_json, write_jsonl
from tasft.data.rows import Example, Prompt
from tasft.harvest.anchors import instructed, made, own_anchors, recoveries, varied
from tasft.harvest.contrastive import contrastive_replies
from tasft.harvest.settings import HarvestSettings
from tasft.judges import Judge, Verdict
from tasft.judges.judging import UNKNOWN, Usual, judge_more, judge_replies, verdicts_in
from tasft.models.engine import Engine, Reply, Sampling, collect, decided, replies_in, requests_for, thoughts

# The one sentence of the demo that a person wrote: prefilled anchors begin with it.
REFUSAL = "I'm sorry, but I can't help with that."
ROUND = 256  # Answers that are drawn before they are counted: enough when the wanted rows are found.


def harvest(
    engine: Engine,
    judge: Judge,
    toxic: Sequence[Prompt],
    benign: Sequence[Prompt],
    settings: HarvestSettings,
    folder: Path,
    usual: Usual = UNKNOWN,
    writer: Engine | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fill a `harvest/` folder; taken up where it was left when the folder holds replies.

    Toxic prompts are asked in an order that the seed draws, all of them once before any is asked again. `rows` says
    where to stop: what is drawn for fewer is the beginning of what is drawn for more, and their avoid rows are among
    those of more.

    Args:
        engine: The model whose answers they are.
        judge: Decides what is harmful.
        toxic: Prompts whose harmful answers become avoid rows.
        benign: Prompts whose answers become imitate rows.
        settings: See there.
        folder: Gets `replies.jsonl`, `verdicts.jsonl`, `avoid.jsonl`, `anchor.jsonl`, `imitate.jsonl`,
            `contrastive.jsonl` and `summary.json`.
        usual: What coherent replies are held to besides their text, see `tasft.judges.calibration`.
        writer: Writes and answers the prompts that only seem toxic; None is `engine`.
        seed: Of all draws.

    Returns:
        The summary: how many replies were tried and kept, and why the others were not.

    Raises:
        UserError: `instructed` anchors are wanted, and no instruction makes the model decline.
    """
    path = folder / "replies.jsonl"
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed)
    shorter = replace(sampling, max_new_tokens=settings.benign_tokens or settings.max_new_tokens)
    known = verdicts_in(folder / "verdicts.jsonl")

    def judged(replies: Sequence[Reply]) -> dict[str, Verdict]:
        verdicts = judge_more(judge, replies, folder / "verdicts.jsonl", known, usual)
        return {verdict.id: verdict for verdict in verdicts}

    def declined(replies: Sequence[Reply]) -> dict[str, bool]:
        return {name: _refuses(verdict) for name, verdict in judged(replies).items()}

    asked, answers = _answers(engine, toxic, settings, sampling, path, judged)
    own: list[Reply] = []
    if settings.self_imitate:
        own = collect(engine, requests_for(benign, mark="-own"), shorter, path, "benign")
    prefilled: list[Reply] = []
    if settings.anchors == "prefilled":
        wanted = requests_for(asked, prefix=REFUSAL, mark="-anchor")
        have = replies_in(path, "anchor")
        for start in range(0, len(wanted), ROUND):
            prefilled += collect(engine, wanted[start : start + ROUND], sampling, path, "anchor", have)
    under_instruction: list[Reply] = []
    instructions: list[dict[str, Any]] = []
    if settings.anchors == "instructed":
        answer_verdicts = judged(answers)
        given = {
            reply.prompt
            for reply in answers
            if not _fault(answer_verdicts[reply.id]) and answer_verdicts[reply.id].harmful
        }
        answered = [prompt for prompt in asked if prompt.prompt in given]
        under_instruction, instructions = instructed(
            engine, asked, answered, settings.instructions, sampling, path, declined
        )
    own_made = made(own_anchors(settings.own_anchors), engine, asked, sampling, path) if settings.own_anchors else []
    contrastive: list[Reply] = []
    figures: dict[str, Any] = {}
    if settings.contrastive:
        contrastive, figures = contrastive_replies(
            writer or engine, toxic, benign, settings.contrastive, sampling, path
        )
    others = own + prefilled + under_instruction + own_made + contrastive
    final = judge_replies(judge, answers + others, folder / "verdicts.jsonl", usual)
    verdicts = {verdict.id: verdict for verdict in final}

    def harmful(reply: Reply) -> str | None:
        return _fault(verdicts[reply.id]) or (None if verdicts[reply.id].harmful else "not harmful")

    def harmless(reply: Reply) -> str | None:
        return _fault(verdicts[reply.id]) or ("harmful" if verdicts[reply.id].harmful else None)

    def coherent(reply: Reply) -> str | None:
        # The prompts are benign by the user's word; judges err most on those that only seem toxic.
        return None if verdicts[reply.id].coherent else verdicts[reply.id].reason

    def refusing(reply: Reply) -> str | None:
        return harmless(reply) or (None if verdicts[reply.id].refusal else "not a refusal")

    def answering(reply: Reply) -> str | None:
        return harmless(reply) or ("refusal" if verdicts[reply.id].refusal else None)

    position = {prompt.prompt: number for number, prompt in enumerate(toxic)}

    def ordered(replies: Sequence[Reply]) -> list[Reply]:
        """In the order of the prompt file, whichever were asked first."""
        return sorted(replies, key=lambda reply: (position[reply.prompt], reply.sample, reply.id))

    anchored = {
        "none": [],
        "own": answers,
        "prefilled": prefilled,
        "instructed": under_instruction,
        "python": own_made,
    }[settings.anchors]
    test = harmless if settings.anchors == "own" else refusing
    avoid, counts = _keep(answers, harmful, settings.rows)
    kept = {
        "avoid": (ordered(avoid), counts),
        "anchor": _keep(ordered(anchored), test, settings.anchor_rows, seed, settings.anchors == "instructed"),
        "imitate": _keep(own, coherent),
        "contrastive": _keep(contrastive, answering),
    }
    rows = {name: [_example(reply, name != "avoid", name) for reply in replies] for name, (replies, _) in kept.items()}
    again = recoveries(rows["avoid"], rows["anchor"], settings.recover, seed) if settings.recover else []
    summary = {
        "judge": judge.name,
        "prompts": len(asked),
        "wanted": settings.rows,
        **kept["avoid"][1],
        "anchors": {"mode": settings.anchors, "instructions": instructions, "recoveries": len(again)}
        | kept["anchor"][1],
        "imitate": kept["imitate"][1],
        "contrastive": figures | kept["contrastive"][1],
        "thoughts": thoughts(answers + others),
        "drawn": decided(engine, sampling),
    }
    if ranks.is_first():
        rows["anchor"] += again
        for name, examples in rows.items():
            write_jsonl(folder / f"{name}.jsonl", [example.row() for example in examples])
        write_json(folder / "summary.json", summary)
    return summary


def statement(summary: dict[str, Any]) -> str:
    """What was found, and what is missing, in one line."""
    kept, wanted = summary["kept"], summary["wanted"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary["reasons"].items()) or "none left out"
    line = f"{kept} of {wanted} rows to avoid, from {summary['tried']} answers to {summary['prompts']} prompts"
    tried = summary["anchors"]["instructions"]
    best = max(tried, key=lambda trial: trial["rate"], default=None)
    flips = (
        f"; {sum(trial['used'] for trial in tried)} of {len(tried)} instructions serve, under the best the model "
        f"declines {best['flipped']} of {best['asked']} prompts"
        if best
        else ""
    )
    missing = "" if kept >= wanted else "; for more of them give more data.toxic_prompts or harvest.samples"
    unfinished = summary["thoughts"]["unfinished"]
    cut = (
        f"; {unfinished} replies were cut within the thought before their answer: raise harvest.max_new_tokens, or "
        "have the model answer at once, as by model.chat_template_kwargs: {enable_thinking: false}"
    )
    return f"{line} ({reasons}){missing}{flips}{cut if unfinished else ''}"


def _answers(
    engine: Engine,
    toxic: Sequence[Prompt],
    settings: HarvestSettings,
    sampling: Sampling,
    path: Path,
    judged: Callable[[Sequence[Reply]], dict[str, Verdict]],
) -> tuple[list[Prompt], list[Reply]]:
    """Prompts and their answers, as they were asked: rounds of them, until enough are harmful."""
    prompts = random.Random(sampling.seed).sample(toxic, len(toxic))
    requests = requests_for(prompts, samples=settings.samples)
    requests.sort(key=lambda request: request.sample)
    answers: list[Reply] = []
    harmful: set[tuple[str, str]] = set()
    # All is read once: of many rounds each would read what all before it have written.
    have = replies_in(path, "toxic")
    for start in range(0, len(requests), ROUND):
        drawn = collect(engine, requests[start : start + ROUND], sampling, path, "toxic", have)
        answers += drawn
        verdicts = judged(drawn)
        harmful |= {
            (reply.prompt, reply.completion)
            for reply in drawn
            if verdicts[reply.id].harmful and verdicts[reply.id].coherent
        }
        if len(harmful) >= settings.rows:
            break
    return prompts[: len(answers)], answers


def _refuses(verdict: Verdict) -> bool:
    """Whether a reply is a coherent refusal without harm."""
    return not _fault(verdict) and not verdict.harmful and bool(verdict.refusal)


def _fault(verdict: Verdict) -> str | None:
    """Why a reply is of no use whether it harms or not."""
    if not verdict.coherent:
        return verdict.reason
    return ("undecided" if verdict.undecided else "no verdict") if verdict.harmful is None else None


def _keep(
    replies: Sequence[Reply],
    fault: Callable[[Reply], str | None],
    most: int | None = None,
    seed: int | None = None,
    vary: bool = False,
) -> tuple[list[Reply], dict[str, Any]]:
    """Replies without a fault, no (prompt, reply) twice; how many were tried, kept, and left out for what.

    Of more than `most` the first are kept; with a seed a random sample, as prompt files are often sorted by topic; with
    `vary` those whose openings vary most.
    """
    good: dict[tuple[str, str], Reply] = {}
    left: Counter[str] = Counter()
    for reply in replies:
        reason = ("no reply" if reply.note else fault(reply)) or (
            "duplicate" if (reply.prompt, reply.completion) in good else None
        )
        if reason is None:
            good[reply.prompt, reply.completion] = reply
        else:
            left[reason] += 1
    kept = list(good.values())
    if most is not None and len(kept) > most:
        left["more than wanted"] = len(kept) - most
        if vary:
            kept = varied(kept, most)
        else:
            chosen = set(range(most) if seed is None else random.Random(seed).sample(range(len(kept)), most))
            kept = [reply for index, reply in enumerate(kept) if index in chosen]
    return kept, {"tried": len(replies), "kept": len(kept), "reasons": dict(left)}


def _example(reply: Reply, label: bool, source: str) -> Example:
    return Example(
        reply.prompt,
        reply.completion,
        label,
        reply.id,
        f"harvest/{source}",
        ends=reply.finish == "stop",
        retain=source in ("imitate", "contrastive"),
    )
