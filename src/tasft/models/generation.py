"""What decides how replies are drawn: `Sampling`, and nothing that a model's files say of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tasft.core.errors import UserError
from tasft.data.settings import PromptFormat
from tasft.data.template import Writer

# Of a model's generation_config.json, what is about its tokens and its code.
_ITS_OWN = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "use_cache")

_LIKELIEST = 1024  # Tokens among which a nucleus is sought first.
_TOLERANCE = 0.1  # Of the largest logit: rounding in bfloat16 stays below, padding that is read does not.


def end_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    style: PromptFormat,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Tokens that end a reply: the tokenizer's, the model's, and those at which rows teach to end.

    A chat template often ends turns with another than the tokenizer's, which a base model's settings do not name.
    """
    named = model.generation_config.eos_token_id
    try:
        taught = Writer(tokenizer, style, chat_template_kwargs).ends
    except UserError:  # Such a template trains nothing, but a model that has one can be asked.
        taught = []
    return sorted({tokenizer.eos_token_id, *taught, *([named] if isinstance(named, int) else named or ())})


# What configurations call the tokens that a layer sees: most, Llama 4, GPT-Neo, RecurrentGemma, and others.
_WINDOWS = (
    *("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"),
    *("sliding_window_size", "local_attention"),
)


def context_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model reads, with or without weights; None where it sets no limit."""
    text = model.config.get_text_config()
    reads = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not reads or reads < 0:
        return None
    # RoBERTa's kin count positions from behind the one that stands for padding.
    skipped = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    )
    return int(reads) - max(skipped, default=0)


def looks_back(model: PreTrainedModel) -> float:
    """How many tokens the layer that sees least looks back over; infinity where all see everything."""
    text = model.config.get_text_config()
    return min(size for name in _WINDOWS if isinstance(size := getattr(text, name, None) or math.inf, int | float))


def fit_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token that the model knows: its end token, where there is none or it is beyond.

    A padding token is often added without the model being resized; what it stands for is masked, so that any will do.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if tokenizer.pad_token_id is None or (known and tokenizer.pad_token_id >= known):
        tokenizer.pad_token = tokenizer.eos_token


def overruled(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of the model's own generation_config.json that would change replies, and are not heard."""
    own = model.generation_config.to_diff_dict()
    usual = GenerationConfig._get_default_generation_params()
    passed_over = {*_ITS_OWN, "transformers_version", "_from_model_config"}
    return {
        key: value
        for key, value in sorted(own.items())
        if key not in passed_over and value not in (None, False) and value != usual.get(key)
    }


def in_one_piece(model: PreTrainedModel) -> None:
    """See that the output head reads states that lie in one piece.

    A head that is asked for the last tokens alone gets a slice. On a CPU torch multiplies a slice with frozen weights
    as a batch of matrices, and copies bfloat16 weights once for each row: gigabytes, and seconds a batch.
    """
    head = model.get_output_embeddings()
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


@contextmanager
def sampling_alone(model: PreTrainedModel) -> Iterator[None]:
    """Within, nothing that the model's generation_config.json says of drawing replies is heard.

    `generate` fills what it was not told from there: a penalty for repetition makes another reply greedy.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    kept = owner.generation_config
    owner.generation_config = GenerationConfig(
        **{key: value for key in _ITS_OWN if (value := getattr(kept, key, None)) is not None}
    )
    try:
        yield
    finally:
        owner.generation_config = kept


def check_readable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> None:
    """See that the model has an embedding for every token.

    Raises:
        UserError: A token is beyond them.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    beyond = sorted({token for row in rows for token in row if token >= known}) if known else []
    if beyond:
        raise UserError(
            f"the tokenizer writes the token {beyond[0]} ({tokenizer.convert_ids_to_tokens(beyond[0])!r:.40}), and the "
            f"model knows {known}: they do not belong together, or the model was not resized when tokens were added"
        )


