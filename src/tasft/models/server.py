"""The engine that asks an OpenAI-compatible server."""

import json
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tasft.core import ranks
from tasft.core.errors import UserError
from tasft.data.rows import Messages
from tasft.data.settings import PromptFormat
from tasft.data.template import ALPACA, answer_in
from tasft.models.engine import NoReply, Reply, Request, Sampling, derived_seed

if TYPE_CHECKING:
    from tasft.models.requests import Answer, Asker
from tasft.models.server_settings import Server


class ServerEngine:
    """Replies of a server: any that speaks OpenAI's chat completions (style chat) or completions (alpaca).

    Whatever a request does not say is the server's own choice: top_k, penalties, the chat template and its settings;
    `Server.body` adds fields. Each request has a seed, which makes a reply repeatable where the server honours it; few
    do so in full, since what else they answer at the time changes their arithmetic.

    A prefix is sent, in style chat, as an assistant's message to go on from (`continue_final_message`, which vLLM,
    SGLang, TGI and llama.cpp know). Others refuse the field or pass over it; then the reply is a new turn that follows
    the prefix, and nothing here can tell.

    Several processes share the requests, and `concurrency` too.

    Args:
        server: Where.
        style: How prompts are written; messages and raw text of `complete` are what they are.

    Raises:
        UserError: The packages of `tasft[server]` are not installed.
    """

    def __init__(self, server: Server, style: PromptFormat = "chat") -> None:
        self.server = server
        self.style: PromptFormat = style
        self._asker = self._made_asker()

    def decides(self) -> dict[str, Any]:
        """As `Deciding.decides`."""
        return {"server": self.server.model}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """As `Engine.generate`; a reply is given on as soon as it is there.

        Raises:
            UserError: A server refuses all requests or too many of them, or none answers any more.
        """
        wanted = [request for request in requests if request.id not in done]
        seeds = [self._seed(sampling, request.id) for request in wanted]
        bodies = [
            self._body(self._written(request), sampling, seed, request.prefix)
            for request, seed in zip(wanted, seeds, strict=True)
        ]
        for answers in self._answers([request.id for request in wanted], bodies):
            yield [self._reply(wanted[answer.number], answer, name, seeds[answer.number]) for answer in answers]

    def _reply(self, request: Request, answer: "Answer", name: str, seed: int) -> Reply:
        written = answer_in("" if answer.note else request.prefix + answer.text)
        return Reply(
            request.id,
            name,
            request.prompt,
            written.answer,
            answer.finish,
            seed,
            request.sample,
            thought=answer.thought or written.thought,
            note=answer.note,
        )

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """As `Engine.complete`: messages by chat completions, text by completions.

        Raises:
            UserError: As `generate`.
        """
        names = [str(index) for index in range(len(prompts))]
        seeds = [self._seed(sampling, name) for name in names]
        bodies = [self._body(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        texts = {
            answer.number: NoReply(answer.note) if answer.note else answer.text
            for answers in self._answers(names, bodies)
            for answer in answers
        }
        return [texts[index] for index in range(len(prompts))]

    def _written(self, request: Request) -> str | Messages:
        if self.style == "alpaca":
            return ALPACA.format(instruction=request.prompt) + request.prefix
        asked = [{"role": "user", "content": request.prompt}]
        return [*asked, {"role": "assistant", "content": request.prefix}] if request.prefix else asked

    def _body(self, prompt: str | Messages, sampling: Sampling, seed: int, prefix: str = "") -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.server.model,
            "prompt" if isinstance(prompt, str) else "messages": prompt,
            # Not max_completion_tokens, which Ollama and older servers pass over.
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }
        if prefix and not isinstance(prompt, str):
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        body = {name: value for name, value in (body | self.server.body).items() if value is not None}
        # Half of a surrogate pair, which JSON lets a file hold, cannot be sent.
        whole: dict[str, Any] = json.loads(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
        return whole

    def _seed(self, sampling: Sampling, request_id: str) -> int:
        # Not more than every server takes.
        return derived_seed(sampling.seed, [request_id]) >> 1

    def _made_asker(self) -> "Asker":
        try:
            from tasft.models.requests import Asker, Tally
        except ImportError as error:
            if (error.name or "tasft").startswith("tasft"):
                raise
            raise UserError(
                f"a server needs the package {error.name}, which is missing: pip install '.[server]'"
            ) from None
        return Asker(self.server, self.server.key(), Tally(self.server.max_refused))

    def _answers(self, names: Sequence[str], bodies: Sequence[dict[str, Any]]) -> Iterator[list["Answer"]]:
        """Each answer as it comes; several processes wait for each other after some."""
        from tasft.models.requests import Question

        asker = self._asker
        questions = [Question(number, *pair) for number, pair in enumerate(zip(names, bodies, strict=True))]
        if ranks.world_size() == 1:
            yield from ([answer] for answer in asker.answers(questions))
            return
        together = 4 * self.server.concurrency * len(self.server.urls)
        parts = [questions[start : start + together] for start in range(0, len(questions), together)]
        yield from ranks.share(parts, lambda part: list(asker.answers(part)))
