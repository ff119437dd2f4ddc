"""The steps in which one state of a model answers prompt sets and judges read the replies."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.core.step import Step
from tasft.data.rows import Prompt, drawn, prompts_hash
from tasft.evaluate.safety import answer, judge_answers
from tasft.judges import Judge
from tasft.judges.judging import UNKNOWN, Measure, Usual, rules
from tasft.models.engine import Engine, Reply, Sampling, replies_in


@dataclass(frozen=True)
class Asked:
    """A prompt set that is to be answered.

    Attributes:
        name: Of the set, and of its folder.
        kind: toxic or benign.
        source: Where it is from.
        prompts: All of them.
        limit: How many are asked, see `tasft.data.rows.drawn`; None asks all.
    """

    name: str
    kind: str
    source: str
    prompts: Sequence[Prompt]
    limit: int | None = None

    @property
    def chosen(self) -> list[Prompt]:
        """The prompts that are asked, in the order of the set."""
        return drawn(self.prompts, self.limit, lambda prompt: prompt.prompt)


def steps_of(
    folder: Path,
    engine: Callable[[], AbstractContextManager[Engine]],
    sets: Sequence[Asked],
    judges: Sequence[Judge],
    sampling: Sampling,
    reads: dict[str, Any],
    about: dict[str, Any],
    usual: Usual = UNKNOWN,
) -> Iterator[Step]:
    """For each set a step that answers it, in `folder/SET`, and one for each judge, in `folder/SET/JUDGE`.

    Args:
        folder: Of the state.
        engine: Gives the model in that state; only called when something is left to be answered.
        sets: What is asked.
        judges: Who reads the replies.
        sampling: How replies are drawn.
        reads: What the state depends on.
        about: What summaries say besides: recipe or model, commit.
        usual: What coherent replies are held to besides their text.
    """
    for asked in sets:
        yield from _steps_of_set(folder / asked.name, engine, asked, judges, sampling, reads, about, usual)


def _steps_of_set(
    folder: Path,
    engine: Callable[[], AbstractContextManager[Engine]],
    asked: Asked,
    judges: Sequence[Judge],
    sampling: Sampling,
    reads: dict[str, Any],
    about: dict[str, Any],
    usual: Usual,
) -> Iterator[Step]:
    # Replies to prompts that another limit leaves out do no harm: a folder is kept when that alone changes.
    keeps = reads | {
        "kind": asked.kind,
        "prompts": prompts_hash(asked.prompts),
        "sampling": asdict(sampling),
    }
    limit = {} if asked.limit is None else {"limit": asked.limit}
    chosen = asked.chosen

    def work(target: Path) -> None:
        with engine() as answering:
            described = {"name": asked.name, "kind": asked.kind, "source": asked.source}
            answer(answering, described, chosen, sampling, target)

    yield Step(folder, keeps | limit, work, keeps)

    # Asked by each judge for the same replies.
    usual = replace(
        usual,
        losses=usual.losses and _remembered(usual.losses),
        similarities=usual.similarities and _remembered(usual.similarities),
    )

    def work_of(judge: Judge, target: Path) -> None:
        path = folder / "replies.jsonl"
        rows = replies_in(path, asked.name)
        if missing := [prompt.id for prompt in chosen if prompt.id not in rows]:
            raise UserError(
                f"{path}: {len(missing)} replies are gone, that to {missing[0]!r:.40} first: remove "
                f"{folder / 'done.json'} to have them drawn again"
            )
        replies = [rows[prompt.id] for prompt in chosen]
        topics = {prompt.id: prompt.topic for prompt in chosen}
        drawn = (provenance.read_json(folder / "set.json") or {}).get("drawn")
        judge_answers(judge, replies, target, about | {"drawn": drawn}, usual, topics)

    for judge in judges:
        judged = keeps | {
            "judge": rules(judge),
            "limits": usual.limits,
            "losses": usual.reads,
        }
        filed = {"topics": provenance.content_hash([prompt.topic for prompt in asked.prompts])}
        yield Step(folder / judge.name, judged | filed | limit, partial(work_of, judge), judged)


def _remembered(measure: Measure) -> Measure:
    """The same, each reply measured once."""
    known: dict[str, float] = {}

    def measured(replies: Sequence[Reply]) -> list[float]:
        if missing := [reply for reply in replies if reply.id not in known]:
            known.update(zip((reply.id for reply in missing), measure(missing), strict=True))
        return [known[reply.id] for reply in replies]

    return measured
