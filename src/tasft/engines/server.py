"""The engine that asks an OpenAI-compatible server."""

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tasft import launch
from tasft.data import Messages
from tasft.encode import ALPACA, PromptFormat
from tasft.engines.base import Reply, Request, Sampling, derived_seed
from tasft.errors import UserError
from tasft.redact import named_like_a_key

if TYPE_CHECKING:
    from tasft.engines.asking import Answer, Asker

Number = Annotated[float, Field(strict=False)]


class Server(BaseModel):
    """An OpenAI-compatible server: vLLM, SGLang, TGI, llama.cpp, Ollama, or a provider."""

    # What is wrong may hold a password: it is not shown.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    urls: list[str] = Field(min_length=1, description="Base addresses up to /v1; several share the work.")
    model: str = Field(description="The name under which the server knows the model.")
    key_env: str = Field("OPENAI_API_KEY", description="Environment variable with the key; it may be unset.")
    concurrency: int = Field(16, ge=1, description="Requests under way at a time, at each address.")
    timeout_s: Number = Field(120.0, gt=0, description="Longest wait for one reply.")
    retries: int = Field(6, ge=0, description="How often a request is repeated that failed for no fault of its own.")
    body: dict[str, Any] = Field(
        {}, description="More fields of each request: top_k: 20; null takes one of ours away, max_tokens: null."
    )

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        addresses = [url.strip().rstrip("/") for url in urls]
        for url in addresses:
            if "@" in url:
                raise ValueError(
                    "an address must hold no user or password, since addresses are written into files: "
                    "put the key into the environment variable that key_env names"
                )
            try:
                parts = urlsplit(url)
                whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:
                whole = False
            if not whole:
                raise ValueError(f"{url!r:.80} is no address: write it as http://localhost:8000/v1")
            if parts.query or parts.fragment or parts.path.endswith("/completions"):
                raise ValueError(f"{url.split('?')[0]!r:.80}: an address ends where /chat/completions would go on")
        if len(set(addresses)) < len(addresses):
            raise ValueError("an address is named twice: raise concurrency instead")
        return addresses

    @field_validator("body")
    @classmethod
    def _without_keys(cls, body: dict[str, Any]) -> dict[str, Any]:
        if found := next(filter(named_like_a_key, _names(body)), None):
            raise ValueError(
                f"{found!r:.40} is called like a key, and a recipe is copied into the run folder: put the key into the "
                "environment variable that key_env names"
            )
        return body

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, key_env: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_env):
            raise ValueError("this is the name of an environment variable, not the key itself")
        return key_env

    def key(self) -> str:
        """The key, empty if there is none.

        Raises:
            UserError: It cannot be sent.
        """
        key = os.environ.get(self.key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {self.key_env} holds letters that no key has: set it anew")
        return key


def _names(value: Any) -> Iterator[str]:
    """Names of all fields of a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from map(str, value)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _names(each)


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
        self._asker()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """As `Engine.generate`; a reply is given on as soon as it is there.

        Raises:
            UserError: A server refuses a request, or none answers any more.
        """
        wanted = [request for request in requests if request.id not in done]
        seeds = [self._seed(sampling, request.id) for request in wanted]
        bodies = [
            self._body(self._written(request), sampling, seed, request.prefix)
            for request, seed in zip(wanted, seeds, strict=True)
        ]
        for answers in self._answers([request.id for request in wanted], bodies):
            yield [
                Reply(
                    request.id,
                    name,
                    request.prompt,
                    (request.prefix + answer.text).strip(),
                    answer.finish,
                    seeds[answer.number],
                    request.sample,
                )
                for answer in answers
                for request in [wanted[answer.number]]
            ]

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """As `Engine.complete`: messages by chat completions, text by completions.

        Raises:
            UserError: As `generate`.
        """
        names = [str(index) for index in range(len(prompts))]
        seeds = [self._seed(sampling, name) for name in names]
        bodies = [self._body(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        texts = {answer.number: answer.text for answers in self._answers(names, bodies) for answer in answers}
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

    def _asker(self) -> "Asker":
        try:
            from tasft.engines.asking import Asker
        except ImportError as error:
            if (error.name or "tasft").startswith("tasft"):
                raise
            raise UserError(
                f"a server is asked with {error.name}, which is missing: pip install 'tasft[server]'"
            ) from None
        return Asker(self.server, self.server.key())

    def _answers(self, names: Sequence[str], bodies: Sequence[dict[str, Any]]) -> Iterator[list["Answer"]]:
        """Each answer as it comes; several processes wait for each other after some."""
        from tasft.engines.asking import Question

        asker = self._asker()
        questions = [Question(number, *pair) for number, pair in enumerate(zip(names, bodies, strict=True))]
        if launch.world_size() == 1:
            yield from ([answer] for answer in asker.answers(questions))
            return
        together = 4 * self.server.concurrency * len(self.server.urls)
        parts = [questions[start : start + together] for start in range(0, len(questions), together)]
        yield from launch.share(parts, lambda part: list(asker.answers(part)))
