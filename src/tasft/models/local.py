"""The engine that runs a model in this process."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from tasft.core import ranks
from tasft.core.errors import UserError
from tasft.data.rows import Messages
from tasft.data.settings import PromptFormat
from tasft.data.template import Writer, decoded, encode_prompt
from tasft.models.cache import make_room
from tasft.models.engine import Reply, Request, Sampling, derived_seed
from tasft.models.generation import (
    answers_together,
    check_readable,
    check_room,
    common_beginning,
    context_of,
    end_tokens,
    finite,
    first_inputs,
    fit_padding,
    from_nucleus,
    in_one_piece,
    laid_out,
    looks_back,
    overruled,
    sampling_alone,
    select,
    selectable,
    shares_beginnings,
    too_long,
)

T = TypeVar("T")
R = TypeVar("R")

_TRIED = 32  # Tokens with which it is tried whether rows can be answered together.
_WORTH = 64  # Tokens that are saved where a beginning is read apart, which takes a pass of its own.
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
        in_one_piece(model)
        self._answers_together: bool | None = None
        self._shares: bool | None = None
        fit_padding(model, tokenizer)

    @cached_property
    def _writer(self) -> Writer | None:
        """What writes prompts and reads replies; None for a template that writes no reply."""
        try:
            return Writer(self.tokenizer, self.style, self.chat_template_kwargs)
        except UserError:
            return None

    def _ids(self, prompt: str, start: str) -> list[int]:
        """Tokens of a prompt and of how its reply begins."""
        return self._written(prompt, start)[0]

    def _written(self, prompt: str, text: str) -> tuple[list[int], int]:
        """Tokens of a prompt and of a reply's text, and where that begins."""
        if self._writer:
            return self._writer.reply(prompt, text)
        ids = encode_prompt(self.tokenizer, prompt, self.style, chat_template_kwargs=self.chat_template_kwargs)
        return [*ids, *self.tokenizer(text, add_special_tokens=False).input_ids], len(ids)

    def decides(self) -> dict[str, Any]:
        """As `Deciding.decides`."""
        return {"ends": self.tokenizer.convert_ids_to_tokens(self._ends), "overruled": overruled(self.model)}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """As `Engine.generate`; batches are cut from all requests, so that `done` does not move them.

        Raises:
            UserError: A prompt has a token that the model does not know, or with the longest reply more than it reads.
        """
        encoded = [(request, *self._written(request.prompt, request.prefix)) for request in requests]
        encoded.sort(key=lambda row: (len(row[1]), row[0].id))
        rows = [ids for _, ids, _ in encoded]
        check_readable(self.model, self.tokenizer, rows)
        check_room(self.model, rows, sampling.max_new_tokens, name)

        def answer(batch: Sequence[tuple[Request, list[int], int]]) -> list[Reply]:
            seed = derived_seed(sampling.seed, [request.id for request, _, _ in batch])
            drawn = self._generate([ids for _, ids, _ in batch], sampling, seed)
            return [
                self._reply(request, name, ids, begin, each, seed)
                for (request, ids, begin), each in zip(batch, drawn, strict=True)
            ]

        batches = self._batches(encoded, rows)
        wanted = [batch for batch in batches if not all(request.id in done for request, _, _ in batch)]
        for replies in _share(wanted, answer):
            yield [reply for reply in replies if reply.id not in done]

    def _reply(self, request: Request, name: str, ids: list[int], begin: int, drawn: "_Drawn", seed: int) -> Reply:
        tokens, finish, loss = drawn
        if request.prefix:
            # Both together: decoded alone, what goes on may lose the space that it begins with.
            text, thought = decoded(self.tokenizer, ids[:begin], [*ids[begin:], *tokens]), ""
            if not text.strip().startswith(request.prefix.strip()):
                text = request.prefix + decoded(self.tokenizer, ids, tokens)
        elif self._writer:
            text, thought = self._writer.said(ids, tokens)
        else:
            text, thought = decoded(self.tokenizer, ids, tokens), ""
        text = text.strip()
        # Whoever reads the reply must find the very tokens that were drawn: no thought, no mark that is not shown.
        same = loss is not None and self._written(request.prompt, text) == ([*ids, *tokens], len(ids))
        shown = loss if same else None
        return Reply(request.id, name, request.prompt, text, finish, seed, request.sample, thought, loss=shown)

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """As `Engine.complete`.

        Text begins with the tokenizer's own first token, if it has one, unless the text writes it. What is longer than
        the model reads, with the longest answer, is not asked: it is told, and its text is empty.
        """
        unread = set(self.unread(prompts, sampling.max_new_tokens))
        rows = [self._read(prompt) for prompt in prompts]
        check_readable(self.model, self.tokenizer, rows)
        if unread and ranks.is_first():
            print(
                f"{len(unread)} of {len(rows)} texts with {sampling.max_new_tokens} tokens to come are more than the "
                f"{context_of(self.model)} tokens that the model reads (the longest has "
                f"{max(map(len, rows))}): the model was not asked these",
                file=sys.stderr,
            )
        encoded = sorted(
            ((index, row) for index, row in enumerate(rows) if index not in unread), key=lambda pair: len(pair[1])
        )

        def answer(batch: Sequence[tuple[int, list[int]]]) -> list[tuple[int, str]]:
            seed = derived_seed(sampling.seed, [str(index) for index, _ in batch])
            drawn = self._generate([ids for _, ids in batch], sampling, seed)
            return [
                (index, self._completed(prompts[index], ids, each.tokens))
                for (index, ids), each in zip(batch, drawn, strict=True)
            ]

        batches = self._batches(encoded, [row for _, row in encoded])
        texts = dict(pair for pairs in _share(batches, answer) for pair in pairs)
        return [texts.get(index, "") for index in range(len(prompts))]

    def unread(self, prompts: Sequence[str | Messages], max_new_tokens: int) -> list[int]:
        """Which texts are more than the model reads, with the longest answer; needs no weights."""
        return too_long(self.model, [self._read(prompt) for prompt in prompts], max_new_tokens)

    def _completed(self, prompt: str | Messages, ids: list[int], tokens: list[int]) -> str:
        if isinstance(prompt, str) or not self._writer:
            return decoded(self.tokenizer, ids, tokens)
        return self._writer.said(ids, tokens).answer

    def _read(self, prompt: str | Messages) -> list[int]:
        if not isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt, "chat", chat_template_kwargs=self.chat_template_kwargs)
        first, last = self.tokenizer.bos_token, self.tokenizer.eos_token
        written = first is not None and prompt.startswith(first)
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=not written).input_ids
        # Some tokenizers end every text with an end token; a prompt goes on.
        added = ids[-1:] == [self.tokenizer.eos_token_id] and not prompt.endswith(last)
        return ids[:-1] if added else ids

    def _batches(self, rows: Sequence[T], ids: Sequence[list[int]]) -> list[Sequence[T]]:
        """Rows that are answered together, and the tokens of each, the longest last."""
        size = self.batch_size if len(rows) < 2 or self._together(ids[-1]) else 1
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @torch.inference_mode()
    def _together(self, ids: list[int]) -> bool:
        """Whether rows of a batch are answered as each alone; it is tried once."""
        if self._answers_together is None:
            some = ids[-_TRIED:]
            with sampling_alone(self.model):
                self._answers_together = self.batch_size == 1 or answers_together(
                    self.model, some, self._configured(Sampling(2))
                )
            if not self._answers_together and ranks.is_first():
                print(
                    "the model answers prompts of a batch otherwise than one alone: it is asked one at a time",
                    file=sys.stderr,
                )
        return self._answers_together

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list["_Drawn"]:
        """What is drawn for each prompt."""
        config = self._configured(sampling)
        ends = set(config.eos_token_id)
        shared = self._shared(prompts, sampling.max_new_tokens)
        # Padding before what differs: the model goes on from the last position.
        ids, mask = laid_out(prompts, shared, config.pad_token_id, self.model.device)
        with torch.random.fork_rng(), sampling_alone(self.model):
            torch.manual_seed(seed)
            told = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                # Where weights are spread, transformers' own loop goes on until the last process has ended.
                custom_generate=None if ranks.sharding() else _shrinking,
                **({"shared": shared} if shared else {}),
            )
        output, sums = (told[0], told[1].tolist()) if isinstance(told, tuple) else (told, None)
        replies = []
        for number, row in enumerate(output[:, ids.shape[1] :].tolist()):
            cut = next((index for index, token in enumerate(row) if token in ends), None)
            tokens = row[:cut]
            loss = None if sums is None else sums[number] / max(len(tokens), 1)
            replies.append(_Drawn(tokens, "length" if cut is None else "stop", loss))
        return replies

    def _shared(self, prompts: list[list[int]], max_new_tokens: int) -> int:
        """How many tokens at their beginning the prompts of a batch share and are to be read once; 0 for none."""
        shared = common_beginning(prompts)
        # Where a layer looks back so far only, the padding would push the beginning out of sight.
        longest = max(map(len, prompts)) + max_new_tokens
        if shared * (len(prompts) - 1) < _WORTH or ranks.sharding() or longest > looks_back(self.model):
            return 0
        if self._shares is None:
            some = max(prompts, key=len)[:_TRIED]
            with sampling_alone(self.model):
                self._shares = shares_beginnings(self.model, some, self._configured(Sampling(2)))
        return shared if self._shares else 0

    @cached_property
    def _ends(self) -> list[int]:
        return end_tokens(self.model, self.tokenizer, self.style, self.chat_template_kwargs)

    def _configured(self, sampling: Sampling) -> GenerationConfig:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._ends,
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
        if too_long(self.model, [ids], sampling.max_new_tokens):
            raise UserError(
                f"the model reads {context_of(self.model)} tokens, fewer than these {len(ids)} and a reply of "
                f"up to {sampling.max_new_tokens}: begin anew, say less, or ask for shorter replies"
            )
        config = self._configured(sampling)
        row = torch.tensor([ids], device=self.model.device)
        with sampling_alone(self.model):
            tokens = self.model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                generation_config=config,
                custom_generate=partial(_one_by_one, seed=sampling.seed),
            )
        reply: list[int] = []
        shown = ""
        for token in tokens:
            if token in config.eos_token_id:
                break
            reply.append(token)
            # A character may be of several tokens.
            text = self._completed([], ids, reply).rstrip("\ufffd").strip()
            if len(text) > len(shown):
                shown = text
                yield text
        whole = self._completed([], ids, reply).strip()
        if whole != shown:
            yield whole

    @torch.inference_mode()
    def mean_losses(self, replies: Sequence[Reply]) -> list[float]:
        """Mean loss of each reply's tokens given its prompt, in nats per token, at least 0.

        An empty reply has loss 0: there is no token that could be improbable.
        """
        rows = []
        for index, reply in enumerate(replies):
            ids, begin = self._written(reply.prompt, reply.completion)
            if len(ids) > begin:
                rows.append((index, ids[:begin], ids[begin:]))
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
        for batch, batch_losses in zip(batches, bar, strict=True):
            for (index, _, _), loss in zip(batch, batch_losses, strict=True):
                losses[index] = loss
        return losses

    def _mean_losses(self, batch: Sequence[tuple[int, list[int], list[int]]]) -> list[float]:
        ids = pad_sequence([torch.tensor(p + c) for _, p, c in batch], batch_first=True)
        mask = pad_sequence([torch.ones(len(p) + len(c), dtype=torch.long) for _, p, c in batch], batch_first=True)
        device = self.model.device
        first = min(len(p) for _, p, _ in batch)
        keep = ids.shape[1] - first + 1
        ids, mask, cache = ids.to(device), mask.to(device), None
        if shared := self._shared([p for _, p, _ in batch], max(len(c) for _, _, c in batch)):
            cache = self.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(ids))
        logits = self.model(
            input_ids=ids[:, shared:], attention_mask=mask, past_key_values=cache, logits_to_keep=keep
        ).logits
        losses = []
        # Some make logits of all positions all the same.
        for scores, (_, prompt, completion) in zip(finite(logits[:, -keep:]), batch, strict=True):
            # scores[k] is of the token at position first + k.
            begin = len(prompt) - first
            wanted = torch.tensor(completion, device=device)
            # A row at a time: where the vocabulary is large, those of a batch in float32 are gigabytes.
            losses.append(float(F.cross_entropy(scores[begin : begin + len(completion)].float(), wanted)))
        return losses


