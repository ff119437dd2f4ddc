"""A judge at work on the replies of a run: resumable, coherence included."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from tasft.coherence import incoherence
from tasft.engines import Reply
from tasft.judges.base import Judge, Pair, Verdict
from tasft.provenance import append_jsonl, resume_jsonl

JUDGED_TOGETHER = 32


def judge_replies(
    judge: Judge,
    replies: Sequence[Reply],
    losses_nats: Sequence[float],
    limit_nats: float | None,
    path: Path,
) -> list[Verdict]:
    """Verdicts on replies, coherence included, appended to a file as they come.

    Verdicts that the file holds already are kept.

    Args:
        judge: Who tells harm and refusal.
        replies: In the order of the result.
        losses_nats: Mean loss of each under the untouched model.
        limit_nats: A loss above it makes a reply improbable; None leaves that check out.
        path: A `verdicts.jsonl`.
    """
    have = {row["id"]: Verdict(**row) for row in resume_jsonl(path)}
    missing = [(reply, loss) for reply, loss in zip(replies, losses_nats, strict=True) if reply.id not in have]
    known = len(replies) - len(missing)
    with tqdm(total=len(replies), initial=known, desc=f"judge: {judge.name}", unit="reply") as bar:
        for start in range(0, len(missing), JUDGED_TOGETHER):
            batch = missing[start : start + JUDGED_TOGETHER]
            verdicts = judge.judge([Pair(reply.id, reply.prompt, reply.completion) for reply, _ in batch])
            for (reply, loss), verdict in zip(batch, verdicts, strict=True):
                why = incoherence(reply.prompt, reply.completion, loss_nats=loss, loss_limit_nats=limit_nats)
                have[reply.id] = replace(verdict, coherent=why is None, reason=verdict.reason or why or "")
            append_jsonl(path, [asdict(have[reply.id]) for reply, _ in batch])
            bar.update(len(batch))
    return [have[reply.id] for reply in replies]
