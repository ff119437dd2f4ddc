"""Throw-away loop for the search of docs/results/method.md, not the product's: SmolLM2-135M-Instruct, bf16.

    python research/method/trial.py DATA OUT QUEUE

DATA holds public sets (named below), OUT gets what is drawn and found, QUEUE is a JSON-lines file of settings, each
with a `name`; those that OUT/results.jsonl holds are skipped, so that a search goes on where it was left.
"""

import csv
import gzip
import json
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from tasft.data.rows import Prompt, read_prompts
from tasft.harvest.settings import INSTRUCTIONS
from tasft.judges.base import Pair
from tasft.judges.coherence import incoherence
from tasft.judges.embedded import Embedded
from tasft.judges.encoder import encoder
from tasft.judges.refusal_matching import declines
from tasft.models.engine import Sampling, requests_for
from tasft.models.load import add_lora, detach, load_model, load_tokenizer
from tasft.models.local import TransformersEngine

BASE = "smollm2-135m-instruct"
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
WORDINGS = dict(zip(("responsible", "polite", "somebody", "law", "message"), INSTRUCTIONS, strict=True))


@dataclass(frozen=True)
class Settings:
    """One training."""

    name: str
    seed: int = 0
    steps: int = 120
    lr: float = 1e-3
    r: int = 16
    targets: tuple = tuple(ATTENTION + MLP)
    toxic: int = 100  # toxic prompts
    anchors: int = 60  # own refusals
    anchor_kind: str = "instructed"  # or prefilled
    wordings: tuple = ("responsible", "law", "message")
    nearness: float = 0.3  # of an anchor to its prompt, at least
    pool: tuple = ("demo",)  # of benign rows: demo, alpaca, asked
    benign: int = 300  # benign rows
    twins: int = 0  # for each toxic prompt, by meaning, from all of the pool
    per_step: tuple = (2, 1, 8, 0)  # avoid, anchor, benign, border
    tokens: tuple = (32, 32, 20)  # of avoid, anchor, benign responses
    penalty: str = "nlcl"
    weights: tuple = (0.5, 1.0, 1.0, 1.0)  # penalty, anchors, benign, border
    beta: float = 1.0
    retain: float = 1.0  # share of KL in the benign loss; the rest is NLL
    rounds: int = 1
    look: int = 300  # benign prompts asked in each round
    toxic_round: bool = True  # toxic prompts still answered come back


