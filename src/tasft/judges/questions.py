"""Judges that put a question to a language model: what is asked, how the answer is read, who is asked."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

from tasft.core.errors import UserError
from tasft.core.provenance import content_hash
from tasft.data.rows import Messages
from tasft.judges.base import JudgeSettings, Pair, Verdict, unreadable
from tasft.judges.models import find, load, naming
from tasft.models.engine import Engine, NoReply, Sampling
from tasft.models.load import load_tokenizer, sketch
from tasft.models.local import TransformersEngine
from tasft.models.server import ServerEngine

READING = 1  # Part of every version: raised when the same answer would be read differently.


@dataclass(frozen=True)
class Answer:
    """What a model said of a pair; as in `Verdict`."""

    harmful: bool | None
    score: float | None = None
    refusal: bool | None = None
    partial: bool | None = None


@dataclass(frozen=True)
class Question:
    """How a model is asked about a pair.

    Attributes:
        ask: The prompt for a pair: text that the model reads as it stands, or messages for its chat template.
        read: What the whole answer of the model says; None when it has none of the documented forms.
        tells: As in `Judge`.
        max_new_tokens: Longest answer.
        threshold: As in `Judge`.
        model: The model that was trained to answer it; None where any may be asked.
    """

    ask: Callable[[Pair], str | Messages]
    read: Callable[[str], Answer | None]
    tells: frozenset[str]
    max_new_tokens: int
    threshold: float | None = None
    model: str | None = None


def prompt_text(name: str) -> str:
    """A text of `judges/prompts`, where SOURCES.md says where each comes from."""
    return resources.files("tasft.judges").joinpath("prompts", name).read_text(encoding="utf-8")


def fill(template: str, pair: Pair) -> str:
    """The text with the pair at `{prompt}` and `{reply}`; braces in the pair mean nothing."""
    values = {"{prompt}": pair.prompt, "{reply}": pair.completion}
    return re.sub(r"\{prompt\}|\{reply\}", lambda match: values[match[0]], template)


def yes_or_no(answer: str) -> Answer | None:
    """Yes is harmful: `yes` or `no` in any case, with white space around it and a full stop after it or not."""
    match = re.fullmatch(r"(yes|no)\.?", answer.strip().lower())
    return Answer(match[1] == "yes") if match else None


class AskingJudge:
    """One question about each pair, answered greedily.

    The model is loaded in this process when the first pair is judged, or asked through a server.

    Args:
        settings: Where the model is.
        question: What it is asked.

    Raises:
        UserError: There is no model to be asked, or it is not to be found.
    """

    def __init__(self, settings: JudgeSettings, question: Question) -> None:
        self.name = settings.kind
        self.tells = question.tells
        self.threshold = question.threshold
        self._settings = settings
        self._question = question
        self._model = settings.model or question.model
        asked = question.ask(Pair("", "{prompt}", "{reply}"))
        self.version = content_hash(
            [settings.kind, self._who(), asked, question.max_new_tokens, question.threshold, READING]
        )

    def _who(self) -> list[Any]:
        server = self._settings.server
        if server is not None:
            if self._settings.model is not None:
                raise UserError(f"judge {self.name}: it has a model and a server; leave out model, for server.model")
            return [server.model, server.body]
        if self._model is None:
            raise UserError(
                f"judge {self.name}: it has neither a server nor a model: give it one, the model to run in this process"
            )
        return find(self.name, self._model)

    @cached_property
    def _engine(self) -> Engine:
        if self._settings.server is not None:
            return ServerEngine(self._settings.server)
        assert self._model is not None
        return TransformersEngine(*load(self.name, self._model), "chat", self._settings.batch_size)

    def unread(self, prompts: Sequence[str]) -> int:
        """Of how many prompts the question is more than a model in this process reads, even with an empty reply.

        No weight is loaded for that; 0 where a server is asked.
        """
        if self._settings.server is not None or self._model is None:
            return 0
        with naming(self.name):
            engine = TransformersEngine(sketch(self._model), load_tokenizer(self._model), "chat")
        asked = [self._question.ask(Pair("", prompt, "")) for prompt in prompts]
        return len(engine.unread(asked, self._question.max_new_tokens))

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order."""
        answers = self._engine.complete(
            [self._question.ask(pair) for pair in pairs], Sampling(self._question.max_new_tokens)
        )
        return [self._verdict(pair, answer) for pair, answer in zip(pairs, answers, strict=True)]

    def _verdict(self, pair: Pair, answer: str) -> Verdict:
        if isinstance(answer, NoReply):
            return unreadable(pair, self.name, answer.note)
        read = self._question.read(answer)
        if read is None:
            return unreadable(pair, self.name, answer)
        return Verdict(pair.id, self.name, read.harmful, read.score, read.refusal, partial=read.partial)
