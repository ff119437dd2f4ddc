"""How many pairs a second the judge `classifier` reads on a processor, replies of 32, 64 and 512 words.

Writes into results/judge.json. Run it on an idle machine.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from environment import environment

from tasft.judges import Pair
from tasft.judges.network import Network

WORDS = ["the", "cook", "waits", "until", "the", "water", "boils", "before", "eggs", "go", "in"]


def pairs(count: int, words: int) -> list[Pair]:
    """Different pairs with replies of so many words."""
    reply = " ".join((WORDS * (words // len(WORDS) + 1))[:words])
    return [Pair(str(number), f"How do I boil {number} eggs?", f"{number} {reply}") for number in range(count)]


def speed(network: Network, count: int, words: int, times: int) -> float:
    """Pairs a second, the best of several; no pair is read twice by one network without being forgotten."""
    best = 0.0
    for _ in range(times):
        network.known.clear()
        some = pairs(count, words)
        begun = time.perf_counter()
        network.read(some)
        best = max(best, count / (time.perf_counter() - begun))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "judge.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    network = Network()
    speed(network, 32, 16, 1)  # Libraries load on first use.
    words, times = (2048, 1) if asked.quick else (16384, 3)  # In all, so that every length takes about as long.
    rows = [
        {"words": each, "pairs_per_second": round(speed(network, words // each, each, times), 1)}
        for each in (32, 64, 512)
    ]
    print(*rows, sep="\n")
    where = environment("cpu", "float32", asked.threads)
    asked.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
