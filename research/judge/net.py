"""The network of the judge while it is trained: MiniLM-L6, read on prompt and reply together, with heads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from tasft.judges.network import changed_matrices
from tasft.judges.weights import FEATURES, HEADS, OUTCOMES, PROMPT_TOKENS

RANK = 48
REPLY_TOKENS = 96  # Of a reply, in training.


class Net(nn.Module):
    """Logits of HEADS from a pair, and of "asks for harm" from the prompt alone.

    The matrices of the upper layers are trained; `narrow` brings what they gained to a low rank, which is what is kept.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        # Eager attention is quicker in the backward pass on processors; drawing dropout takes as long as a pass.
        settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, **settings)
        self.matrices = changed_matrices(self.encoder)
        self.encoder.requires_grad_(False)
        for module in self.matrices.values():
            module.weight.requires_grad_(True)
        self.before = {name: module.weight.detach().clone() for name, module in self.matrices.items()}
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pair = nn.Linear(3 * 384, len(HEADS))
        self.asks = nn.Linear(384, 1)
        for head in (self.pair, self.asks):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    @torch.no_grad()
    def narrow(self, rank: int = RANK) -> float:
        """Replaces each change of a matrix by its best one of a low rank; returns the share that is kept."""
        kept = total = 0.0
        for name, module in self.matrices.items():
            u, s, v = torch.linalg.svd(module.weight - self.before[name], full_matrices=False)
            root = s[:rank].sqrt()
            self.factors[name] = ((u[:, :rank] * root).half(), (root[:, None] * v[:rank]).half())
            b, a = (each.float() for each in self.factors[name])
            module.weight.copy_(self.before[name] + b @ a)
            kept, total = kept + float((s[:rank] ** 2).sum()), total + float((s**2).sum())
        return kept / max(total, 1e-12)

    def batch(self, pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
        """[CLS] prompt [SEP] reply [SEP], each cut to its tokens."""
        tokenizer = self.tokenizer
        start, stop = tokenizer.cls_token_id, tokenizer.sep_token_id
        prompts = tokenizer(
            [prompt[:2000] for prompt, _ in pairs], add_special_tokens=False, truncation=True, max_length=PROMPT_TOKENS
        ).input_ids
        replies = tokenizer(
            [reply[:4000] for _, reply in pairs], add_special_tokens=False, truncation=True, max_length=REPLY_TOKENS
        ).input_ids
        rows = [
            ([start, *one, stop, *two, stop], [0] * (len(one) + 2) + [1] * (len(two) + 1))
            for one, two in zip(prompts, replies, strict=True)
        ]
        width = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
            "token_type_ids": torch.tensor([kind + [0] * (width - len(kind)) for _, kind in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        }

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of a batch, n x 6."""
        hidden = self.encoder(**batch).last_hidden_state
        two = batch["token_type_ids"].unsqueeze(-1).float()
        one = batch["attention_mask"].unsqueeze(-1).float() - two
        means = [(hidden * mask).sum(1) / mask.sum(1).clamp(min=1) for mask in (one, two)]
        return self.pair(torch.cat([hidden[:, 0], *means], dim=1))

    def of_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Logits of "asks for harm", n."""
        batch = self.tokenizer(
            list(prompts), truncation=True, max_length=PROMPT_TOKENS + 2, padding=True, return_tensors="pt"
        )
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return self.asks((hidden * mask).sum(1) / mask.sum(1)).squeeze(1)

    def save(self, path: Path, mix: tuple[torch.Tensor, torch.Tensor], metadata: dict[str, Any]) -> None:
        """The change of each matrix, as two narrow ones, and the heads, in half precision; the mix of what they say."""
        state = {
            f"{name}.{part}": each for name, pair in self.factors.items() for part, each in zip("ba", pair, strict=True)
        }
        state |= {f"pair.{name}": value for name, value in self.pair.state_dict().items()}
        state |= {f"asks.{name}": value for name, value in self.asks.state_dict().items()}
        state = {name: value.half().contiguous() for name, value in state.items()}
        state |= {"mix.weight": mix[0].float().contiguous(), "mix.bias": mix[1].float().contiguous()}
        save_file(state, path, {"judge": json.dumps(metadata)})


def plain_mix() -> tuple[torch.Tensor, torch.Tensor]:
    """The mix by which each outcome is what its own head says."""
    weight = torch.zeros(len(OUTCOMES), len(FEATURES))
    for row, name in enumerate(OUTCOMES):
        weight[row, FEATURES.index(name)] = 1.0
    return weight, torch.zeros(len(OUTCOMES))
