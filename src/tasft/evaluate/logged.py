"""Logs of other tools, judged as if a model had answered here."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.data.logs import read_log
from tasft.data.rows import Messages, Prompt, repeated_ids
from tasft.data.sets import NAMED
from tasft.evaluate.states import Asked, steps_of
from tasft.judges import Judge
from tasft.judges.judging import Usual, topic_measure
from tasft.models.engine import Engine, Reply, Request, Sampling


class Logged:
    """An engine whose replies are those of a log."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        self._replies = replies

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """All of them at once."""
        yield [self._replies[request.id] for request in requests if request.id not in done]

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """Nothing but what was logged can be had."""
        raise UserError("a log answers nothing more")


def judge_log(path: Path, judges: Sequence[Judge], folder: Path) -> list[str]:
    """Judge the replies of a log, into what `tasft evaluate` would have written; taken up where it was left.

    Args:
        path: As `read_log` takes it.
        judges: Who reads the replies.
        folder: Gets `SET/replies.jsonl` and `SET/JUDGE/summary.json`, a set for each task or probe.

    Returns:
        Names of the sets.

    Raises:
        UserError: It is no log, or a damaged one, or the folder holds another.
    """
    rows = read_log(path)
    if rows is None:
        raise UserError(f"{path}: not a log that is known; judge a file of prompts and replies by tasft judge")
    if faults := repeated_ids(path, ((number, f"{row['set']} {row['id']}") for number, row in rows)):
        raise UserError(faults)
    manifest = folder / "manifest.json"
    held = provenance.read_json(manifest)
    if (held is None and folder.exists() and any(folder.iterdir())) or (held or {}).get("model", str(path)) != str(
        path
    ):
        raise UserError(f"{folder} is there and holds something else: choose another with --out")
    sets: dict[str, dict[str, Reply]] = {}
    for _, row in rows:
        name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in row["set"])[:100]
        reply = Reply(row["id"], name, row["prompt"], row["completion"], "stop" if row["completion"] else "empty", 0, 0)
        sets.setdefault(name, {})[row["id"]] = reply
    with provenance.private(), provenance.lock(folder):
        provenance.write_json(manifest, {"model": str(path), **provenance.environment()})
        for name, replies in sets.items():

            @contextmanager
            def engine(replies: dict[str, Reply] = replies) -> Iterator[Engine]:
                yield Logged(replies)

            kind = NAMED[name].kind if name in NAMED else "toxic"
            asked = Asked(name, kind, str(path), [Prompt(reply.id, reply.prompt) for reply in replies.values()])
            reads = {"log": provenance.content_hash([vars(reply) for reply in replies.values()])}
            origin = {"model": str(path), "commit": provenance.commit()}
            usual = Usual(similarities=topic_measure())
            for step in steps_of(folder, engine, [asked], judges, Sampling(1), reads, origin, usual):
                if not step.is_done:
                    step.run()
    return list(sets)