def too_long(model: PreTrainedModel, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Which prompts leave too little room for the longest reply in what the model reads."""
    reads = context_of(model)
    return [] if reads is None else [index for index, row in enumerate(rows) if len(row) + max_new_tokens > reads]


def check_room(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], most: int, name: str, setting: str = "max_new_tokens"
) -> None:
    """See that the model reads each prompt with the longest reply.

    Args:
        model: With or without weights.
        rows: Tokens of prompts.
        most: Tokens of the longest reply.
        name: Of the prompts.
        setting: What `most` was set by.

    Raises:
        UserError: It does not; says how many and by how much.
    """
    if beyond := too_long(model, rows, most):
        raise UserError(
            f"{name}: {len(beyond)} of {len(rows)} prompts with a reply of up to {most} tokens are more than the "
            f"{context_of(model)} tokens that the model reads (the longest has {max(map(len, rows))}): leave "
            f"them out, or lower {setting}"
        )


def check_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], setting: str
) -> None:
    """See that the model knows every token of rows to train on, and reads each row.

    Args:
        model: With or without weights.
        tokenizer: Its tokenizer.
        rows: Tokens.
        setting: What limits their length.

    Raises:
        UserError: It does not.
    """
    check_readable(model, tokenizer, rows)
    if beyond := too_long(model, rows, 0):
        reads = context_of(model)
        raise UserError(
            f"{len(beyond)} of {len(rows)} rows have more than the {reads} tokens that the model reads (the longest "
            f"has {max(map(len, rows))}): set {setting} to {reads} or less"
        )


def finite(logits: Tensor) -> Tensor:
    """Logits as they are.

    Raises:
        UserError: Some token's are no numbers: the likeliest token would be any.
    """
    if not bool(logits.amax(-1).isfinite().all()):
        raise UserError(
            "the model's logits are not finite numbers, though its weights are: its activations are beyond the range "
            "of float16, or its training diverged; load it in bfloat16 or float32, or train again"
        )
    return logits


def from_nucleus(scores: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """A token for each row of scores, drawn from its nucleus (Holtzman et al. 2020).

    The nucleus is the likeliest tokens that together reach `top_p`, and holds the likeliest at least. Transformers
    sorts the whole vocabulary for it, which takes far longer than the model where that is large. Here the likeliest
    thousand are sought first, and more only where a row needs them.

    Args:
        scores: (B, V) logits, divided by the temperature.
        top_p: In (0, 1].
        generator: Of the draws; torch's own otherwise.

    Returns:
        (B,) token ids.
    """
    values = scores.softmax(-1)
    if top_p >= 1:
        return torch.multinomial(values, 1, generator=generator).squeeze(1)
    size = values.shape[-1]
    width = min(_LIKELIEST, size)
    likeliest, tokens = values.topk(width)
    while width < size and bool((likeliest.sum(-1) < top_p).any()):
        width = min(8 * width, size)
        likeliest, tokens = values.topk(width)
    before = likeliest.cumsum(-1) - likeliest
    drawn = torch.multinomial(likeliest.masked_fill(before >= top_p, 0), 1, generator=generator)
    return tokens.gather(1, drawn).squeeze(1)


def answers_together(model: PreTrainedModel, ids: Sequence[int], config: GenerationConfig) -> bool:
    """Whether a model scores a prompt in a padded batch, and after the other row has left it, as it does alone.

    Some read the padding (RWKV has no mask), some cannot have rows taken out (MiniMax).

    Args:
        model: In evaluation mode.
        ids: Tokens to try it with.
        config: How replies are drawn.
    """
    whole, part = list(ids), list(ids[len(ids) // 2 :])
    if len(part) == len(whole):
        return True
    alone = [_scores(model, [row], [0], config) for row in (whole, part)]
    try:
        both = [_scores(model, [whole, part], [index], config) for index in (0, 1)]
    except Exception:  # those of every architecture
        return False
    return all(
        bool((logits - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
        for pair in zip(both, alone, strict=True)
        for logits, wanted in zip(*pair, strict=True)
    )


def shares_beginnings(model: PreTrainedModel, ids: Sequence[int], config: GenerationConfig) -> bool:
    """Whether a model that has read a common beginning once scores the prompts of a batch as it does each alone.

    Some read the padding that comes after the beginning then, as state space models do.

    Args:
        model: In evaluation mode.
        ids: Tokens to try it with.
        config: How replies are drawn.
    """
    whole, part = list(ids), list(ids[: len(ids) // 2 + 1])
    shared = common_beginning([whole, part])
    if not shared:
        return False
    alone = [_scores(model, [row], [0], config) for row in (whole, part)]
    try:
        both = _scores(model, [whole, part], [0, 1], config, shared)
    except Exception:  # those of every architecture
        return False
    return all(
        bool((logits[index] - wanted[0]).abs().max() <= _TOLERANCE * wanted.abs().max())
        for index, scores in enumerate(alone)
        for logits, wanted in zip(both, scores, strict=True)
    )


def common_beginning(rows: Sequence[list[int]]) -> int:
    """With how many tokens all of several rows begin; the last token of none is among them."""
    first, last = min(rows), max(rows)
    differ = (index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    shortest = min(map(len, rows))
    return min(next(differ, shortest), shortest - 1) if len(rows) > 1 else 0


def laid_out(rows: Sequence[Sequence[int]], shared: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of a batch and their mask: the beginning that they share, padding, and the rest of each at the right."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = [[*row[:shared], *[pad] * gap, *row[shared:]] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def first_inputs(model: PreTrainedModel, ids: Tensor, state: Mapping[str, Any], shared: int) -> dict[str, Any]:
    """What a model is given of prompts at first; the beginning that they share it has read once for all by then."""
    if not shared:
        return model.prepare_inputs_for_generation(ids, is_first_iteration=True, **state)
    cache = state["past_key_values"]
    model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids))
    rest = ids.shape[1] - shared
    return model.prepare_inputs_for_generation(ids, next_sequence_length=rest, is_first_iteration=True, **state)


def _scores(
    model: PreTrainedModel, rows: list[list[int]], stay: list[int], config: GenerationConfig, shared: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits of the rows that stay, after their prompts and after one more token, the others having left."""
    logits: list[Tensor] = []

    def look(model: PreTrainedModel, input_ids: Tensor, **state: Any) -> Tensor:
        state = {key: value for key, value in state.items() if key not in _LOOP}
        output = model(**first_inputs(model, input_ids, state, shared))
        logits.append(output.logits[stay, -1].float())
        state = model._update_model_kwargs_for_generation(output, state)
        input_ids = torch.cat([input_ids, input_ids[:, -1:]], dim=-1)
        if len(stay) < len(rows) and selectable(state):
            kept = torch.tensor(stay, device=input_ids.device)
            input_ids, state = input_ids[kept], {name: select(value, kept) for name, value in state.items()}
        step = 1 if state["use_cache"] else None
        output = model(**model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **state))
        logits.append(output.logits[stay if len(output.logits) == len(rows) else slice(None), -1].float())
        return input_ids

    ids, mask = laid_out(rows, shared, config.pad_token_id, model.device)
    model.generate(input_ids=ids, attention_mask=mask, generation_config=config, custom_generate=look)
    return logits[0], logits[1]


# What `PreTrainedModel.generate` hands to a loop besides what the model carries on.
_LOOP = ("logits_processor", "stopping_criteria", "generation_config")


def selectable(state: Mapping[str, Any]) -> bool:
    """Whether rows can be taken out of all that a model carries on; if not, the batch stays whole to its end."""
    return all(value is None or isinstance(value, Tensor | Cache | int) for value in state.values())


def select(value: Any, rows: Tensor) -> Any:
    """Some rows of something that a model carries on."""
    if isinstance(value, Cache):
        # Unlike `batch_select_indices`, it reaches every kind of layer: beam search needs it of all.
        value.reorder_cache(rows)
        return value
    # Masks and positions: (..., B, W).
    return value.index_select(-2, rows) if isinstance(value, Tensor) and value.dim() > 1 else value