def prompts_of(data: Path) -> dict[str, list[Prompt]]:
    """Every list of prompts, by name."""
    named = {name: read_prompts(name, str(data / "stl")) for name in ("i-physical-safe", "i-malicious", "harmfulq")}
    named["i-physical-safe-60"] = named["i-physical-safe"][:60]
    named["xstest-safe"] = read_prompts("xstest-safe", str(data / "xstest"))
    for name in ("toxic-harvest", "toxic-validation", "toxic-heldout"):
        named[name] = read_prompts(f"demo-{name}")
    for name in ("train", "validation", "heldout"):
        named[f"benign-{name}"] = read_prompts(f"demo-benign-{name}")
    with open(data / "adversarial/harmbench_behaviors_text_val.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["FunctionalCategory"] == "standard"]
    named["harmbench-val"] = [Prompt(row["BehaviorID"], row["Behavior"]) for row in rows]
    stl = json.loads((data / "stl/safety_only_data_Instructions.json").read_text())
    named["stl-train"] = [Prompt(f"stl-{n}", row["instruction"]) for n, row in enumerate(stl) if not row["input"]]
    with gzip.open(data / "alpaca/alpaca_instructions_only.jsonl.gz", "rt") as file:
        alpaca = [json.loads(line)["instruction"].strip() for line in file]
    rng = random.Random(0)
    alpaca = [text for text in alpaca if 3 < len(text.split()) < 25 and "\n" not in text]
    rng.shuffle(alpaca)
    named["alpaca"] = [Prompt(f"alpaca-{n}", text) for n, text in enumerate(alpaca[:6000])]
    verbs = {"Generate", "Create", "Write", "Describe", "Explain", "Construct", "Design", "Suggest", "Find", "Identify"}
    verbs |= {"Compose", "Summarize", "Make", "Calculate", "Develop", "Compare", "Outline", "Classify", "Edit", "Build"}
    verbs |= {"Organize", "Convert", "Plan", "Prepare", "Use", "Choose", "Estimate", "Draw", "Analyze", "Produce"}
    asked = [text for text in alpaca[6000:] if text.split()[0] in verbs]
    starts = ("How do I", "How can I", "What is the best way to", "Tell me how to", "Explain how to", "Show me how to")
    named["asked"] = [
        Prompt(f"asked-{n}", f"{starts[n % 6]} {text[0].lower()}{text[1:].rstrip('.?!')}{'?' if n % 6 < 3 else '.'}")
        for n, text in enumerate(asked[:6000])
    ]
    return named


class Lab:
    """What all trainings share: model, prompts, drawn replies."""

    def __init__(self, data: Path, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.model = load_model(BASE, "bfloat16").eval()
        self.model.set_attn_implementation("eager")  # the way back of the fused one is slow on a CPU
        self.tokenizer = load_tokenizer(BASE)
        self.prompts = prompts_of(data)
        self.judge = Embedded()
        self.cache: dict[str, dict] = {}

    def ask(self, prompts, tokens, temperature=0.0, prefix="", seed=0, keep=None, text=None):
        """Replies by prompt id; with `keep`, drawn once and kept in a file of that name."""
        path = self.out / f"{keep}.json" if keep else None
        have = json.loads(path.read_text()) if path and path.exists() else {}
        missing = [prompt for prompt in prompts if prompt.id not in have]
        if missing:
            written = [
                replace(prompt, prompt=text.format(prompt=prompt.prompt)) if text else prompt for prompt in missing
            ]
            engine = TransformersEngine(self.model, self.tokenizer, "chat")
            sampling = Sampling(tokens, temperature, 1.0, seed)
            for batch in engine.generate(requests_for(written, prefix=prefix), sampling, "trial"):
                have |= {reply.id: [reply.completion, reply.finish == "stop"] for reply in batch}
            if path:
                path.write_text(json.dumps(have))
        return {prompt.id: have[prompt.id] for prompt in prompts}

    def verdicts(self, prompts, replies):
        """(harmful, refuses, coherent) of each."""
        pairs = [Pair(prompt.id, prompt.prompt, replies[prompt.id][0]) for prompt in prompts]
        found = {}
        for pair, verdict in zip(pairs, self.judge.judge(pairs), strict=True):
            coherent = incoherence(pair.prompt, pair.completion) is None
            refuses = bool(verdict.refusal) or declines(pair.completion)
            found[pair.id] = (coherent and bool(verdict.harmful), refuses, coherent)
        return found

    def toxic(self, count):
        return (self.prompts["toxic-harvest"] + self.prompts["stl-train"][:300])[:count]

    # --- rows ---------------------------------------------------------------------------------

    def row(self, prompt: str, reply: str, ends: bool, tokens: int):
        head = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        body = self.tokenizer(reply, add_special_tokens=False).input_ids
        body = [*body, self.tokenizer.eos_token_id] if ends else body
        return head, body[:tokens]

    def harvest(self, s: Settings):
        """Avoid rows and anchors."""
        toxic = self.toxic(s.toxic)
        plain = [self.ask(toxic, 48, 0.7, seed=n, keep=f"plain{n}") for n in range(2)]
        avoid = []
        for replies in plain:
            verdicts = self.verdicts(toxic, replies)
            avoid += [
                (p, *replies[p.id]) for p in toxic if verdicts[p.id][0] and verdicts[p.id][2] and not verdicts[p.id][1]
            ]
        anchors = []
        if s.anchor_kind == "prefilled":
            replies = self.ask(toxic, 48, 0.7, keep="prefilled", prefix="I'm sorry, but I can't help with that.")
            anchors = [(p, *replies[p.id]) for p in toxic]
        else:
            taken: dict[tuple, int] = {}
            similar = encoder().similarities
            for name in s.wordings:
                replies = self.ask(toxic, 40, keep=f"greedy-{name}", text=WORDINGS[name] + "\n\n{prompt}")
                verdicts = self.verdicts(toxic, replies)
                near = similar([p.prompt for p in toxic], [replies[p.id][0] for p in toxic])
                flips = 0
                for p, nearness in zip(toxic, near, strict=True):
                    harmful, _, coherent = verdicts[p.id]
                    if harmful or not coherent or not declines(replies[p.id][0]):
                        continue
                    flips += 1
                    opening = tuple(replies[p.id][0].split()[:4])
                    if nearness >= s.nearness and taken.get(opening, 0) < max(2, s.anchors // 10):
                        taken[opening] = taken.get(opening, 0) + 1
                        anchors.append((p, *replies[p.id]))
                print(f"{name}: {flips} of {len(toxic)} decline, {len(anchors)} kept so far", flush=True)
        random.Random(s.seed).shuffle(anchors)
        return avoid, anchors[: s.anchors]

    def benign_pool(self, s: Settings):
        names = {"demo": "benign-train"}
        return [p for name in s.pool for p in self.prompts[names.get(name, name)]]

    def benign(self, s: Settings):
        pool = self.benign_pool(s)
        rng = random.Random(s.seed)
        chosen = {p.id: p for p in self.prompts["benign-train"]} if "demo" in s.pool else {}
        if s.twins:
            toxic = self.toxic(s.toxic)
            near = encoder()([p.prompt for p in toxic]) @ encoder()([p.prompt for p in pool]).T
            for scores in near:
                for index in scores.argsort()[::-1][: s.twins]:
                    chosen[pool[index].id] = pool[index]
        rest = [p for p in pool if p.id not in chosen]
        rng.shuffle(rest)
        return (list(chosen.values()) + rest)[: max(s.benign, len(chosen) if s.twins else 0)], rest

    # --- training -----------------------------------------------------------------------------

    def batch(self, rows):
        pad = self.tokenizer.pad_token_id
        width = max(len(h) + len(b) for h, b in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        where, labels, index = [], [], []
        for n, (h, b) in enumerate(rows):
            ids[n, : len(h) + len(b)] = torch.tensor(h + b)
            mask[n, : len(h) + len(b)] = 1
            where += [n * width + len(h) - 1 + t for t in range(len(b))]
            labels += b
            index += [n] * len(b)
        return ids, mask, torch.tensor(where), torch.tensor(labels), torch.tensor(index)

    def hidden(self, model, rows):
        ids, mask, where, labels, index = self.batch(rows)
        core = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
        states = core(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states.flatten(0, 1)[where], labels, index

    def logits(self, states):
        return F.linear(states.bfloat16(), self.model.lm_head.weight).float()

    def train(self, s: Settings):
        torch.manual_seed(s.seed)
        rng = random.Random(s.seed)
        avoid, anchors = self.harvest(s)
        benign, rest = self.benign(s)
        a_tok, i_tok, b_tok = s.tokens
        own = self.ask(benign, 24, keep="benign")
        rows = {
            "avoid": [self.row(p.prompt, r, e, a_tok) for p, r, e in avoid],
            "anchor": [self.row(p.prompt, r, e, i_tok) for p, r, e in anchors],
            "benign": [self.row(p.prompt, *own[p.id], b_tok) for p in benign],
            "border": [],
        }
        print(s.name, {k: len(v) for k, v in rows.items()}, flush=True)
        base = self.model
        rows_before = {}

        def before(part):
            """Hidden states of rows under the untouched model, by row."""
            keys = [(tuple(head), tuple(body)) for head, body in part]
            if missing := [n for n, key in enumerate(keys) if key not in rows_before]:
                with torch.no_grad(), adapted.disable_adapter():
                    states, _, index = self.hidden(adapted, [part[n] for n in missing])
                rows_before.update({keys[n]: states[index == place].clone() for place, n in enumerate(missing)})
            return torch.cat([rows_before[key] for key in keys])

        adapted = add_lora(base, r=s.r, lora_alpha=2 * s.r, lora_dropout=0.0, target_modules=list(s.targets))
        params = [p for p in adapted.parameters() if p.requires_grad]
        optim = torch.optim.AdamW(params, lr=s.lr, weight_decay=0.0)
        decks: dict[str, list] = {name: [] for name in rows}

        def draw(name, count):
            out = []
            for _ in range(count if rows[name] else 0):
                if not decks[name]:
                    decks[name] = rng.sample(rows[name], len(rows[name]))
                out.append(decks[name].pop())
            return out

        log, looks, since = [], [], time.time()
        kinds = ("avoid", "anchor", "benign", "border")
        for step in range(s.steps):
            if s.rounds > 1 and step and step % (s.steps // s.rounds) == 0:
                looks.append(self.look(s, rows, decks, rest, benign, anchors, avoid, adapted))
                adapted.train()
            scale = min(1.0, (step + 1) / 10, (s.steps - step) / (s.steps * 0.4))
            for group in optim.param_groups:
                group["lr"] = s.lr * scale
            parts = {name: draw(name, n) for name, n in zip(kinds, s.per_step, strict=True)}
            if s.penalty == "none":
                parts["avoid"] = []
            parts = {name: part for name, part in parts.items() if part}
            together = [row for part in parts.values() for row in part]
            with torch.autocast("cpu", torch.bfloat16):
                states, labels, index = self.hidden(adapted, together)
            z = self.logits(states)
            log_q = z.log_softmax(-1)
            mine = log_q.gather(1, labels[:, None]).squeeze(1)
            terms, start = {}, 0
            for name, part in parts.items():
                chosen = (index >= start) & (index < start + len(part))
                if name == "avoid":
                    terms[name] = s.weights[0] * self.penalty(s, part, mine, index, z, labels, start, before)
                elif name == "anchor":
                    terms[name] = -s.weights[1] * mine[chosen].mean()
                else:
                    reference = self.logits(before(part)).log_softmax(-1)
                    kl = F.kl_div(log_q[chosen], reference, log_target=True, reduction="none").sum(1).mean()
                    weight = s.weights[2] if name == "benign" else s.weights[3]
                    terms[name] = weight * (s.retain * kl - (1 - s.retain) * mine[chosen].mean())
                start += len(part)
            loss = sum(terms.values())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optim.step()
            optim.zero_grad()
            log.append({k: round(float(v.detach()), 3) for k, v in terms.items()})
            if step % 20 == 0:
                print(step, log[-1], round(time.time() - since), flush=True)
        return adapted, {
            "log": log[::10] + log[-1:],
            "looks": looks,
            "seconds": round(time.time() - since),
            "rows": {k: len(v) for k, v in rows.items()},
        }

    def penalty(self, s, part, mine, index, z, labels, start, before):
        total = []
        for n, row in enumerate(part):
            own = index == start + n
            log_p = mine[own]
            if s.penalty == "nlcl":
                mean = log_p.mean().clamp(max=-1e-6)
                total.append(-torch.log(-torch.expm1(mean)))
            elif s.penalty == "unlikelihood":
                total.append(-torch.log1p(-log_p.exp().clamp(max=1 - 1e-6)).mean())
            elif s.penalty == "simnpo":
                total.append(-2 / s.beta * F.logsigmoid(-s.beta * log_p.mean()))
            elif s.penalty in ("npo", "npo_mean"):
                with torch.no_grad():
                    earlier = self.logits(before([row])).log_softmax(-1).gather(1, labels[own][:, None]).squeeze(1)
                ratio = log_p - earlier
                ratio = ratio.mean() if s.penalty == "npo_mean" else ratio.sum()
                total.append(-2 / s.beta * F.logsigmoid(-s.beta * ratio))
            elif s.penalty in ("emd", "emd_exact"):
                unit = F.normalize(self.model.lm_head.weight.float(), dim=-1)
                mu = z[own].softmax(-1) @ unit
                e = unit[labels[own]]
                cost = (mu - e).square().sum(-1) if s.penalty == "emd" else 1 - (mu * e).sum(-1)
                total.append(-cost.mean())
        return torch.stack(total).mean()

    def look(self, s, rows, decks, rest, benign, anchors, avoid, adapted):
        """One look of the half-trained model at benign and toxic prompts."""
        self.model.eval()
        asked = [rest.pop() for _ in range(min(s.look, len(rest)))] or random.Random(len(rest)).sample(
            benign, min(s.look, len(benign))
        )
        replies = self.ask(asked, 12)
        refused = [p for p in asked if declines(replies[p.id][0])]
        if refused:
            with adapted.disable_adapter():
                own = self.ask(refused, 24, keep="benign")
            # What the untouched model refuses itself is no border.
            refused = [p for p in refused if not declines(own[p.id][0])]
            rows["border"] += [self.row(p.prompt, *own[p.id], s.tokens[2]) for p in refused]
            decks["border"] = []
        found = {"asked": len(asked), "refused": len(refused)}
        if s.toxic_round:
            toxic = random.Random(len(rest)).sample(self.toxic(s.toxic), min(64, s.toxic))
            replies = self.ask(toxic, 24, 0.7, seed=len(rest))
            verdicts = self.verdicts(toxic, replies)
            still = [p for p in toxic if verdicts[p.id][0] and verdicts[p.id][2] and not verdicts[p.id][1]]
            fresh = [self.row(p.prompt, *replies[p.id], s.tokens[0]) for p in still]
            # Fresh ones first, and the refusals of those prompts again.
            decks["avoid"] += fresh
            rows["avoid"] += fresh
            again = {p.id for p in still}
            decks["anchor"] += [self.row(p.prompt, r, e, s.tokens[1]) for p, r, e in anchors if p.id in again]
            found["toxic still"] = len(still)
        print("look", found, flush=True)
        return found

    def measure(self, sets, tokens=32):
        """Rates on sets of prompts, and the replies."""
        self.model.eval()
        rates, kept = {}, {}
        for name in sets:
            prompts = self.prompts[name]
            replies = self.ask(prompts, tokens)
            verdicts = self.verdicts(prompts, replies)
            n = len(prompts)
            rates[name] = {
                "n": n,
                "harmful": round(sum(v[0] and not v[1] for v in verdicts.values()) / n, 3),
                "harmful_embedded": round(sum(v[0] for v in verdicts.values()) / n, 3),
                "declines": round(sum(declines(replies[p.id][0]) for p in prompts) / n, 3),
                "refuses": round(sum(v[1] for v in verdicts.values()) / n, 3),
                "incoherent": round(sum(not v[2] for v in verdicts.values()) / n, 3),
            }
            kept[name] = {p.id: [p.prompt, replies[p.id][0], *verdicts[p.id]] for p in prompts}
        return rates, kept


VALIDATION = ("toxic-validation", "harmbench-val", "benign-validation", "i-physical-safe-60")


def main(data: Path, out: Path, queue: Path) -> None:
    """Work through the queue."""
    lab = Lab(data, out)
    results = out / "results.jsonl"
    while True:
        done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
        left = [row for row in map(json.loads, queue.read_text().splitlines()) if row["name"] not in done]
        if not left:
            return
        row = left[0]
        sets = row.pop("sets", VALIDATION)
        since = time.time()
        if row["name"].startswith("untouched"):
            rates, kept = lab.measure(sets)
            about = {}
        else:
            settings = Settings(
                **{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
            )
            adapted, about = lab.train(settings)
            rates, kept = lab.measure(sets)
            if row.get("save"):
                adapted.save_pretrained(out / "adapters" / row["name"])
            detach(adapted)
        record = {"name": row["name"], "settings": row, "rates": rates, **about, "wall": round(time.time() - since)}
        (out / "replies").mkdir(exist_ok=True)
        (out / "replies" / f"{row['name']}.json").write_text(json.dumps(kept))
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps({"name": row["name"], **rates}), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
