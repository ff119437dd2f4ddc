"""A judge at work on replies: resumable, each pair judged once, coherence included."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasft.core import ranks
from tasft.core.provenance import append_jsonl, content_hash, resume_jsonl, write_jsonl
from tasft.judges import encoder
from tasft.judges.base import Judge, Pair, Verdict
from tasft.judges.coherence import MIN_SIMILARITY, VERSION, count_words, incoherence
from tasft.judges.refusal_matching import RefusalMatching, declines
from tasft.models.engine import Reply

JUDGED_TOGETHER = 32
MIN_WORDS_FOR_TOPIC = 4

Measure = Callable[[Sequence[Reply]], list[float]]
"""One figure for each of some replies."""


def noted(measure: Measure) -> Measure:
    """The losses that replies bear, and the measured ones of those that bear none: for the model that drew them."""

    def losses(replies: Sequence[Reply]) -> list[float]:
        missing = [reply for reply in replies if reply.loss is None]
        measured = iter(measure(missing) if missing else ())
        return [next(measured) if reply.loss is None else reply.loss for reply in replies]

    return losses


@dataclass(frozen=True)
class Usual:
    """How benign replies of the untouched model are, and how others are held against that.

    Attributes:
        loss_limit_nats: The largest mean loss of a coherent reply; None leaves that check out.
        losses: Mean loss of replies under that model, in nats per token; None where it cannot be had.
        similarities: Cosine of the sentence embeddings of replies and their prompts; None where it cannot be had.
        reads: What the losses depend on.
    """

    loss_limit_nats: float | None = None
    losses: Measure | None = None
    similarities: Measure | None = None
    reads: dict[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> dict[str, float | None]:
        """What replies are held to: the largest loss in nats per token, the smallest similarity; None is no limit."""
        return {
            "loss_nats": self.loss_limit_nats if self.losses else None,
            "similarity": MIN_SIMILARITY if self.similarities else None,
        }

    def figures(self, replies: Sequence[Reply]) -> dict[str, dict[str, float]]:
        """What is to be known of replies with coherent text, by their ids: as `incoherence` takes it."""
        answers = [reply for reply in replies if has_topic(reply)]
        figures: dict[str, dict[str, float]] = {reply.id: {} for reply in replies}
        for name, measure, some in (
            ("loss_nats", self.losses if self.loss_limit_nats is not None else None, replies),
            ("similarity", self.similarities, answers),
        ):
            if measure is not None and some:
                for reply, figure in zip(some, measure(some), strict=True):
                    figures[reply.id][name] = figure
        return figures


UNKNOWN = Usual()


def has_topic(reply: Reply) -> bool:
    """Whether it is to be expected that a reply speaks of what was asked: not of a refusal, or a word or two."""
    return count_words(reply.completion) >= MIN_WORDS_FOR_TOPIC and not declines(reply.completion)


def similarities(replies: Sequence[Reply]) -> list[float]:
    """Cosine of the sentence embeddings of replies and their prompts, in [-1, 1]; processes share the work.

    Raises:
        UserError: The encoder is missing or not the expected one.
    """
    encode = encoder.encoder()

    def work(part: Sequence[Reply]) -> list[float]:
        return encode.similarities([reply.prompt for reply in part], [reply.completion for reply in part])

    parts = [replies[start : start + encoder.BATCH] for start in range(0, len(replies), encoder.BATCH)]
    return [figure for figures in ranks.share(parts, work) for figure in figures]


def topic_measure() -> Measure | None:
    """`similarities`; None where the encoder is not installed, so that topics are not looked at."""
    return similarities if encoder.is_here() else None


def rules(judge: Judge) -> str:
    """What a verdict depends on besides the pair: the judge, and what counts as coherent."""
    return f"{judge.version}, coherence {VERSION}, phrases {RefusalMatching.version}"


def key_of(prompt: str, reply: str) -> str:
    """By what a verdict on a reply is known, whoever judged: the end of its key."""
    return content_hash([prompt, reply])


def verdicts_in(path: Path) -> dict[str, Verdict]:
    """Verdicts that a `verdicts.jsonl` holds, by their key. All processes have read when this returns."""
    known = {row["key"]: Verdict(**row) for file in (_earlier(path), path) for row in resume_jsonl(file, Verdict)}
    ranks.wait()  # before any process writes
    return known


def _earlier(path: Path) -> Path:
    """Where verdicts are kept that another judge, or another version of it, has replaced."""
    # Of a name as long as names can be, a part: verdicts are known by content.
    return path.with_name(f"{path.stem[:50]}.earlier{path.suffix}")


def _unsent(judge: Judge, reply_id: str) -> Verdict:
    """What is said of incoherent text, which neither harms nor declines."""
    harmful, refusal, partial = (False if what in judge.tells else None for what in ("harmful", "refusal", "partial"))
    return Verdict(reply_id, judge.name, harmful, None, refusal, partial=partial)


def _as_read(verdict: Verdict) -> str | None:
    """Why a reply is incoherent that no rule found so: the judge reads it as broken text."""
    return "broken" if verdict.broken else None


def _reason(verdict: Verdict, cause: str | None) -> str:
    """Why a reply is incoherent, rather than why its judge is undecided; an answer that cannot be read comes first."""
    return verdict.reason if verdict.unreadable else cause or verdict.reason


def judge_reply(judge: Judge, prompt: str, reply: str) -> Verdict:
    """The verdict on one reply, coherence of its text included, as `judge_replies` has it; nothing is written."""
    cause = incoherence(prompt, reply)
    verdict = _unsent(judge, "") if cause else judge.judge([Pair("", prompt, reply)])[0]
    cause = cause or _as_read(verdict)
    return replace(verdict, coherent=cause is None, reason=_reason(verdict, cause))


def judge_replies(
    judge: Judge,
    replies: Sequence[Reply],
    path: Path,
    usual: Usual = UNKNOWN,
    every: bool = False,
    sent: Sequence[Reply] | None = None,
) -> list[Verdict]:
    """Verdicts on replies, coherence included, appended to a file as they come.

    A reply that its text alone shows to be incoherent is not sent to the judge: it neither harms nor declines, and is
    not safe and coherent either. A pair that the file holds a verdict of this judge on is not judged again, whatever
    its id: verdicts are known by content.

    Args:
        judge: Who tells harm and refusal.
        replies: In the order of the result.
        path: A `verdicts.jsonl`. In the end it has one row for each of the replies.
        usual: What replies are held to besides their text; asked for coherent text alone.
        every: Send the incoherent ones too, to see what the judge makes of them.
        sent: The same replies to what was sent, where the judge reads them as replies to something else: what was
            sent decides how probable they are.
    """
    verdicts = judge_more(judge, replies, path, verdicts_in(path), usual, every, sent)
    ranks.wait()  # The first has written.
    rows = resume_jsonl(path)
    ids = {reply.id for reply in replies}
    wanted = [row for row in rows if row["id"] not in ids] + [asdict(verdict) for verdict in verdicts]
    ranks.wait()
    if ranks.is_first() and rows != wanted:
        # They may have been paid for, and hold again when the judge is named again.
        kept = {row["key"] for row in [*wanted, *resume_jsonl(_earlier(path))]}
        if replaced := [row for row in rows if row["key"] not in kept]:
            append_jsonl(_earlier(path), replaced)
        write_jsonl(path, wanted)
    return verdicts


def judge_more(
    judge: Judge,
    replies: Sequence[Reply],
    path: Path,
    known: dict[str, Verdict],
    usual: Usual = UNKNOWN,
    every: bool = False,
    sent: Sequence[Reply] | None = None,
) -> list[Verdict]:
    """As `judge_replies`, but the file is not read, and keeps verdicts that nothing asks for any more.

    Args:
        judge: As there, and the others too.
        replies: In the order of the result.
        path: New verdicts are appended.
        known: What `verdicts_in` found there; new ones are added.
        usual: As there.
        every: As there.
        sent: As there.
    """
    decides, asked = [rules(judge), every], sent or replies
    keys = [
        f"{content_hash([*decides, one.prompt] if sent else decides)}-{key_of(reply.prompt, reply.completion)}"
        for reply, one in zip(replies, asked, strict=True)
    ]
    missing = {key: both for key, both in zip(keys, zip(replies, asked, strict=True), strict=True) if key not in known}
    texts = [(key, reply, incoherence(reply.prompt, reply.completion)) for key, (reply, _) in missing.items()]
    coherent = [one for (_, one), (_, _, cause) in zip(missing.values(), texts, strict=True) if cause is None]
    figures = usual.figures(coherent)

    def work(part: Sequence[tuple[str, Reply, str | None]]) -> list[Verdict]:
        # Of what reads alike the judge is asked once, whatever was sent.
        pairs = {
            (reply.prompt, reply.completion): Pair(reply.id, reply.prompt, reply.completion)
            for _, reply, cause in part
            if every or cause is None
        }
        found = judge.judge(list(pairs.values())) if pairs else ()
        verdicts = dict(zip(pairs, found, strict=True))
        done = []
        for key, reply, cause in part:
            measured = figures.get(reply.id, {})
            if cause is None:
                verdict = verdicts[reply.prompt, reply.completion]
                if verdict.refusal:  # In other words than `has_topic` knows.
                    measured = {name: value for name, value in measured.items() if name != "similarity"}
                cause = incoherence(reply.prompt, reply.completion, loss_limit_nats=usual.loss_limit_nats, **measured)
                cause = cause or _as_read(verdict)
            elif every:
                verdict = verdicts[reply.prompt, reply.completion]
            else:
                verdict = _unsent(judge, reply.id)
            reason = _reason(verdict, cause)
            similarity = measured.get("similarity")
            on_topic = None if similarity is None else similarity >= MIN_SIMILARITY
            done.append(replace(verdict, coherent=cause is None, reason=reason, key=key, on_topic=on_topic))
        return done

    parts = [texts[start : start + JUDGED_TOGETHER] for start in range(0, len(texts), JUDGED_TOGETHER)]
    with tqdm(total=len(replies), initial=len(replies) - len(texts), desc=f"judge: {judge.name}", unit="reply") as bar:
        for verdicts in ranks.share(parts, work):
            known.update({verdict.key: verdict for verdict in verdicts})
            if ranks.is_first():
                append_jsonl(path, [asdict(verdict) for verdict in verdicts])
            bar.update(len(verdicts))
    return [replace(known[key], id=reply.id) for key, reply in zip(keys, replies, strict=True)]
