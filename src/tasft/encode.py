"""From text to token ids: what the model reads, and which tokens a loss falls on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasft.data import Example, Messages
from tasft.errors import UserError
from tasft.loss.tokens import IGNORE_INDEX

PromptFormat = Literal["chat", "alpaca"]

# Taori et al. 2023, the form without input.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row and its labels, of equal length.

    Attributes:
        input_ids: Prompt and completion.
        labels: The token at its own position, `IGNORE_INDEX` where no loss falls.
        avoid: Whether the labels are tokens to move away from.
    """

    input_ids: list[int]
    labels: list[int]
    avoid: bool


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, style: PromptFormat) -> list[int]:
    """Token ids of a prompt, up to where the reply begins.

    Raises:
        UserError: The tokenizer has no chat template, or messages meet the Alpaca format.
    """
    if style == "alpaca":
        if not isinstance(prompt, str):
            raise UserError("model.prompt is alpaca, but a row's prompt is chat messages: use chat, or text")
        ids: list[int] = tokenizer(ALPACA.format(instruction=prompt)).input_ids
        # Some tokenizers end every text with an end token; a prompt goes on.
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    return _render(tokenizer, prompt, None)


def _render(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, reply: str | Messages | None) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: say model.prompt=alpaca, or choose a chat model")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if reply is not None:
        messages += [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=reply is None, tokenize=True, return_dict=False
    )
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, style: PromptFormat, max_length: int) -> Encoded:
    """Token ids of a row; the loss falls on the completion.

    An imitate row also learns its end token, unless the text was cut (`example.ends` false). The end
    token of an avoid row is never a label: pushing it down makes endless answers.

    Raises:
        UserError: The prompt's tokens are not a prefix of the row's, or the prompt alone fills
            `max_length` so that nothing is left to learn.
    """
    prompt = encode_prompt(tokenizer, example.prompt, style)
    if style == "alpaca":
        reply = tokenizer(str(example.completion), add_special_tokens=False).input_ids
    else:
        whole = _render(tokenizer, example.prompt, example.completion)
        if whole[: len(prompt)] != prompt:
            raise UserError(
                f"row {example.id or example.prompt!r:.60}: the chat template writes the prompt otherwise when "
                "a reply follows, so the loss would fall on the wrong tokens; use another template"
            )
        reply = whole[len(prompt) :]
    # A chat template may end a turn with another token than the tokenizer's (Gemma's <end_of_turn>), and
    # write more after it (a newline), which the model never has to produce.
    marks = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    cut = next((index for index, token in enumerate(reply) if token in marks), len(reply))
    end = reply[cut] if cut < len(reply) else tokenizer.eos_token_id
    reply = reply[:cut]
    labels = list(reply)
    if example.label and example.ends:
        reply, labels = [*reply, end], [*labels, end]
    encoded = Encoded(
        (prompt + reply)[:max_length],
        ([IGNORE_INDEX] * len(prompt) + labels)[:max_length],
        not example.label,
    )
    if all(label == IGNORE_INDEX for label in encoded.labels):
        raise UserError(
            f"row {example.id or example.prompt!r:.60}: no token to learn within max_length {max_length} "
            f"(the prompt has {len(prompt)} tokens); raise train.max_length or drop the row"
        )
    return encoded


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded batch of B rows and T positions.

    Args:
        rows: `input_ids`, `labels` (lists), `avoid` (bool) and what a penalty needs of the
            reference model, `margins` or `reference` (lists of float).
        pad_token_id: Fills `input_ids`; it is masked, so any id will do.

    Returns:
        `input_ids`, `attention_mask`, `labels` (B, T), `avoid` (B,), and `margins` or `reference` (B, T) if given.
    """
    width = max(len(row["input_ids"]) for row in rows)

    def pad(key: str, filler: float) -> Tensor:
        return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])

    batch = {
        "input_ids": pad("input_ids", pad_token_id),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        ),
        "labels": pad("labels", IGNORE_INDEX),
        "avoid": torch.tensor([row["avoid"] for row in rows]),
    }
    return batch | {key: pad(key, 0.0) for key in ("margins", "reference") if key in rows[0]}
