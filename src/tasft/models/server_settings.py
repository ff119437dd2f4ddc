"""What a recipe says of an OpenAI-compatible server."""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from tasft.core.errors import UserError
from tasft.core.parts import Part
from tasft.core.redact import named_like_a_key

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
    max_refused: Number = Field(
        0.5, ge=0, le=1, description="Largest share of requests that may be refused or get no reply; more end the run."
    )
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
        if name := next(filter(named_like_a_key, _names(body)), None):
            raise ValueError(
                f"{name!r:.40} is called like a key, and a recipe is copied into the run folder: put the key into the "
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


class PythonEngine(Part):
    """An engine of one's own, see `tasft.models.own`."""

    kind: Literal["python"] = Field("python", description="That it is one.")


def _tag(value: Any) -> str:
    own = isinstance(value, PythonEngine) or (isinstance(value, dict) and {"kind", "target"} & value.keys())
    return "<python>" if own else "<server>"


# In the places of pydantic's faults tags are no names of fields.
EngineSettings = Annotated[
    Annotated[Server, Tag("<server>")] | Annotated[PythonEngine, Tag("<python>")], Discriminator(_tag)
]


def _names(value: Any) -> Iterator[str]:
    """Names of all fields of a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from map(str, value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _names(inner)
