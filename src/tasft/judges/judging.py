"""A judge at work on replies: resumable, each pair judged once, coherence included."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from tasft import launch
from tasft.coherence import VERSION, incoherence
from tasft.engines import Reply
from tasft.judges.base import Judge, Pair, Verdict
from tasft.provenance import append_jsonl, content_hash, resume_jsonl, write_jsonl

JUDGED_TOGETHER = 32

Losses = Callable[[Sequence[Reply]], list[float]]


def rules(judge: Judge) -> str:
    """What a verdict depends on besides the pair: the judge, and what counts as coherent."""
    return f"{judge.version}, coherence {VERSION}"


def verdicts_in(path: Path) -> dict[str, Verdict]:
    """Verdicts that a `verdicts.jsonl` holds, by their key. All processes have read when this returns."""
    known = {row["key"]: Verdict(**row) for row in resume_jsonl(path, Verdict)}
    launch.wait()  # before any process writes
    return known


def _unsent(judge: Judge, reply_id: str) -> Verdict:
    """What is said of incoherent text, which neither harms nor declines."""
    harmful, refusal, partial = (False if what in judge.tells else None for what in ("harmful", "refusal", "partial"))
    return Verdict(reply_id, judge.name, harmful, None, refusal, partial=partial)


def judge_reply(judge: Judge, prompt: str, reply: str) -> Verdict:
    """The verdict on one reply, coherence of its text included, as `judge_replies` has it; nothing is written."""
    why = incoherence(prompt, reply)
    verdict = _unsent(judge, "") if why else judge.judge([Pair("", prompt, reply)])[0]
    return replace(verdict, coherent=why is None, reason=verdict.reason or why or "")


def judge_replies(
    judge: Judge,
    replies: Sequence[Reply],
    path: Path,
    losses: Losses | None = None,
    limit_nats: float | None = None,
    every: bool = False,
) -> list[Verdict]:
    """Verdicts on replies, coherence included, appended to a file as they come.

    A reply that its text alone shows to be incoherent is not sent to the judge: it neither harms nor declines, and is
    not safe and coherent either. A pair that the file holds a verdict of this judge on is not judged again, whatever
    its id: verdicts are known by content.

    Args:
        judge: Who tells harm and refusal.
        replies: In the order of the result.
        path: A `verdicts.jsonl`. In the end it has one row for each of the replies.
        losses: Mean loss of some replies under the untouched model, in nats per token; asked for coherent text alone.
        limit_nats: A loss above it makes a reply improbable; None leaves that check out.
        every: Send the incoherent ones too, to see what the judge makes of them.
    """
    found = judge_more(judge, replies, path, verdicts_in(path), losses, limit_nats, every)
    launch.wait()  # The first has written.
    rows = resume_jsonl(path)
    ids = {reply.id for reply in replies}
    wanted = [row for row in rows if row["id"] not in ids] + [asdict(verdict) for verdict in found]
    launch.wait()
    if launch.is_first() and rows != wanted:
        write_jsonl(path, wanted)
    return found


def judge_more(
    judge: Judge,
    replies: Sequence[Reply],
    path: Path,
    known: dict[str, Verdict],
    losses: Losses | None = None,
    limit_nats: float | None = None,
    every: bool = False,
) -> list[Verdict]:
    """As `judge_replies`, but the file is not read, and keeps verdicts that nothing asks for any more.

    Args:
        judge: As there, and the others too.
        replies: In the order of the result.
        path: New verdicts are appended.
        known: What `verdicts_in` found there; new ones are added.
        losses: As there.
        limit_nats: As there.
        every: As there.
    """
    version = [rules(judge), "every"] if every else [rules(judge)]
    keys = [content_hash([*version, reply.prompt, reply.completion]) for reply in replies]
    missing = {key: reply for key, reply in zip(keys, replies, strict=True) if key not in known}
    texts = [(key, reply, incoherence(reply.prompt, reply.completion)) for key, reply in missing.items()]
    coherent = [reply for _, reply, why in texts if why is None]
    measured = losses(coherent) if losses and limit_nats is not None and coherent else [None] * len(coherent)
    loss = {reply.id: value for reply, value in zip(coherent, measured, strict=True)}

    def work(part: Sequence[tuple[str, Reply, str | None]]) -> list[Verdict]:
        sent = [Pair(reply.id, reply.prompt, reply.completion) for _, reply, why in part if every or why is None]
        verdicts = iter(judge.judge(sent) if sent else ())
        done = []
        for key, reply, why in part:
            if why is None:
                verdict = next(verdicts)
                why = incoherence(reply.prompt, reply.completion, loss_nats=loss[reply.id], loss_limit_nats=limit_nats)
            elif every:
                verdict = next(verdicts)
            else:
                verdict = _unsent(judge, reply.id)
            reason = verdict.reason or why or ""
            done.append(replace(verdict, coherent=why is None, reason=reason, key=key))
        return done

    parts = [texts[start : start + JUDGED_TOGETHER] for start in range(0, len(texts), JUDGED_TOGETHER)]
    with tqdm(total=len(replies), initial=len(replies) - len(texts), desc=f"judge: {judge.name}", unit="reply") as bar:
        for verdicts in launch.share(parts, work):
            known.update({verdict.key: verdict for verdict in verdicts})
            if launch.is_first():
                append_jsonl(path, [asdict(verdict) for verdict in verdicts])
            bar.update(len(verdicts))
    return [replace(known[key], id=reply.id) for key, reply in zip(keys, replies, strict=True)]
