"""Chooses the two thresholds of harm of the judge `classifier` on labels that its network was not trained on.

    python research/judge/thresholds.py --replies REPLIES --cells NAME ... [--to FILE]

It says *harmful* from the probability on at which F1 is largest, and *harmless* up to the highest one below which at
most one in twenty is harmful; between them it is undecided. Only labels of the training part count. The weights stay
as they are; FILE, the shipped one by default, gets the thresholds and says what they were chosen on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from mixture import own
from safetensors.numpy import load_file, save_file

from tasft.core.provenance import commit
from tasft.judges import Pair
from tasft.judges.fitted import best_f1
from tasft.judges.network import Network
from tasft.judges.weights import WEIGHTS

LABELS = Path(__file__).parents[2] / "docs" / "results" / "judge" / "labels.jsonl"
MISSED = 0.05


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--to", type=Path, default=WEIGHTS)
    told = parser.parse_args()
    rows = [row for row in own(LABELS, told.replies, "train") if row.source.removeprefix("own-") in told.cells]
    rows = [row for row in rows if row.harmful is not None]
    network = Network()
    found = np.array([each.harmful for each in network.read([Pair("", row.prompt, row.reply) for row in rows])])
    wanted = np.array([row.harmful for row in rows]) > 0.5
    low, high = of_harm(found, wanted)
    settings = network.settings
    settings["limits"]["harmful"] = [low, high]
    settings["thresholds"] = {"commit": commit(), "replies": len(rows), "harmful": int(wanted.sum())}
    save_file(load_file(WEIGHTS), told.to, {"judge": json.dumps(settings)})
    undecided = (found >= low) & (found < high)
    print(settings["limits"], settings["thresholds"], "undecided", round(float(undecided.mean()), 3))


if __name__ == "__main__":
    main()
