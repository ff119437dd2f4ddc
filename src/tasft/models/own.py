"""An engine of one's own."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tasft.core.errors import UserError
from tasft.core.parts import Own
from tasft.data.rows import Messages
from tasft.data.settings import PromptFormat
from tasft.models.engine import Reply, Request, Sampling, derived_seed
from tasft.models.server import ServerEngine
from tasft.models.server_settings import PythonEngine, Server

TOGETHER = 32


def engine_of(settings: Server | PythonEngine, prompt_format: PromptFormat = "chat") -> "ServerEngine | OwnEngine":
    """Who answers, as a recipe says it."""
    return OwnEngine(settings) if isinstance(settings, PythonEngine) else ServerEngine(settings, prompt_format)


def decided_by(settings: Server | PythonEngine | None) -> dict[str, Any] | None:
    """What replies depend on of who answers, as JSON; wherever a server is, its model is the same."""
    if isinstance(settings, PythonEngine):
        return OwnEngine(settings).decides()
    return settings.model_dump(include={"model", "body"}) if settings else None


class OwnEngine:
    """A function or an object that is called with prompts and a `Sampling`, and gives back a text for each prompt.

    A prompt is text, or chat messages where a model is asked to go on with a conversation. It is asked 32 at a time,
    each time with another seed.

    Raises:
        UserError: It cannot be had, or does not take prompts and sampling; when it answers, what it gives back is
            something else, or a reply is to begin with a text that is given.
    """

    def __init__(self, settings: PythonEngine) -> None:
        self._part = Own("engines", settings, lambda _: ["prompts", "sampling"])

    def decides(self) -> dict[str, str]:
        """What replies depend on besides their sampling."""
        return {"engine": self._part.where, "version": self._part.version}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """Yield replies, a batch at a time; each batch depends on its own requests alone."""
        if any(request.prefix for request in requests):
            raise UserError(
                f"{self._part.where} cannot go on from a text that is given: take harvest.anchors: instructed or own"
            )
        for start in range(0, len(requests), TOGETHER):
            batch = requests[start : start + TOGETHER]
            if all(request.id in done for request in batch):
                continue
            seed = derived_seed(sampling.seed, [request.id for request in batch])
            texts = self.complete([request.prompt for request in batch], Sampling(**vars(sampling) | {"seed": seed}))
            yield [
                Reply(request.id, name, request.prompt, text, "stop", seed, request.sample)
                for request, text in zip(batch, texts, strict=True)
                if request.id not in done
            ]

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """What it writes after each prompt, in their order."""
        texts = self._part.one_each(self._part(list(prompts), sampling), prompts, "replies")
        if strange := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"{self._part.where} gave back {strange[0]!r:.40}; a reply is text, which may be empty")
        return texts
