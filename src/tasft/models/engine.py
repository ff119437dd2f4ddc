"""Who answers prompts: one protocol, and replies kept as they come."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from tasft.core import ranks
from tasft.core.provenance import append_jsonl, resume_jsonl
from tasft.data.rows import Messages, Prompt


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        max_new_tokens: Longest reply, in tokens.
        temperature: Divides the logits; 0 takes the likeliest token every time.
        top_p: Smallest set of tokens with this much probability is drawn from, in (0, 1].
        seed: Of the whole call; each batch or request has its own, derived from it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    Attributes:
        id: Of the reply; no two requests of a call share it.
        prompt: What is asked.
        prefix: Text that the reply must begin with; the model goes on from there.
        sample: Number of the sample when a prompt is answered several times.
    """

    id: str
    prompt: str
    prefix: str = ""
    sample: int = 0


@dataclass(frozen=True)
class Reply:
    """One reply, as the `replies.jsonl` of a run holds it.

    Attributes:
        id: The request's.
        set: Name of the prompt set.
        prompt: What was asked.
        completion: The whole reply, a prefix included: what the model says as its answer.
        finish: `stop` when the model ended it, `length` when it was cut at `max_new_tokens`, `withheld` when there is
            none; else what the server says, which is not known to be an end.
        seed: What it was drawn with, or the batch that it was in.
        sample: The request's.
        thought: What it thought before, with its marks; empty for none. A reply that was cut within its thought has
            an empty completion.
        note: Why there is no reply: what the provider said.
        loss: Mean loss of its tokens, without the one that ends it, to the model that drew it, given the prompt, in
            nats. None where nobody noted it, or where the text is not read as the tokens that were drawn.
    """

    id: str
    set: str
    prompt: str
    completion: str
    finish: str
    seed: int
    sample: int
    thought: str = ""
    note: str = ""
    loss: float | None = None

    def to(self, prompt: str) -> "Reply":
        """The same text as a reply to another prompt, given which nobody knows its loss."""
        return replace(self, prompt=prompt, loss=None)


def thoughts(replies: Sequence[Reply]) -> dict[str, int]:
    """How many replies began with a thought (`n`), and how many of those were cut within it (`unfinished`)."""
    thinking = [reply for reply in replies if reply.thought]
    return {"n": len(thinking), "unfinished": sum(not reply.completion for reply in thinking)}


def decided(engine: "Engine", sampling: Sampling) -> dict[str, Any]:
    """What decides replies, as JSON.

    That is `sampling`; of a model in this process also `ends`, the tokens at which replies end, and `overruled`, what
    its generation_config.json says that is not heard; of a server, its `server` model, whose own choice the rest is.
    """
    return {"sampling": asdict(sampling), **(engine.decides() if isinstance(engine, Deciding) else {})}


@runtime_checkable
class Deciding(Protocol):
    """An engine that has something to say of how its replies are drawn."""

    def decides(self) -> dict[str, Any]:
        """What `decided` adds."""
        ...


WITHHELD = "withheld"
"""`finish` of what has no reply."""


class NoReply(str):
    """The empty text in place of a reply that the provider did not give.

    Attributes:
        note: Why, in its words.
    """

    note: str

    def __new__(cls, note: str) -> "NoReply":
        """The empty text."""
        made = super().__new__(cls, "")
        made.note = note
        return made


class Engine(Protocol):
    """Answers prompts."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """Yield replies, a batch at a time, to the requests whose id is not in `done`.

        What a reply says must not depend on `done`: an interrupted call, taken up again, ends where the
        undisturbed one does.
        """
        ...

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """What the model writes after each prompt, in their order.

        Text is read as it stands, without any template; messages are written by the chat template, which asks
        for the next turn. What a provider did not answer is a `NoReply`.
        """
        ...


def derived_seed(seed: int, ids: Sequence[str]) -> int:
    """Seed of some replies drawn together, from that of the whole call; below 2^32."""
    digest = hashlib.sha256("\n".join([str(seed), *ids]).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big")


def requests_for(prompts: Sequence[Prompt], *, samples: int = 1, prefix: str = "", mark: str = "") -> list[Request]:
    """One request for each prompt and sample; `mark` keeps ids apart from those of another purpose."""
    return [
        Request(f"{prompt.id}{mark}" + (f"#{sample}" if samples > 1 else ""), prompt.prompt, prefix, sample)
        for prompt in prompts
        for sample in range(samples)
    ]


def replies_in(path: Path, name: str) -> dict[str, Reply]:
    """Replies of one set that a `replies.jsonl` holds, by id."""
    return {row["id"]: Reply(**row) for row in resume_jsonl(path, Reply) if row["set"] == name}


def collect(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    path: Path,
    name: str,
    have: dict[str, Reply] | None = None,
) -> list[Reply]:
    """Replies to all requests, appended to a file as they come.

    Replies that the file holds already are kept and not drawn again. Of several processes the first writes.

    Args:
        engine: Who answers.
        requests: In the order of the result.
        sampling: How replies are drawn.
        path: A `replies.jsonl`; may hold other sets too.
        name: Of the prompt set.
        have: What `replies_in` found, for a file that is collected into many times; what comes is added. None reads it.
    """
    have = replies_in(path, name) if have is None else have
    ranks.wait()  # All have read before the first writes.
    wanted = [request.id for request in requests]
    known = frozenset(reply_id for reply_id in wanted if reply_id in have)
    with tqdm(
        total=len(wanted), initial=len(known), desc=f"replies: {name}", unit="reply", disable=not ranks.is_first()
    ) as bar:
        for batch in engine.generate(requests, sampling, name, known):
            if ranks.is_first():
                append_jsonl(path, [asdict(reply) for reply in batch])
            have.update({reply.id: reply for reply in batch})
            bar.update(len(batch))
    return [have[reply_id] for reply_id in wanted]
