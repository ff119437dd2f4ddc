"""How often intervals of a paired change hold the true change, by simulation: ours, Newcombe's, and the bootstrap.

Pairs are drawn with a rate before, a rate after, and outcomes that agree as often as independent ones, or more often
by half of what is possible. Writes a JSON file and puts the table into docs/numbers.md.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from pages import put

from tasft.core.provenance import commit
from tasft.core.stats import _difference, _newcombe

ROOT = Path(__file__).parents[1]
SIZES = (5, 10, 20, 40, 80, 160, 320, 500)
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
NAMES = {"ours": "tasft", "newcombe": "Newcombe's method 10 alone", "bootstrap": "percentile bootstrap"}


def shares(before: float, after: float, together: float) -> np.ndarray:
    """Shares of pairs that are true in both, gained, lost, and true in neither.

    Args:
        before: Rate.
        after: Rate.
        together: 0 for independent outcomes, 1 for such that agree as often as the two rates allow.
    """
    both = before * after + together * (min(before, after) - before * after)
    return np.clip([both, after - both, before - both, 1 - before - after + both], 0, 1)


def bootstrap(counts: tuple[int, ...], draws: np.random.Generator) -> tuple[float, float]:
    """Percentiles of the change over pairs drawn with replacement."""
    n = sum(counts)
    drawn = draws.multinomial(n, np.array(counts) / n, 2_000)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 2]) / n, (0.025, 0.975))
    return float(low), float(high)


def simulated(n: int, samples: int, seed: int) -> list[dict]:
    """Coverage and mean width for each pair of rates, of one size of sample."""
    draws = np.random.default_rng([seed, n])
    rows = []
    known: dict[tuple[int, ...], dict[str, tuple[float, float]]] = {}
    for before in RATES:
        for after in (rate for rate in RATES if rate <= before):
            for together in (0.0, 0.5):
                chances = shares(before, after, together)
                tables = Counter(map(tuple, draws.multinomial(n, chances / chances.sum(), samples).tolist()))
                held, width = Counter(), Counter()
                for counts, times in tables.items():
                    if counts not in known:
                        ours = _difference(*counts)
                        known[counts] = {
                            "ours": (ours.low, ours.high),
                            "newcombe": _newcombe(*counts),
                            "bootstrap": bootstrap(counts, draws),
                        }
                    for name, (low, high) in known[counts].items():
                        held[name] += times * (low - 1e-12 <= after - before <= high + 1e-12)
                        width[name] += times * (high - low)
                rows.append(
                    {
                        "n": n,
                        "before": before,
                        "after": after,
                        "together": together,
                        **{f"{name}_coverage": held[name] / samples for name in NAMES},
                        **{f"{name}_width": width[name] / samples for name in NAMES},
                    }
                )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: mean and least coverage, and mean width, by the size of the sample."""
    parts = [f"{name}: mean coverage | least | mean width (points)" for name in NAMES.values()]
    lines = [f"| pairs | {' | '.join(parts)} |", "|---|" + "---|" * (3 * len(NAMES))]
    for n in sorted({row["n"] for row in rows}):
        cells = []
        for name in NAMES:
            coverage = [row[f"{name}_coverage"] for row in rows if row["n"] == n]
            width = np.mean([row[f"{name}_width"] for row in rows if row["n"] == n])
            cells.append(f"{100 * np.mean(coverage):.1f}% | {100 * min(coverage):.1f}% | {100 * width:.1f}")
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000, help="of each size and pair of rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "intervals.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "numbers.md")
    asked = parser.parse_args()
    rows = [row for n in SIZES for row in simulated(n, asked.samples, asked.seed)]
    about = {"samples": asked.samples, "seed": asked.seed, "level": 0.95, "commit": commit()}
    asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    put(asked.page, "intervals", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
