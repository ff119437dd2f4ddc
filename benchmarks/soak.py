"""Whether work and memory grow no faster than the rows: 20,000 prompts through harvest, 50,000 rows encoded.

Each number of rows has a process of its own, whose seconds are those that it computed (the clock depends on what else
the machine does) and whose memory is the most that it held. A stub answers the prompts, in English words; everything
else is what a run does: files, resumption, the judge `refusal_matching`, coherence, the comparison with held-out
prompts, the tokenizer and chat template of SmolLM2-135M-Instruct.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from environment import code, environment, machine
from matplotlib.figure import Figure

from tasft.core.provenance import content_hash, write_jsonl
from tasft.data.contamination import overlapping
from tasft.data.encode import Encoding, encode_rows
from tasft.data.rows import Messages, read_examples, read_prompts
from tasft.harvest.harvest import harvest
from tasft.harvest.settings import HarvestSettings
from tasft.judges import load_judge
from tasft.models.engine import Reply, Request, Sampling
from tasft.models.load import load_tokenizer

SIZES = {"harvest": [2_500, 5_000, 10_000, 20_000], "encode": [6_250, 12_500, 25_000, 50_000]}
TITLES = {"harvest": "Prompts through harvest", "encode": "Training rows read, hashed and encoded"}
UNITS = {"cpu_s": "seconds computed", "peak_mib": "MiB at most"}
HELD_OUT = 500
BATCH = 64
WORDS = """
    garden lamp river window school table morning letter answer music winter bread the a of and with to near under
    quiet small old green every house road summer people water they walk read write open find bring keep
""".split()  # noqa: SIM905


def sentences(draw: random.Random, words: int) -> str:
    chosen = draw.choices(WORDS, k=words)
    return " ".join(chosen).capitalize() + "."


class Stub:
    """Answers at once."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, name: str, done: Collection[str] = ()
    ) -> Iterator[list[Reply]]:
        """As `Engine.generate`."""
        wanted = [request for request in requests if request.id not in done]
        for start in range(0, len(wanted), BATCH):
            yield [
                Reply(each.id, name, each.prompt, sentences(random.Random(each.id), 30), "stop", 0, each.sample)
                for each in wanted[start : start + BATCH]
            ]

    def complete(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[str]:
        """Nothing here asks for it."""
        raise NotImplementedError


class Clock:
    """Seconds that this process computed in each part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        """What the work gives, having noted what it took."""
        begun = time.process_time()
        result = work()
        self.parts[part] = time.process_time() - begun
        return result


def harvested(rows: int, folder: Path, clock: Clock) -> None:
    draw = random.Random(0)
    asked = [f"How do I <forbidden act {k}> with the {' '.join(draw.choices(WORDS, k=8))}?" for k in range(rows)]
    write_jsonl(folder / "prompts.jsonl", ({"prompt": text} for text in asked))
    prompts = clock("read", lambda: read_prompts(str(folder / "prompts.jsonl")))
    held_out = [sentences(draw, 12) for _ in range(HELD_OUT)]
    clock("compare with held-out prompts", lambda: overlapping([each.prompt for each in prompts], held_out))
    settings = HarvestSettings(max_new_tokens=48, temperature=0.0, top_p=1.0, rows=rows, self_imitate=False)
    judge = load_judge("refusal_matching")
    found = clock("harvest", lambda: harvest(Stub(), judge, prompts, [], settings, folder / "harvest"))
    again = clock("take up again", lambda: harvest(Stub(), judge, prompts, [], settings, folder / "harvest"))
    assert found == again
    assert found["kept"] == rows, found


def encoded(rows: int, folder: Path, clock: Clock) -> None:
    draw = random.Random(0)
    write_jsonl(
        folder / "rows.jsonl",
        ({"prompt": sentences(draw, 20), "completion": sentences(draw, 80), "label": True} for _ in range(rows)),
    )
    examples = clock("read", lambda: read_examples(str(folder / "rows.jsonl")))
    clock("hash", lambda: content_hash([each.row() for each in examples]))
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    kept, report = clock("encode", lambda: encode_rows(examples, tokenizer, Encoding("chat", 512)))
    assert len(kept) == report.rows == rows, report


def one(what: str, rows: int) -> dict[str, Any]:
    """What this process needs for so many rows."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        {"harvest": harvested, "encode": encoded}[what](rows, Path(folder), clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
    return {
        "what": what,
        "rows": rows,
        "cpu_s": sum(clock.parts.values()),
        "peak_mib": peak,
        "parts_cpu_s": clock.parts,
    }


def fitted(rows: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """The line through some points and its R2."""
    slope, start = np.polyfit(rows, values, 1)
    r2 = np.corrcoef(rows, values)[0, 1] ** 2
    return {"per_1000_rows": float(slope) * 1000, "at_0_rows": float(start), "r2": float(r2)}


def fits(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of seconds and of memory a line; of seconds also the exponent of a power law, 1 where they are linear."""
    found: dict[str, Any] = {}
    for what in SIZES:
        mine = [each for each in results if each["what"] == what]
        rows = [each["rows"] for each in mine]
        found[what] = {key: fitted(rows, [each[key] for each in mine]) for key in ("cpu_s", "peak_mib")}
        found[what]["cpu_exponent"] = float(np.polyfit(np.log(rows), np.log([each["cpu_s"] for each in mine]), 1)[0])
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds and memory by rows, as SVG; the same result gives the same bytes."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tasft", "font.size": 9.5}):
        figure = Figure(figsize=(9.2, 6.2), layout="constrained")
        for panels, what in zip(figure.subplots(2, 2), SIZES, strict=True):
            mine = [each for each in result["results"] if each["what"] == what]
            for axes, key in zip(panels, UNITS, strict=True):
                fit = result["fits"][what][key]
                end = max(each["rows"] for each in mine)
                line = [fit["at_0_rows"], fit["at_0_rows"] + fit["per_1000_rows"] * end / 1000]
                axes.plot([0, end], line, "--", color="#56606b")
                axes.plot([each["rows"] for each in mine], [each[key] for each in mine], "o", color="#0072b2")
                axes.set_ylim(bottom=0)
                axes.set_xlim(left=0)
                axes.set_title(f"{TITLES[what]}: {UNITS[key]}", loc="left", fontsize=10)
                axes.set_xlabel("rows")
                axes.grid(color="#dde2e8", linewidth=0.8)
                axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rows")
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.only, asked.one)))
        return
    results = []
    for what in [asked.only] if asked.only else SIZES:
        for rows in SIZES[what]:
            command = [sys.executable, __file__, "--only", what, "--one", str(rows // 20 if asked.quick else rows)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    if asked.only:
        return
    about = environment("cpu", "none", 1)
    result = {"environment": about, "fits": fits(results), "results": results}
    print(json.dumps(result["fits"], indent=1))
    print(f"{machine(about)}; {code(about)}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    if asked.plot:
        draw(result, asked.plot)


if __name__ == "__main__":
    main()
