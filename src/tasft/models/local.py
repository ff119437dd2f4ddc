"""The engine that runs a model in this process."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from tasft.core import ranks
from tasft.core.errors import UserError
from tasft.data.encode import encode_prompt
from tasft.data.rows import Messages
from tasft.data.settings import PromptFormat
from tasft.models.engine import Reply, Request, Sampling, derived_seed

T = TypeVar("T")
R = TypeVar("R")

STAY = 0.75  # Rows are taken out when at most this share is left: it copies the cache, as a step does.


def _share(parts: Sequence[T], work: Callable[[T], R]) -> Iterable[R]:
    """`launch.share`, but for weights that are spread: all processes gather them, so all must do the same steps."""
    return map(work, parts) if ranks.sharding() else ranks.share(parts, work)


class TransformersEngine:
    """Generation with transformers, in length-sorted batches that shrink as replies end.

    Several processes share the batches.

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

        def answer(batch: Sequence[tuple[Request, list[int]]]) -> list[Reply]:
            seed = derived_seed(sampling.seed, [request.id for request, _ in batch])
            return [
                Reply(request.id, name, request.prompt, (request.prefix + text).strip(), finish, seed, request.sample)
                for (request, _), (text, finish) in zip(
                    batch, self._generate([ids for _, ids in batch], sampling, seed), strict=True
                )
            ]

        batches = self._batches(encoded)
        wanted = [batch for batch in batches if not all(request.id in done for request, _ in batch)]
        for replies in _share(wanted, answer):
            yield [reply for reply in replies if reply.id not in done]

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """As `Engine.complete`.

        Text begins with the tokenizer's own first token, if it has one, unless the text writes it.
        """
        encoded = sorted(enumerate(map(self._read, prompts)), key=lambda pair: len(pair[1]))

        def answer(batch: Sequence[tuple[int, list[int]]]) -> list[tuple[int, str]]:
            seed = derived_seed(sampling.seed, [str(index) for index, _ in batch])
            replies = self._generate([ids for _, ids in batch], sampling, seed)
            return [(index, text) for (index, _), (text, _) in zip(batch, replies, strict=True)]

        texts = dict(pair for pairs in _share(self._batches(encoded), answer) for pair in pairs)
        return [texts[index] for index in range(len(prompts))]

    def _read(self, prompt: str | Messages) -> list[int]:
        if not isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt, "chat", chat_template_kwargs=self.chat_template_kwargs)
        first, last = self.tokenizer.bos_token, self.tokenizer.eos_token
        written = first is not None and prompt.startswith(first)
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=not written).input_ids
        # Some tokenizers end every text with an end token; a prompt goes on.
        added = ids[-1:] == [self.tokenizer.eos_token_id] and not prompt.endswith(last)
        return ids[:-1] if added else ids

    def _batches(self, rows: Sequence[T]) -> list[Sequence[T]]:
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[tuple[str, str]]:
        pad = self.tokenizer.pad_token_id
        config = self._configured(sampling)
        ends = set(config.eos_token_id)
        width = max(map(len, prompts))
        # Padding on the left: the model goes on from the last position.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                # Where weights are spread, transformers' own loop goes on until the last process has ended.
                custom_generate=None if ranks.sharding() else _shrinking,
            )
        replies = []
        for row in output[:, width:].tolist():
            cut = next((index for index, token in enumerate(row) if token in ends), None)
            text = self.tokenizer.decode(row[:cut], skip_special_tokens=True)
            replies.append((text, "length" if cut is None else "stop"))
        return replies

    def _configured(self, sampling: Sampling) -> GenerationConfig:
        from tasft.models.load import end_tokens  # with peft, which those who only name a judge do not wait for

        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.tokenizer),
            # Of the caches, the ones that grow: rows can be taken out of them.
            cache_implementation="dynamic",
            **(drawn if sampling.temperature > 0 else {}),
        )

    def stream(self, prompt: str | Messages, sampling: Sampling) -> Iterator[str]:
        """The reply to one prompt or conversation as it grows: each text is longer, the last one is the whole reply.

        Greedily it is what `generate` says in a batch of one. Nothing goes on when the caller stops asking.

        Raises:
            UserError: Prompt and longest reply are more than the model reads.
        """
        ids = encode_prompt(self.tokenizer, prompt, self.style, chat_template_kwargs=self.chat_template_kwargs)
        reads = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if reads and len(ids) + sampling.max_new_tokens > reads:
            raise UserError(
                f"the model reads {reads} tokens, fewer than these {len(ids)} and a reply of up to "
                f"{sampling.max_new_tokens}: begin anew, say less, or ask for shorter replies"
            )
        config = self._configured(sampling)
        row = torch.tensor([ids], device=self.model.device)
        tokens = self.model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            generation_config=config,
            custom_generate=partial(_one_by_one, seed=sampling.seed),
        )
        said: list[int] = []
        shown = ""
        for token in tokens:
            if token in config.eos_token_id:
                break
            said.append(token)
            # A character may be of several tokens.
            text = self.tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd").strip()
            if len(text) > len(shown):
                shown = text
                yield text
        whole = self.tokenizer.decode(said, skip_special_tokens=True).strip()
        if whole != shown:
            yield whole

    @torch.inference_mode()
    def mean_losses(self, replies: Sequence[Reply]) -> list[float]:
        """Mean loss of each reply's tokens given its prompt, in nats per token, at least 0.

        An empty reply has loss 0: there is no token that could be improbable.
        """
        rows = []
        for index, reply in enumerate(replies):
            completion = self.tokenizer(reply.completion, add_special_tokens=False).input_ids
            if completion:
                rows.append((index, self._ids(reply.prompt, ""), completion))
        rows.sort(key=lambda row: len(row[1]) + len(row[2]))
        losses = [0.0] * len(replies)
        together = max(1, self.batch_size // 4)
        batches = [rows[start : start + together] for start in range(0, len(rows), together)]
        bar = tqdm(
            _share(batches, self._mean_losses),
            desc="losses under the untouched model",
            unit="batch",
            total=len(batches),
            disable=not ranks.is_first(),
        )
        for batch, found in zip(batches, bar, strict=True):
            for (index, _, _), loss in zip(batch, found, strict=True):
                losses[index] = loss
        return losses

    def _mean_losses(self, batch: Sequence[tuple[int, list[int], list[int]]]) -> list[float]:
        ids = pad_sequence([torch.tensor(p + c) for _, p, c in batch], batch_first=True)
        mask = pad_sequence([torch.ones(len(p) + len(c), dtype=torch.long) for _, p, c in batch], batch_first=True)
        device = self.model.device
        first = min(len(p) for _, p, _ in batch)
        keep = ids.shape[1] - first + 1
        logits = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=keep
        ).logits.float()
        losses = []
        for scores, (_, prompt, completion) in zip(logits, batch, strict=True):
            # scores[k] is of the token at position first + k.
            begin = len(prompt) - first
            wanted = torch.tensor(completion, device=device)
            losses.append(float(F.cross_entropy(scores[begin : begin + len(completion)], wanted)))
        return losses