class _Drawn(NamedTuple):
    """Tokens of a reply, without the one that ends it, how it finished, and their mean loss, if it is known."""

    tokens: list[int]
    finish: str
    loss: float | None


def _without_nucleus(processors: LogitsProcessorList) -> LogitsProcessorList:
    return LogitsProcessorList(processor for processor in processors if not isinstance(processor, TopPLogitsWarper))


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
    processors = _without_nucleus(logits_processor)
    drawing = torch.Generator(input_ids.device).manual_seed(seed)
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **state)
    step = 1 if state["use_cache"] else None
    ended = False
    while not ended:
        # Not around the whole: a generator would leave it on for its caller.
        with torch.inference_mode():
            result = model(**inputs, return_dict=True)
            state = model._update_model_kwargs_for_generation(result, state)
            scores = processors(input_ids, finite(result.logits[:, -1].to(torch.float32)))
            top_p = generation_config.top_p
            token = from_nucleus(scores, top_p, drawing) if generation_config.do_sample else scores.argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
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
    shared: int = 0,
    **state: Any,
) -> tuple[Tensor, Tensor]:
    """The loop of transformers for drawn and likeliest tokens, but rows that have ended leave the batch.

    The `shared` tokens with which all rows begin are read once.

    `PreTrainedModel.generate` calls it with all prepared: cache, mask, positions, warpers, end tokens.

    Returns:
        (B, W + longest reply) token ids: prompt, reply with its end token, padding. (B,) the loss of each reply, summed
        over its tokens without the one that ends it, in nats.
    """
    processors = _without_nucleus(logits_processor)
    pad = generation_config.pad_token_id
    output = input_ids.new_full((len(input_ids), generation_config.max_length), pad)
    indices = torch.arange(len(input_ids), device=input_ids.device)  # In `output`, of each row that is left.
    ends = input_ids.new_tensor(generation_config.eos_token_id)
    losses = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    make_room(state.get("past_key_values"))
    ended = torch.zeros_like(indices, dtype=torch.bool)
    inputs = first_inputs(model, input_ids, state, shared)
    step = 1 if state["use_cache"] else None
    while True:
        result = model(**inputs, return_dict=True)
        state = model._update_model_kwargs_for_generation(result, state)
        logits = finite(result.logits[:, -1].to(torch.float32))
        scores = processors(input_ids, logits)
        tokens = from_nucleus(scores, generation_config.top_p) if generation_config.do_sample else scores.argmax(-1)
        each = F.cross_entropy(logits, tokens, reduction="none").masked_fill(ended | torch.isin(tokens, ends), 0)
        losses[indices] += each
        input_ids = torch.cat([input_ids, tokens.masked_fill(ended, pad)[:, None]], dim=-1)
        ended |= stopping_criteria(input_ids, None)
        left = len(ended) - int(ended.sum())
        if left <= STAY * len(ended) and (left == 0 or selectable(state)):
            output[indices, : input_ids.shape[1]] = input_ids
            if left == 0:
                return output[:, : input_ids.shape[1]], losses
            stay = (~ended).nonzero().squeeze(1)
            indices, input_ids, ended = indices[stay], input_ids[stay], ended[stay]
            state = {name: select(value, stay) for name, value in state.items()}
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **state)
