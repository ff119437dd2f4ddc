"""Trials of an adapter on the upper layers alone, with a loop of their own; not the trainer's.

    python research/method/upper_layers.py DATA RUN OUT QUEUE

DATA holds public sets (STL's SafeText prompts, HarmBench's validation part), RUN is a finished harvest of
recipes/demo.yaml, OUT gets replies and `results.jsonl`, QUEUE is a JSON-lines file of settings, each with a `name`;
those that `results.jsonl` holds are skipped. The frozen lower layers' states and the untouched model's last states are
computed once a row: that makes a trial four times as quick as the trainer on a processor.

`probe` in place of QUEUE fits a logistic regression on the last prompt token's state of every third layer, toxic
against benign training prompts, and writes how it does on the validation prompts.
"""

import csv
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from tasft.core.provenance import commit
from tasft.data.rows import Prompt, read_prompts
from tasft.judges.coherence import incoherence
from tasft.judges.refusal_matching import declines as by_phrases
from tasft.models.engine import Sampling, requests_for
from tasft.models.load import add_lora, detach, load_model, load_tokenizer
from tasft.models.local import TransformersEngine

BASE = "smollm2-135m-instruct"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN_WORDS = re.compile(r"^(this|the|your|the above) (request|question|statement|instruction)s? (is|are|was) ", re.I)

Row = tuple[tuple[int, ...], tuple[int, ...]]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def declines(reply: str) -> bool:
    """By phrases, or by saying what the request is: "This request is harmful because ..."."""
    return by_phrases(reply) or bool(OWN_WORDS.match(reply.strip()))


@dataclass(frozen=True)
class Settings:
    """One training."""

    name: str
    seed: int = 0
    first_layer: int = 20
    r: int = 16
    lr: float = 1e-3
    steps: int = 120
    anchors: str = "explained"  # or refused: which wording they were drawn under
    most_anchors: int = 80
    twins: bool = False
    per_step: tuple[int, ...] = (1, 1, 4, 1)  # avoid, anchor, benign, benign that came back
    tokens: tuple[int, ...] = (16, 16, 10)  # of avoid rows, anchors, benign rows
    weights: tuple[float, ...] = (0.5, 1.0, 1.0, 1.0)
    penalty: str = "nlcl"  # or none
    rounds: int = 1
    look: int = 150


