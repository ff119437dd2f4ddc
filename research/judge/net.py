"""The network of the judge while it is trained: MiniLM-L6, read on prompt and reply together, with heads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

HEADS = ("harmful", "declines", "partial", "broken", "rambling")
PROMPT_TOKENS, REPLY_TOKENS = 64, 160
RANK = 48


class Net(nn.Module):
    """Logits of HEADS from a pair, and of "asks for harm" from the prompt alone.

    The matrices of the layers are trained; `narrow` brings what they gained to a low rank, which is what is kept.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        # Eager attention is quicker in the backward pass on processors; drawing dropout takes as long as a pass.
        settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, **settings)
        self.matrices = {
            name: module for name, module in self.encoder.encoder.named_modules() if isinstance(module, nn.Linear)
        }
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
        """Logits of a batch, n x 5."""
        hidden = self.encoder(**batch).last_hidden_state.float()
        two = batch["token_type_ids"].unsqueeze(-1).float()
        one = batch["attention_mask"].unsqueeze(-1).float() - two
        means = [(hidden * mask).sum(1) / mask.sum(1).clamp(min=1) for mask in (one, two)]
        return self.pair(torch.cat([hidden[:, 0], *means], dim=1))

    def of_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Logits of "asks for harm", n."""
        batch = self.tokenizer(
            list(prompts), truncation=True, max_length=PROMPT_TOKENS + 2, padding=True, return_tensors="pt"
        )
        hidden = self.encoder(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return self.asks((hidden * mask).sum(1) / mask.sum(1)).squeeze(1)

    @torch.inference_mode()
    def scores(self, pairs: Sequence[tuple[str, str]], size: int = 64) -> torch.Tensor:
        """Logits of pairs, n x 5, in their order."""
        self.eval()
        order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0][:300]) + len(pairs[index][1][:800]))
        result = torch.zeros(len(pairs), len(HEADS))
        for start in range(0, len(order), size):
            some = order[start : start + size]
            with torch.autocast("cpu", torch.bfloat16):
                result[some] = self(self.batch([pairs[index] for index in some])).float()
        return result

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """The change of each matrix, as two narrow ones, and the heads; in half precision."""
        state = {
            f"{name}.{part}": each for name, pair in self.factors.items() for part, each in zip("ba", pair, strict=True)
        }
        state |= {f"pair.{name}": value for name, value in self.pair.state_dict().items()}
        state |= {f"asks.{name}": value for name, value in self.asks.state_dict().items()}
        save_file(
            {name: value.half().contiguous() for name, value in state.items()}, path, {"judge": json.dumps(metadata)}
        )
