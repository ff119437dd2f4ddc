"""How soon the page of a run with 20,000 replies is there, in Chromium.

Beside seconds by the clock there are those that all processes of the browser spent computing, for the clock depends on
what else the machine does; its load is told too.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from environment import ROOT, environment
from playwright.sync_api import Browser, sync_playwright

from tasft.report import write_report

WORDS = ("garden", "lamp", "river", "window", "school", "table", "morning", "letter", "answer", "music", "winter")


def run_folder(folder: Path, prompts: int, characters: int) -> None:
    """A run whose replies are made of words, about `characters` long on average, as uneven as real ones."""
    draw = random.Random(0)
    judges = ["classifier", "refusal_matching"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "many", "evaluate": {"judges": judges}}))
    for state in ("base", "final"):
        at = folder / "evaluate" / state / "toxic"
        for judge in judges:
            (at / judge).mkdir(parents=True)
        ids = [str(number) for number in range(prompts)]
        lengths = [max(1, round(draw.expovariate(7 / characters))) for _ in ids]
        replies = [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
        rows = [
            {"id": i, "prompt": f"How do I <forbidden act {i}>?", "completion": text, "finish": "stop"}
            for i, text in zip(ids, replies, strict=True)
        ]
        put(at / "replies.jsonl", rows)
        (at / "set.json").write_text(json.dumps({"name": "toxic", "kind": "toxic", "source": "words", "n": prompts}))
        for judge in judges:
            outcomes = [draw.random() < (0.7 if state == "base" else 0.2) for _ in ids]
            said = [
                {"id": i, "harmful": o, "refusal": not o, "coherent": True} for i, o in zip(ids, outcomes, strict=True)
            ]
            put(at / judge / "verdicts.jsonl", said)
            share = {"value": sum(outcomes) / prompts, "low": None, "high": None, "n": prompts}
            (at / judge / "summary.json").write_text(json.dumps({"harmful": share}))


def put(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def opening(browser: Browser, file: Path) -> dict[str, float]:
    """Seconds until the first replies are shown, and until a search has found its one."""
    page = browser.new_page()
    page.wait_for_timeout(500)  # What a new page costs is not what this one costs.
    busy, started = computing(), time.perf_counter()
    page.goto(file.as_uri())
    page.locator("#list article").first.wait_for()
    shown, spent = time.perf_counter(), computing() - busy
    page.locator("#search").fill("forbidden act 77>")
    page.locator("#count", has_text="1 prompt of").wait_for()
    found = time.perf_counter()
    page.close()
    return {"open_s": shown - started, "open_cpu_s": spent, "search_s": found - shown}


def computing() -> float:
    """Seconds that the processes of the browser have computed so far."""
    mine = [child.cpu_times() for child in psutil.Process().children(recursive=True) if "chrom" in child.name()]
    return sum(times.user + times.system for times in mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="400 replies, once: whether it works")
    parser.add_argument("--replies", type=int, help="default 20,000")
    parser.add_argument("--characters", type=int, nargs="+", default=[200, 800, 2_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/report.json, quick: report-quick.json")
    asked = parser.parse_args()
    if asked.quick:
        asked.characters, asked.rounds = [200], 1
    asked.replies = asked.replies or (400 if asked.quick else 20_000)
    asked.out = asked.out or ROOT / "benchmarks" / "results" / f"report{'-quick' * asked.quick}.json"
    results = []
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for characters in asked.characters:
            with tempfile.TemporaryDirectory() as folder:
                run_folder(Path(folder), asked.replies // 2, characters)
                started = time.perf_counter()
                file = write_report(Path(folder))
                written = time.perf_counter() - started
                times = [opening(browser, file) for _ in range(asked.rounds)]
                results.append(
                    {
                        "replies": asked.replies,
                        "characters": characters,
                        "megabytes": file.stat().st_size / 1e6,
                        "write_s": written,
                        **{
                            f"{key}_{name}": pick([row[key] for row in times])
                            for key in times[0]
                            for name, pick in (("median", statistics.median), ("worst", max))
                        },
                    }
                )
                print(json.dumps(results[-1]), flush=True)
        about = environment("cpu", "none", 1) | {
            "chromium": browser.version,
            "rounds": asked.rounds,
            "load": os.getloadavg()[0],
        }
        browser.close()
    asked.out.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
