"""Plant one fault after another into the losses and see that a test goes red.

Each mutation replaces one piece of a source file in a copy of the package and runs the tests of the losses on it until
the first failure. A mutation that survives is a hole in the tests.

    python research/mutate.py [--json docs/results/mutations.json] [--page docs/results/mutations.md] [--tests NAME]
        [word ...]

Words choose the mutations whose description holds one of them; of the others the file keeps what it has.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pages import put

ROOT = Path(__file__).parents[1]
TESTS = ["tests/test_loss.py", "tests/test_tiles.py"]


class Mutation(NamedTuple):
    """A fault: in a file of `tasft.loss`, `old` (found once) becomes `new`."""

    what: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "count ignored positions",
        "tokens.py",
        "keep = labels != IGNORE_INDEX\n    kept = labels[keep]",
        "keep = labels == labels\n    kept = labels.clamp(min=0)",
    ),
    Mutation("accept a label that is no token", "tokens.py", "(kept < 0) | (kept >= vocabulary)", "kept != kept"),
    Mutation("shift the wrong way", "tokens.py", "labels[..., 1:], (0, 1)", "labels[..., :-1], (1, 0)"),
    Mutation("emd: flip the sign", "transport.py", "penalty = -(-log_odds)", "penalty = (-log_odds)"),
    Mutation(
        "emd: forget the square of the share", "transport.py", ".sigmoid().square() * distance", ".sigmoid() * distance"
    ),
    Mutation("emd: detach the mean embedding", "transport.py", "(mean - space.embed", "(mean.detach() - space.embed"),
    Mutation("emd_exact: flip the sign", "transport.py", "total_of(-cost, weights)", "total_of(cost, weights)"),
    Mutation("emd_hinge: never stop", "transport.py", "(margins - cost).relu()", "(margins - cost)"),
    Mutation("emd_hinge: flip the sign", "transport.py", "(margins - cost)", "(cost - margins)"),
    Mutation(
        "emd_hinge: forget the mask of the margins",
        "transport.py",
        "margins[labels != IGNORE_INDEX], at",
        "margins[: int((labels != IGNORE_INDEX).sum())], at",
    ),
    Mutation("emd: forget the share of the others", "transport.py", "(-log_odds).sigmoid() * cost", "cost"),
    Mutation(
        "emd: detach the share of the others",
        "transport.py",
        "(-log_odds).sigmoid() * cost",
        "(-log_odds.detach()).sigmoid() * cost",
    ),
    Mutation(
        "emd: detach the cost", "transport.py", "(-log_odds).sigmoid() * cost", "(-log_odds).sigmoid() * cost.detach()"
    ),
    Mutation("nlcl: sum instead of mean over a response", "likelihood.py", "(total / length).log()", "total.log()"),
    Mutation(
        "nlcl: no form for improbable responses",
        "likelihood.py",
        "torch.where(m < large, (-torch.expm1(-m)).log(), torch.log1p(-torch.exp(-large)))",
        "(-torch.expm1(-m)).log()",
    ),
    Mutation(
        "forget the weights",
        "tokens.py",
        "(terms * weights).sum()",
        "terms.sum()",
    ),
    Mutation(
        "weights of the wrong responses",
        "likelihood.py",
        "scatter(0, index, weights[keep])",
        "scatter(0, index, weights[: int(keep.sum())])",
    ),
    Mutation("nlcl: flip the sign", "likelihood.py", "total_of(-_log_complement", "total_of(_log_complement"),
    Mutation(
        "nlcl: detach a response's mean",
        "likelihood.py",
        "(log_surprise - peak[index]).exp())",
        "(log_surprise - peak[index]).exp().detach())",
    ),
    Mutation(
        "nlcl: no small-number branch",
        "likelihood.py",
        "return torch.where(lost, log_m, precise)",
        "return precise",
    ),
    Mutation(
        "likelihood: forget the mask of the segments",
        "likelihood.py",
        "torch.unique(segments[keep]",
        "torch.unique(segments[: int(keep.sum())]",
    ),
    Mutation(
        "unlikelihood: of the wrong side",
        "likelihood.py",
        "total_of(-F.logsigmoid(-log_odds)",
        "total_of(-F.logsigmoid(log_odds)",
    ),
    Mutation(
        "npo: forget the reference",
        "likelihood.py",
        "log_q - reference[labels != IGNORE_INDEX], index, length)\n",
        "log_q, index, length)\n",
    ),
    Mutation(
        "npo: forget the mask of the reference",
        "likelihood.py",
        "reference[labels != IGNORE_INDEX], index, length)\n",
        "reference[: len(log_q)], index, length)\n",
    ),
    Mutation(
        "npo_mean: forget the reference",
        "likelihood.py",
        "log_q - reference[labels != IGNORE_INDEX], index, length) / length",
        "log_q, index, length) / length",
    ),
    Mutation(
        "npo_mean: sum instead of mean", "likelihood.py", "INDEX], index, length) / length", "INDEX], index, length)"
    ),
    Mutation(
        "simnpo: sum instead of mean",
        "likelihood.py",
        "_summed(log_q, index, length) / length",
        "_summed(log_q, index, length)",
    ),
    Mutation("npo: forget beta in front", "likelihood.py", "-2 / beta * F.logsigmoid", "-2 * F.logsigmoid"),
    Mutation(
        "npo: flip the sign", "likelihood.py", "F.logsigmoid(-beta * log_ratio)", "F.logsigmoid(beta * log_ratio)"
    ),
    Mutation("ascent: flip the sign", "likelihood.py", "TokenSum(-total, count)", "TokenSum(total, count)"),
    Mutation("tiles: do not mask the label", "tiles.py", "_set_label(z, chunk, -torch.inf)", "pass"),
    Mutation(
        "tiles: skip the rescale of the mass",
        "tiles.py",
        "running.mass.mul_(decay).add_(z.sum(1))",
        "running.mass.add_(z.sum(1))",
    ),
    Mutation(
        "tiles: skip the rescale of the costs",
        "tiles.py",
        "running.moment.mul_(decay).add_(tile[1]",
        "running.moment.add_(tile[1]",
    ),
    Mutation("tiles: skip the rescale of the entropy", "tiles.py", "* running.mass).mul_(decay)", "* running.mass)"),
    Mutation(
        "tiles: forget that the peak moved the entropy",
        "tiles.py",
        "(running.peak - before) * running.mass",
        "0 * running.mass",
    ),
    Mutation(
        "tiles: no online maximum",
        "tiles.py",
        "torch.maximum(before, z.amax(1), out=running.peak)",
        "running.peak.zero_()",
    ),
    Mutation("tiles: forget the bias", "tiles.py", "product.add_(bias)", "pass"),
    Mutation(
        "tiles: forget the slope of the cap",
        "tiles.py",
        "slope = 1 - product.square()",
        "slope = torch.ones_like(product)",
    ),
    Mutation("tiles: forget the inverse norms", "tiles.py", "    dots.mul_(chunk.inverse_norm)\n", ""),
    Mutation("tiles: forget the scale of the label", "tiles.py", "dots.mul_(chunk.scale[:, None])", "dots"),
    Mutation("tiles: forget what lies along the mean", "tiles.py", "dots.sub_(chunk.along)", "pass"),
    Mutation("tiles: forget the offset", "tiles.py", "dots.sub_(chunk.offset[:, None])", "pass"),
    Mutation("tiles: backward forgets the label", "tiles.py", "    _set_label(weights, chunk, odds[:, None])\n", ""),
    Mutation(
        "tiles: backward forgets the gain",
        "tiles.py",
        "chunk.gain if slope is None else slope.mul_(chunk.gain)",
        "1 if slope is None else slope",
    ),
    Mutation(
        "divergence: the wrong way round", "scan.py", "torch.sub(total[0], total[1])", "torch.sub(total[1], total[0])"
    ),
    Mutation("divergence: forget the gain", "scan.py", ".mul_(head.scale))\n        ctx.dtype", ")\n        ctx.dtype"),
    Mutation("divergence: forget the masses", "scan.py", " + (now.mass / earlier.mass).log()", ""),
    Mutation("divergence: skip the rescale of the derivative", "scan.py", "total.mul_(decay[..., None])", "pass"),
    Mutation(
        "divergence: skip the rescale of the gap", "tiles.py", "running[1].moment.mul_(decay[1])", "running[1].moment"
    ),
    Mutation("divergence: weigh by the model now", "tiles.py", "gap.mul_(tile[1])", "gap.mul_(tile[0])"),
    Mutation("divergence: forget the weights", "retain.py", "at_counted(weights, labels)", "None"),
    Mutation("scan: skip the rescale of the derivative", "scan.py", "total.mul_(decay[:, None])", "pass"),
    Mutation("scan: skip the rescale of the mean embedding", "scan.py", "mean.mul_(decay[:, None])", "mean"),
    Mutation(
        "scan: do not subtract the mean row",
        "scan.py",
        "mean.sub_(running.moment[:, None]",
        "mean.sub_(0 * running.moment[:, None]",
    ),
    Mutation("scan: forget the mean in the offset", "scan.py", " - self.space.mean.square().sum())", ")"),
    Mutation(
        "scan: forget the quotient rule",
        "scan.py",
        "torch.addcmul(-total[1], affinity[:, None], total[0], out=total[1])",
        "pass",
    ),
    Mutation("scan: forget the gain of the derivative", "scan.py", "total.mul_(head.scale)", "pass"),
    Mutation(
        "scan: the label's own derivative with the wrong sign",
        "scan.py",
        "torch.sub(slope, total[0], out=total[0])",
        "torch.add(-slope, total[0], alpha=-1, out=total[0])",
    ),
    Mutation("scan: detach the cost in backward", "scan.py", "hidden.addcmul_(cost[:, None], derivative[1])", "pass"),
    Mutation(
        "scan: forget the log-odds in the base", "scan.py", "log_odds + (pull * mean).sum(1)", "(pull * mean).sum(1)"
    ),
    Mutation("scan: forget the mean in the base", "scan.py", "log_odds + (pull * mean).sum(1)", "log_odds"),
    Mutation(
        "scan: a bias alone does not count as trained",
        "scan.py",
        "parts = (head.weight, head.bias)",
        "parts = (head.weight,)",
    ),
    Mutation(
        "scan: add up in the dtype of the inputs", "scan.py", "torch.promote_types(widest, torch.float32)", "widest"
    ),
    Mutation(
        "scan: drop the last chunk",
        "scan.py",
        "range(0, len(self.weight), self.chunk_size)",
        "range(0, len(self.weight) - 1, self.chunk_size)",
    ),
    Mutation(
        "scan: gradient of the bias in the wrong place",
        "scan.py",
        "bias[tokens] = out[0].sum(0, dtype=self.dtype)",
        "bias[: out.shape[2]] = out[0].sum(0, dtype=self.dtype)",
    ),
    Mutation(
        "scan: hold all logits at once",
        "scan.py",
        "min(chunk_size or fitting, len(self.weight))",
        "len(self.weight)",
    ),
    Mutation(
        "scan: the most probable token is never the label",
        "scan.py",
        "torch.maximum(log_q.exp(), rest / running.mass)",
        "rest / running.mass",
    ),
    Mutation(
        "scan: entropy of the others alone",
        "scan.py",
        "rest * (among_others - log_rest) - log_q.exp() * log_q",
        "among_others",
    ),
    Mutation(
        "space: rows of zeros have a direction once centred", "space.py", "_inverse(norms) * real", "_inverse(norms)"
    ),
    Mutation("space: the mean counts rows of zeros", "space.py", "real.sum().clamp(min=1)", "len(matrix)"),
    Mutation(
        "space: forget to centre embeddings", "space.py", "(rows if self.mean is None else rows - self.mean)", "rows"
    ),
]


def first_failure(mutation: Mutation | None, select: str = "") -> str | None:
    """Name of the first test that fails on a mutated copy, among those whose name holds `select`; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "tasft"
        shutil.copytree(ROOT / "src" / "tasft", package)
        if mutation is not None:
            path = package / "loss" / mutation.file
            text = path.read_text()
            if text.count(mutation.old) != 1:
                raise SystemExit(
                    f"{mutation.what}: {mutation.old!r} stands {text.count(mutation.old)} times in {path.name}"
                )
            path.write_text(text.replace(mutation.old, mutation.new))
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not gpu",
            "-k",
            select,
            *TESTS,
        ]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    if run.returncode != 1 or failed is None:
        raise SystemExit(f"{mutation}: pytest ended with {run.returncode}\n{run.stdout[-2000:]}")
    return failed[1]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each fault and the first test that it turns red."""
    lines = ["| fault | first red test |", "|---|---|"]
    for row in rows:
        test = "**none**" if row["red"] is None else f"`{row['red'].split('::')[1].split('[')[0]}`"
        lines.append(f"| {row['what']} | {test} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--page", type=Path, metavar="PATH", help="put the table of that file between this page's marks"
    )
    parser.add_argument("--tests", default="", metavar="NAME", help="run only tests whose name holds this")
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.words or any(word in m.what for word in arguments.words)]
    if (red := first_failure(None, arguments.tests)) is not None:
        raise SystemExit(f"{red} fails without any mutation")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(partial(first_failure, select=arguments.tests), chosen)
        rows = []
        for mutation, red in zip(chosen, found, strict=True):
            rows.append({"what": mutation.what, "file": mutation.file, "red": red})
            print(f"{'SURVIVED' if red is None else 'red'}: {mutation.what} ({red})", flush=True)
    if arguments.json:
        kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        known = {row["what"]: row for row in [*kept, *rows]}
        rows_of_all = [known[mutation.what] for mutation in MUTATIONS if mutation.what in known]
        arguments.json.write_text(json.dumps(rows_of_all, indent=1) + "\n")
        if arguments.page:
            put(arguments.page, "mutations", table(rows_of_all))
    survived = sum(row["red"] is None for row in rows)
    print(f"{len(rows) - survived} of {len(rows)} turn a test red")
    raise SystemExit(survived > 0)


if __name__ == "__main__":
    main()