def validation(data: Path) -> dict[str, list[Prompt]]:
    """Prompts that nothing is trained on, and on which settings are chosen."""
    with open(data / "adversarial/harmbench_behaviors_text_val.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["FunctionalCategory"] == "standard"]
    return {
        "demo toxic": read_prompts("demo-toxic-validation"),
        "HarmBench val": [Prompt(row["BehaviorID"], row["Behavior"]) for row in rows],
        "demo benign": read_prompts("demo-benign-validation"),
        "SafeText safe": read_prompts("i-physical-safe", str(data / "stl"))[:60],
    }


class Lab:
    """What all trainings share."""

    def __init__(self, data: Path, run: Path) -> None:
        self.model = load_model(BASE, "float32").eval()
        self.tokenizer = load_tokenizer(BASE)
        self.sets = validation(data)
        rows = {name: read_jsonl(run / "harvest" / f"{name}.jsonl") for name in ("avoid", "anchor", "imitate", "twin")}
        self.texts = {
            name: [(row["prompt"], row["completion"], row.get("ends", True)) for row in part]
            for name, part in rows.items()
        }
        self.lower: dict[Row, torch.Tensor] = {}
        self.before: dict[Row, torch.Tensor] = {}
        self.first_layer = -1

    def ask(self, prompts: list[Prompt], tokens: int, temperature: float = 0.0, seed: int = 0) -> dict[str, Any]:
        """Replies and whether the model ended them, by id."""
        engine = TransformersEngine(self.model, self.tokenizer, "chat")
        sampling = Sampling(tokens, temperature, 1.0, seed)
        batches = engine.generate(requests_for(prompts), sampling, "trial")
        return {reply.id: (reply.completion, reply.finish == "stop") for batch in batches for reply in batch}

    def row(self, prompt: str, reply: str, ends: bool, tokens: int) -> Row:
        """Token ids of a prompt and of the beginning of a reply."""
        head = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        body = self.tokenizer(reply, add_special_tokens=False).input_ids
        return tuple(head), tuple((body + [self.tokenizer.eos_token_id] * ends)[:tokens])

    @torch.no_grad()
    def remember(self, rows: list[Row]) -> None:
        """States below the adapter and last states of the untouched model, of rows that are new."""
        new = [row for row in dict.fromkeys(rows) if row not in self.lower]
        for start in range(0, len(new), 16):
            part = new[start : start + 16]
            width = max(len(head) + len(body) for head, body in part)
            ids = torch.full((len(part), width), self.tokenizer.pad_token_id)
            mask = torch.zeros(len(part), width, dtype=torch.long)
            for n, (head, body) in enumerate(part):
                ids[n, : len(head) + len(body)] = torch.tensor(head + body)
                mask[n, : len(head) + len(body)] = 1
            out = self.model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            for n, row in enumerate(part):
                begin, end = len(row[0]), len(row[0]) + len(row[1])
                self.lower[row] = out.hidden_states[self.first_layer][n, :end].clone()
                self.before[row] = out.last_hidden_state[n, begin - 1 : end - 1].clone()

    def upper(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Last states at the tokens of the replies, their labels and the number of their row."""
        core = self.model.model
        width = max(len(head) + len(body) for head, body in rows)
        states = torch.zeros(len(rows), width, core.config.hidden_size)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        places, labels, numbers = [], [], []
        for n, (head, body) in enumerate(rows):
            states[n, : len(head) + len(body)] = self.lower[head, body]
            mask[n, : len(head) + len(body)] = 1
            places += [n * width + len(head) - 1 + t for t in range(len(body))]
            labels += body
            numbers += [n] * len(body)
        every = core.layers
        core.layers = nn.ModuleList(every[self.first_layer :])
        try:
            hidden = core(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            core.layers = every
        return hidden.flatten(0, 1)[torch.tensor(places)], torch.tensor(labels), torch.tensor(numbers)

    def rows_of(self, s: Settings, rng: random.Random) -> tuple[dict[str, list[Row]], list[Any], list[Any]]:
        """Rows by kind, the anchors and the benign rows as text."""
        explained = [anchor for anchor in self.texts["anchor"] if OWN_WORDS.match(anchor[1])]
        anchors = explained if s.anchors == "explained" else [a for a in self.texts["anchor"] if by_phrases(a[1])]
        rng.shuffle(anchors)
        anchors = anchors[: s.most_anchors]
        benign = [row for row in self.texts["imitate"] if not declines(row[1])]
        benign += self.texts["twin"] if s.twins else []
        rng.shuffle(benign)
        avoid = self.texts["avoid"] if s.penalty != "none" else []
        kinds = zip(("avoid", "anchor", "benign"), (avoid, anchors, benign), s.tokens, strict=True)
        rows = {kind: [self.row(*text, most) for text in texts] for kind, texts, most in kinds}
        return rows | {"back": []}, anchors, benign

    def train(self, s: Settings) -> dict[str, Any]:
        """Train an adapter and leave it on the model."""
        torch.manual_seed(s.seed)
        rng = random.Random(s.seed)
        if self.first_layer != s.first_layer:
            self.lower.clear()
            self.first_layer = s.first_layer
        rows, anchors, benign = self.rows_of(s, rng)
        self.remember([row for part in rows.values() for row in part])
        layers = list(range(s.first_layer, self.model.config.num_hidden_layers))
        self.adapted = add_lora(
            self.model,
            r=s.r,
            lora_alpha=2 * s.r,
            lora_dropout=0.0,
            target_modules=MODULES,
            layers_to_transform=layers,
        )
        parameters = [weight for weight in self.adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=0.0)
        decks: dict[str, list[Row]] = {kind: [] for kind in rows}
        looks, since = [], time.monotonic()
        for step in range(s.steps):
            if s.rounds > 1 and step and step % (s.steps // s.rounds) == 0:
                looks.append(self.look(s, rows, decks, benign, anchors, rng, len(looks)))
            scale = min(1.0, (step + 1) / 10, (s.steps - step) / (s.steps * 0.4))
            for group in optimizer.param_groups:
                group["lr"] = s.lr * scale
            parts = {}
            for (kind, deck), count in zip(decks.items(), s.per_step, strict=True):
                for _ in range(count if rows[kind] else 0):
                    if not deck:
                        deck += rng.sample(rows[kind], len(rows[kind]))
                    parts.setdefault(kind, []).append(deck.pop())
            self.loss(s, parts).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        counts = {kind: len(part) for kind, part in rows.items()}
        return {"rows": counts, "looks": looks, "seconds": round(time.monotonic() - since)}

    def loss(self, s: Settings, parts: dict[str, list[Row]]) -> torch.Tensor:
        """The weighted sum of the terms of a step."""
        head = self.model.lm_head.weight
        states, labels, numbers = self.upper([row for part in parts.values() for row in part])
        logs = F.linear(states, head).log_softmax(-1)
        mine = logs.gather(1, labels[:, None]).squeeze(1)
        weights = dict(zip(("avoid", "anchor", "benign", "back"), s.weights, strict=True))
        total, start = torch.zeros(()), 0
        for kind, part in parts.items():
            chosen = (numbers >= start) & (numbers < start + len(part))
            if kind == "avoid":
                means = torch.stack([mine[numbers == start + n].mean() for n in range(len(part))])
                term = -torch.log(-torch.expm1(means.clamp(max=-1e-6))).mean()
            elif kind == "anchor":
                term = -mine[chosen].mean()
            else:
                then = F.linear(torch.cat([self.before[row] for row in part]), head).log_softmax(-1)
                term = F.kl_div(logs[chosen], then, log_target=True, reduction="none").sum(1).mean()
            total = total + weights[kind] * term
            start += len(part)
        return total

    def look(self, s: Settings, rows: Any, decks: Any, benign: Any, anchors: Any, rng: Any, number: int) -> Any:
        """Benign prompts that are refused and toxic ones that are answered come back."""
        self.model.eval()
        some = [benign[n % len(benign)] for n in range(number * s.look, (number + 1) * s.look)]
        replies = self.ask([Prompt(str(n), text[0]) for n, text in enumerate(some)], 12)
        back = [self.row(*text, s.tokens[2]) for n, text in enumerate(some) if declines(replies[str(n)][0])]
        toxic = sorted({text[0] for text in self.texts["avoid"]})
        asked = [Prompt(f"t{n}", text) for n, text in enumerate(rng.sample(toxic, min(48, len(toxic))))]
        replies = self.ask(asked, 20, 0.7, number)
        still = [prompt for prompt in asked if not declines(replies[prompt.id][0])]
        fresh = [
            self.row(prompt.prompt, *replies[prompt.id], s.tokens[0])
            for prompt in still
            if s.penalty != "none" and incoherence(prompt.prompt, replies[prompt.id][0]) is None
        ]
        rows["back"] += back
        rows["avoid"] += fresh
        decks["back"].clear()
        decks["avoid"] += fresh
        again = {prompt.prompt for prompt in still}
        decks["anchor"] += [self.row(*anchor, s.tokens[1]) for anchor in anchors if anchor[0] in again]
        with self.adapted.disable_adapter():
            self.remember(back + fresh)
        self.adapted.train()
        return {"asked": len(some), "refused": len(back), "toxic": len(asked), "answered": len(still)}

    def measure(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Counts on the validation prompts, and the replies."""
        self.model.eval()
        counts, kept = {}, {}
        for name, prompts in self.sets.items():
            said = self.ask(prompts, 32)
            replies = {prompt.prompt: said[prompt.id][0] for prompt in prompts}
            kept[name] = replies
            counts[name] = {
                "n": len(prompts),
                "declines": sum(map(declines, replies.values())),
                "incoherent": sum(incoherence(*pair) is not None for pair in replies.items()),
            }
        return counts, kept

    @torch.no_grad()
    def states(self, prompts: list[str]) -> np.ndarray:
        """Last prompt token's states, n x layers x width."""
        found = []
        for prompt in prompts:
            head, _ = self.row(prompt, "", False, 0)
            out = self.model.model(torch.tensor([head]), output_hidden_states=True)
            found.append(torch.stack([state[0, -1] for state in out.hidden_states]).numpy())
        return np.stack(found)

    def probe(self) -> list[dict[str, Any]]:
        """Of every third layer, how well a linear reading tells toxic from benign prompts."""
        train = [self.states([p.prompt for p in read_prompts(f"demo-{n}")]) for n in ("toxic-harvest", "benign-train")]
        tried = {name: self.states([prompt.prompt for prompt in prompts]) for name, prompts in self.sets.items()}
        found = []
        for layer in range(3, train[0].shape[1], 3):
            states = np.concatenate([part[:, layer] for part in train])
            mean, spread = states.mean(0), states.std(0) + 1e-6
            labels = np.r_[np.ones(len(train[0])), np.zeros(len(train[1]))]
            reading = LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced")
            reading.fit((states - mean) / spread, labels)
            scores = {n: reading.decision_function((s[:, layer] - mean) / spread) for n, s in tried.items()}
            pairs = [(a, b) for a in ("demo toxic", "HarmBench val") for b in ("demo benign", "SafeText safe")]
            found.append(
                {"layer": layer, "called toxic": {name: round(float((s > 0).mean()), 3) for name, s in scores.items()}}
                | {
                    f"AUROC, {a} against {b}": round(
                        roc_auc_score(
                            np.r_[np.ones(len(scores[a])), np.zeros(len(scores[b]))], np.r_[scores[a], scores[b]]
                        ),
                        3,
                    )
                    for a, b in pairs
                }
            )
        return found


def main(data: Path, run: Path, out: Path, queue: str) -> None:
    """Work through the queue."""
    lab = Lab(data, run)
    out.mkdir(parents=True, exist_ok=True)
    if queue == "probe":
        (out / "probe.json").write_text(json.dumps({"commit": commit(), "layers": lab.probe()}, indent=1) + "\n")
        return
    results = out / "results.jsonl"
    done = {row["name"] for row in read_jsonl(results)}
    for row in read_jsonl(Path(queue)):
        if row["name"] in done:
            continue
        about: dict[str, Any] = {}
        if row["name"] != "untouched":
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
            about = lab.train(Settings(**values))
        counts, kept = lab.measure()
        detach(lab.adapted) if about else None
        (out / f"{row['name']}.json").write_text(json.dumps(kept))
        with results.open("a") as file:
            file.write(json.dumps({"name": row["name"], "settings": row, "counts": counts, **about}) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