def _one_by_one(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    seed: int,
    **state: Any,
) -> Iterator[int]:
    """As `_shrinking`, for a batch of one, its tokens as they are drawn."""
    drawing = torch.Generator(input_ids.device).manual_seed(seed)
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **state)
    step = 1 if state["use_cache"] else None
    ended = False
    while not ended:
        # Not around the whole: a generator would leave it on for its caller.
        with torch.inference_mode():
            found = model(**inputs, return_dict=True)
            state = model._update_model_kwargs_for_generation(found, state)
            scores = logits_processor(input_ids, found.logits[:, -1].to(torch.float32))
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), num_samples=1, generator=drawing)
            else:
                token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=-1)
            ended = bool(stopping_criteria(input_ids, None))
            if not ended:
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **state)
        yield int(token)


def _shrinking(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **state: Any,
) -> Tensor:
    """The loop of transformers for drawn and likeliest tokens, but rows that have ended leave the batch.

    `PreTrainedModel.generate` calls it with all prepared: cache, mask, positions, warpers, end tokens.

    Returns:
        (B, W + longest reply) token ids: prompt, reply with its end token, padding.
    """
    pad = generation_config.pad_token_id
    output = input_ids.new_full((len(input_ids), generation_config.max_length), pad)
    place = torch.arange(len(input_ids), device=input_ids.device)  # In `output`, of each row that is left.
    ended = torch.zeros_like(place, dtype=torch.bool)
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **state)
    step = 1 if state["use_cache"] else None
    while True:
        found = model(**inputs, return_dict=True)
        state = model._update_model_kwargs_for_generation(found, state)
        scores = logits_processor(input_ids, found.logits[:, -1].to(torch.float32))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        input_ids = torch.cat([input_ids, tokens.masked_fill(ended, pad)[:, None]], dim=-1)
        ended |= stopping_criteria(input_ids, None)
        left = len(ended) - int(ended.sum())
        if left <= STAY * len(ended) and (left == 0 or _selectable(state)):
            output[place, : input_ids.shape[1]] = input_ids
            if left == 0:
                return output[:, : input_ids.shape[1]]
            stay = (~ended).nonzero().squeeze(1)
            place, input_ids, ended = place[stay], input_ids[stay], ended[stay]
            state = {name: _select(value, stay) for name, value in state.items()}
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **state)


def _selectable(state: Mapping[str, Any]) -> bool:
    """Whether rows can be taken out of all that a model carries on; if not, the batch stays whole to its end."""
    return all(value is None or isinstance(value, Tensor | Cache | int) for value in state.values())


def _select(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Cache):
        # Unlike `batch_select_indices`, it reaches every kind of layer: beam search needs it of all.
        value.reorder_cache(rows)
        return value
    # Masks and positions: (..., B, W).
    return value.index_select(-2, rows) if isinstance(value, Tensor) and value.dim() > 1 else value
