"""What each penalty does when nothing else holds the distribution: it need not be unbounded to collapse.

The logits of one position are free parameters, moved by plain gradient descent on one penalty alone. A start is such a
position: a token to avoid with probability 0.8, the rest spread over the other tokens, those that mean nearly the same
a little more probable. The token embeddings are synthetic, unit vectors in clusters, so that no weights are needed and
the picture can be drawn again anywhere. Every penalty gets the same starts and the same learning rate; `emd`, whose
slope is twice that of `emd_exact`, gets the weight 1/2. Curves are medians over the starts.

    python research/collapse.py [--json docs/results/collapse.json] [--plot docs/collapse.svg]

Not in it: a network that shares its weights between positions and prompts, rows to imitate, an optimizer with memory,
the geometry of a real head. It shows where a penalty pulls, not what a training run ends in.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tasft.loss import PENALTIES, CostSpace, Head, log_probability, margins

ROOT = Path(__file__).parents[1]
WEIGHTS = {"emd": 0.5}
PANELS = {"entropy_nats": "Entropy of Q (nats)", "mean_cost": "Mean cost for the token to avoid (EMD)"}
# Okabe and Ito's palette; dash and marker tell the lines apart where colour does not.
STYLES = [
    ("#d55e00", "-", "o"),
    ("#e69f00", "--", "s"),
    ("#0072b2", "-", "^"),
    ("#009e73", "-", "D"),
    ("#000000", ":", "x"),
    ("#cc79a7", "-.", "v"),
    ("#56b4e9", "--", "*"),
]


@dataclass(frozen=True)
class Setting:
    """Everything that the curves depend on besides the penalties themselves."""

    seed: int = 0
    starts: int = 16
    clusters: int = 25
    cluster_size: int = 8
    width: int = 64
    spread: float = 0.7  # of a member around its cluster's centre, relative to the centre's norm
    label_probability: float = 0.8
    synonym_logits: float = 3.0  # added to a logit for each unit of cosine with the label
    noise_logits: float = 1.0
    beta: float = 0.1  # of `npo`
    learning_rate: float = 1.0
    steps: int = 3000
    points: int = 60


@dataclass(frozen=True)
class World:
    """Embeddings and clusters of V tokens; costs and starting logits (N, V), token to avoid (N,) of N starts."""

    space: CostSpace
    clusters: Tensor
    costs: Tensor
    logits: Tensor
    labels: Tensor

    @property
    def others(self) -> Tensor:
        """The starting logits without the token to avoid."""
        return self.logits.scatter(1, self.labels[:, None], -torch.inf)


def world(setting: Setting) -> World:
    generator = torch.Generator().manual_seed(setting.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = normal(setting.clusters, 1, setting.width)
    members = setting.spread * normal(setting.clusters, setting.cluster_size, setting.width)
    embeddings = torch.nn.functional.normalize((centres + members).flatten(0, 1), dim=1)
    labels = torch.randperm(len(embeddings), generator=generator)[: setting.starts]
    cosines = embeddings[labels] @ embeddings.T
    logits = setting.synonym_logits * cosines + setting.noise_logits * normal(*cosines.shape)
    rows = torch.arange(len(labels))
    logits[rows, labels] = -torch.inf
    odds = setting.label_probability / (1 - setting.label_probability)
    logits[rows, labels] = logits.logsumexp(1) + torch.tensor(odds).log()
    clusters = torch.arange(setting.clusters).repeat_interleave(setting.cluster_size)
    return World(CostSpace.of(embeddings), clusters, 1 - cosines, logits, labels)


def state(logits: Tensor, at: World) -> dict[str, Tensor]:
    """What is watched, for each start (N,)."""
    q = logits.softmax(1)
    return {
        "entropy_nats": torch.special.entr(q).sum(1),
        "mean_cost": (q * at.costs).sum(1),
        "label_probability": q.gather(1, at.labels[:, None])[:, 0],
        "top1_probability": q.amax(1),
    }


def recorded_steps(setting: Setting) -> list[int]:
    """Step 0 and others at even distances of the logarithm, which is how the axis is drawn."""
    spaced = torch.logspace(0, torch.tensor(setting.steps).log10().item(), setting.points)
    return [0, *sorted(set(spaced.round().int().tolist()))]


def descend(name: str, at: World, setting: Setting) -> tuple[list[dict[str, Tensor]], Tensor]:
    """States of all starts at the recorded steps, under one penalty alone; and the last logits."""
    penalty = PENALTIES[name]
    # With the identity as head the hidden state is the logits.
    head = Head(torch.eye(at.logits.shape[1], dtype=at.logits.dtype))
    offered: dict[str, Any] = {
        "space": at.space,
        "margins": margins(at.logits, head, at.labels, space=at.space),
        "segments": torch.arange(len(at.labels)),
        "reference": log_probability(at.logits, head, at.labels),
        "beta": setting.beta,
    }
    needed = {need: offered[need] for need in penalty.needs}
    rate = setting.learning_rate * WEIGHTS.get(name, 1.0)
    logits = at.logits.clone().requires_grad_()
    states, recorded = [], set(recorded_steps(setting))
    for step in range(setting.steps + 1):
        if step in recorded:
            states.append(state(logits.detach(), at))
        # The sum, not the mean: each start is on its own.
        (slope,) = torch.autograd.grad(penalty.fn(logits, head, at.labels, **needed).total, logits)
        with torch.no_grad():
            logits -= rate * slope
    return states, logits.detach()


def row(name: str, at: World, states: list[dict[str, Tensor]], logits: Tensor) -> dict[str, Any]:
    """Curves (medians over starts), where the starts end, and what their most probable token then is, if over 0.5."""
    last = states[-1]
    top = logits.argmax(1)[gathered := last["top1_probability"] > 0.5]
    ends_on = {
        "one_token": len(top),
        "second_at_start": int((top == at.others.argmax(1)[gathered]).sum()),
        "near_synonym": int((at.clusters[top] == at.clusters[at.labels[gathered]]).sum()),
        "farthest": int((top == at.costs.argmax(1)[gathered]).sum()),
    }
    return {
        "penalty": name,
        "weight": WEIGHTS.get(name, 1.0),
        "curves": {key: [round(float(each[key].median()), 4) for each in states] for key in last},
        "end": {
            key: {"low": round(float(values.min()), 4), "high": round(float(values.max()), 4)}
            for key, values in last.items()
        },
        "starts_that_end_on": ends_on,
    }


def measure(setting: Setting) -> dict[str, Any]:
    at = world(setting)
    others = state(at.others, at)
    return {
        "setting": asdict(setting),
        # Medians over starts, as in the curves: the farthest token, and the start without the token to avoid.
        "highest_cost": round(float(at.costs.amax(1).median()), 4),
        "others": {key: round(float(others[key].median()), 4) for key in PANELS},
        "steps": recorded_steps(setting),
        "rows": [row(name, at, *descend(name, at, setting)) for name in PENALTIES],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Both panels as SVG; the same result gives the same bytes."""
    steps = result["steps"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tasft", "font.size": 9.5}):
        figure = Figure(figsize=(9.2, 4.1))
        for number, (key, title) in enumerate(PANELS.items()):
            axes = figure.add_axes((0.06 + 0.5 * number, 0.24, 0.43, 0.66))
            for place, line in enumerate(result["rows"]):
                color, dash, marker = STYLES[place]
                axes.plot(
                    steps,
                    line["curves"][key],
                    linestyle=dash,
                    color=color,
                    marker=marker,
                    # Marks of different lines fall on different steps, so that lines that coincide show both.
                    markevery=(2 + place, 9),
                    markersize=5,
                    linewidth=1.6,
                    label=line["penalty"],
                )
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(0, steps[-1])
            axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step of gradient descent")
            axes.grid(color="#dde2e8", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, handlelength=3.2)
        figure.savefig(path, format="svg", metadata={"Date": None})


def table(result: dict[str, Any]) -> str:
    """Markdown: medians at the start and the end of each curve."""
    keys = ("entropy_nats", "mean_cost", "label_probability", "top1_probability")
    first = result["rows"][0]["curves"]
    lines = ["| penalty | entropy (nats) | mean cost | label | most probable token |", "|---|---|---|---|---|"]
    lines.append("| at the start | " + " | ".join(f"{first[key][0]:.2f}" for key in keys) + " |")
    for line in result["rows"]:
        shown = (f"{line['curves'][key][-1]:.2f}" for key in keys)
        lines.append(f"| `{line['penalty']}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "collapse.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "collapse.svg")
    arguments = parser.parse_args()
    result = measure(Setting())
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result) + "\n")
    draw(result, arguments.plot)
    print(table(result))


if __name__ == "__main__":
    main()
