"""Does a run that is killed again and again end as the undisturbed one does?

Runs a recipe once undisturbed, and once killed (SIGKILL) at random moments and taken up each time. A moment is drawn
evenly over the time of the undisturbed run, and named by what was on disk then, so that work that a kill undoes moves
no later moment. After each kill every reply that was on disk before must still be there; in the end the weights, the
replies and the verdicts must be those of the undisturbed run. What was found is written as JSON; exit code 1 if
anything was not as it should be.

    python research/kills.py quick --kills 50 --out runs/kills --json docs/results/kills.json
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POLL_S = 0.02


def _tasft(arguments: Sequence[str], log: str) -> None:
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["tasft", *arguments]
    from tasft.cli.main import main

    main()


def start(arguments: Sequence[str], log: Path) -> Any:
    """`tasft` in a process of its own, forked from one that has imported what is heavy."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasft.run.pipeline"])
    process = context.Process(target=_tasft, args=(list(arguments), str(log)))
    process.start()
    return process


def on_disk(folder: Path) -> int:
    """How much of the work is on disk: whole lines of JSONL, and steps begun and done."""
    count = 0
    for path in folder.rglob("*.json*"):
        try:
            if path.suffix == ".jsonl":
                count += path.read_bytes().count(b"\n")
            else:
                count += path.name in ("begun.json", "done.json")
        except FileNotFoundError:  # Renamed meanwhile.
            continue
    return count


def state(folder: Path) -> dict[str, int]:
    """When each file of rows was changed, or a step begun that has none; by its path.

    Not the rows that training copies before it loads a model: they say nothing of its steps.
    """
    files = [path for path in folder.rglob("*.jsonl") if path.name != "data.jsonl"]
    files += [path for path in folder.rglob("begun.json") if not any(path.parent.glob("*.jsonl"))]
    found = {}
    for path in files:
        try:
            found[str(path)] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def undisturbed(arguments: Sequence[str], log: Path, folder: Path) -> list[tuple[float, int]]:
    """Run to the end; seconds from the start and what was on disk then, whenever that changed."""
    process, begun = start(arguments, log), time.monotonic()
    timeline = [(0.0, 0)]
    while process.is_alive():
        if (count := on_disk(folder)) != timeline[-1][1]:
            timeline.append((time.monotonic() - begun, count))
        time.sleep(POLL_S)
    timeline.append((time.monotonic() - begun, on_disk(folder)))
    if process.exitcode:
        raise SystemExit(f"the undisturbed run failed with exit code {process.exitcode}: see {log}")
    return timeline


def moments(timeline: Sequence[tuple[float, int]], kills: int, seed: int) -> list[tuple[int, float]]:
    """What is to be on disk at each kill, and how many seconds later it comes; in order."""
    generator = random.Random(seed)
    drawn = sorted(generator.uniform(0, timeline[-1][0]) for _ in range(kills))
    last = [max(entry for entry in timeline if entry[0] <= moment) for moment in drawn]
    return [(count, moment - begun) for moment, (begun, count) in zip(drawn, last, strict=True)]


def kill(arguments: Sequence[str], log: Path, folder: Path, count: int, delay: float) -> bool:
    """Run until so much is on disk and so many seconds more; False if it ended before."""
    process, before = start(arguments, log), state(folder)
    # What an earlier process left may be more than is wanted, until this one begins and takes it back.
    while process.is_alive() and (on_disk(folder) < count or (count and state(folder) == before)):
        time.sleep(POLL_S)
    process.join(delay)
    alive = process.is_alive()
    process.kill()
    process.join()
    if not alive and process.exitcode:
        raise SystemExit(f"a run that was taken up failed with exit code {process.exitcode}: see {log}")
    return alive


def replies(folder: Path) -> set[tuple[str, bytes]]:
    """Every whole line of every file of replies."""
    return {
        (str(path.relative_to(folder)), line)
        for path in folder.rglob("replies.jsonl")
        for line in path.read_bytes().split(b"\n")[:-1]
    }


def at_work(folder: Path) -> str:
    """The stage that was begun and not done."""
    left = [path.parent for path in folder.rglob("begun.json") if not (path.parent / "done.json").exists()]
    names = sorted(path.relative_to(folder).parts[0] for path in left)
    return names[-1] if names else "between stages"


def result(folder: Path) -> dict[str, Any]:
    """What must not depend on kills: weights as bytes; replies, verdicts and rows by file, whatever their order."""
    rows = {
        str(path.relative_to(folder)): sorted(path.read_bytes().split(b"\n"))
        for path in folder.rglob("*.jsonl")
        if path.name not in ("metrics.jsonl", "monitor.jsonl")
    }
    weights = {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in ("adapter", "model")
        for path in folder.glob(f"*/{kind}/*.safetensors")
    }
    return {"weights": weights, **rows}


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what two results differ in."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def disturb(recipe: str, overrides: Sequence[str], kills: int, seed: int, out: Path) -> dict[str, Any]:
    """The whole experiment, in a new folder."""
    if out.exists():
        raise SystemExit(f"{out} is there: give another --out")
    out.mkdir(parents=True)
    whole, killed, log = out / "whole", out / "killed", out / "log.txt"
    timeline = undisturbed(["run", recipe, *overrides, "--out", str(whole)], log, whole)
    again = ["run", recipe, *overrides, "--out", str(killed)]
    found: list[dict[str, Any]] = []
    known: set[tuple[str, bytes]] = set()
    started = time.monotonic()
    for number, (count, delay) in enumerate(moments(timeline, kills, seed), 1):
        if not kill(again, log, killed, count, delay):
            break
        now = replies(killed)
        found.append(
            {"stage": at_work(killed), "on_disk": on_disk(killed), "replies": len(now), "gone": len(known - now)}
        )
        known |= now
        print(f"kill {number} of {kills}: {found[-1]}", flush=True)
    process = start(again, log)
    process.join()
    gone = len(known - replies(killed))
    differ = different(result(whole), result(killed)) if process.exitcode == 0 else ["the run did not end"]
    manifest = json.loads((whole / "manifest.json").read_text())
    return {
        "recipe": recipe,
        "overrides": list(overrides),
        "commit": manifest["commit"],
        "seed": seed,
        "kills": len(found),
        "stages": dict(Counter(each["stage"] for each in found)),
        "replies_gone": gone + sum(each["gone"] for each in found),
        "replies": len(replies(whole)),
        "differ": differ,
        "same": not differ,
        "undisturbed_s": round(timeline[-1][0], 1),
        "disturbed_s": round(time.monotonic() - started, 1),
        "moments": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quick")
    parser.add_argument("overrides", nargs="*", help="fields of the recipe, such as train.max_steps=5")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--json", type=Path, help="where the result goes")
    wanted = parser.parse_args()
    found = disturb(wanted.recipe, wanted.overrides, wanted.kills, wanted.seed, wanted.out)
    text = json.dumps(found, indent=2) + "\n"
    if wanted.json:
        wanted.json.parent.mkdir(parents=True, exist_ok=True)
        wanted.json.write_text(text)
    print(text)
    if found["replies_gone"] or not found["same"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
