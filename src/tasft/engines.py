"""Who answers prompts: one protocol, and the engine that runs a model in this process."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tasft.data import Prompt
from tasft.encode import PromptFormat, encode_prompt
from tasft.provenance import append_jsonl, resume_jsonl


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        max_new_tokens: Longest reply, in tokens.
        temperature: Divides the logits; 0 takes the likeliest token every time.
        top_p: Smallest set of tokens with this much probability is drawn from, in (0, 1].
        seed: Of the whole call; each batch has its own, derived from it.
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
        completion: The whole reply, a prefix included.
        finish: `stop` when the model ended it, `length` when it was cut at `max_new_tokens`.
        seed: What the batch was drawn with.
        sample: The request's.
    """

    id: str
    set: str
    prompt: str
    completion: str
    finish: str
    seed: int
    sample: int


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


def _batch_seed(seed: int, ids: Sequence[str]) -> int:
    digest = hashlib.sha256("\n".join([str(seed), *ids]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


class TransformersEngine:
    """Generation with transformers, in length-sorted batches.

    Args:
        model: In evaluation mode; an adapter on it is used.
        tokenizer: Its tokenizer.
        style: How prompts are written.
        batch_size: Replies drawn together.
        chat_template_kwargs: Given to the chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptFormat,
        batch_size: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.style: PromptFormat = style
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs

    def _ids(self, prompt: str, start: str) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt, self.style, chat_template_kwargs=self.chat_template_kwargs)
        return ids + self.tokenizer(start, add_special_tokens=False).input_ids if start else ids

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """As `Engine.generate`; batches are cut from all requests, so that `done` does not move them."""
        encoded = [(request, self._ids(request.prompt, request.prefix)) for request in requests]
        encoded.sort(key=lambda pair: (len(pair[1]), pair[0].id))
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
            if all(request.id in done for request, _ in batch):
                continue
            seed = _batch_seed(sampling.seed, [request.id for request, _ in batch])
            replies = self._generate([ids for _, ids in batch], sampling, seed)
            yield [
                Reply(
                    request.id,
                    name,
                    request.prompt,
                    (request.prefix + text).strip(),
                    finish,
                    seed,
                    request.sample,
                )
                for (request, _), (text, finish) in zip(batch, replies, strict=True)
                if request.id not in done
            ]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[tuple[str, str]]:
        pad = self.tokenizer.pad_token_id
        # A chat model often ends its turns with a token of its own beside the tokenizer's.
        named = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or ())}
        width = max(map(len, prompts))
        # Padding on the left: the model goes on from the last position.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            **(drawn if sampling.temperature > 0 else {}),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        replies = []
        for row in output[:, width:].tolist():
            cut = next((index for index, token in enumerate(row) if token in ends), None)
            text = self.tokenizer.decode(row[:cut], skip_special_tokens=True)
            replies.append((text, "length" if cut is None else "stop"))
        return replies

    @torch.inference_mode()
    def mean_losses(self, replies: Sequence[Reply]) -> list[float]:
        """Mean loss of each reply's tokens given its prompt, in nats per token, at least 0.

        An empty reply has loss 0: there is no token that could be improbable.
        """
        rows = []
        for index, reply in enumerate(replies):
            prompt = self._ids(reply.prompt, "")
            completion = self.tokenizer(reply.completion, add_special_tokens=False).input_ids
            rows.append((index, prompt, completion))
        rows.sort(key=lambda row: len(row[1]) + len(row[2]))
        losses = [0.0] * len(rows)
        together = max(1, self.batch_size // 4)
        for start in tqdm(range(0, len(rows), together), desc="losses under the untouched model", unit="batch"):
            batch = rows[start : start + together]
            ids = pad_sequence([torch.tensor(p + c) for _, p, c in batch], batch_first=True)
            mask = pad_sequence([torch.ones(len(p) + len(c), dtype=torch.long) for _, p, c in batch], batch_first=True)
            device = self.model.device
            longest = max(len(c) for _, _, c in batch)
            first = min(len(p) for _, p, _ in batch)
            keep = ids.shape[1] - first + 1
            logits = self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=keep
            ).logits.float()
            if longest == 0:
                continue
            for row, (index, prompt, completion) in enumerate(batch):
                if completion:
                    # logits[:, k] scores the token at position first + k.
                    begin = len(prompt) - first
                    scores = logits[row, begin : begin + len(completion)]
                    losses[index] = float(F.cross_entropy(scores, torch.tensor(completion, device=device)))
        return losses


def requests_for(prompts: Sequence[Prompt], *, samples: int = 1, prefix: str = "", mark: str = "") -> list[Request]:
    """One request for each prompt and sample; `mark` keeps ids apart from those of another purpose."""
    return [
        Request(f"{prompt.id}{mark}" + (f"#{sample}" if samples > 1 else ""), prompt.prompt, prefix, sample)
        for prompt in prompts
        for sample in range(samples)
    ]


def collect(engine: Engine, requests: Sequence[Request], sampling: Sampling, path: Path, name: str) -> list[Reply]:
    """Replies to all requests, appended to a file as they come.

    Replies that the file holds already are kept and not drawn again.

    Args:
        engine: Who answers.
        requests: In the order of the result.
        sampling: How replies are drawn.
        path: A `replies.jsonl`; may hold other sets too.
        name: Of the prompt set.
    """
    have = {row["id"]: Reply(**row) for row in resume_jsonl(path) if row["set"] == name}
    wanted = [request.id for request in requests]
    with tqdm(total=len(wanted), initial=len(have.keys() & set(wanted)), desc=f"replies: {name}", unit="reply") as bar:
        for batch in engine.generate(requests, sampling, name, have.keys()):
            append_jsonl(path, [asdict(reply) for reply in batch])
            have |= {reply.id: reply for reply in batch}
            bar.update(len(batch))
    return [have[reply_id] for reply_id in wanted]
