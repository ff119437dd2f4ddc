"""How long commands take that need no model, beside those of other packages, one after the other in one run.

Writes CPU and wall seconds of each, the least of several, into results/startup.json. Run it on an idle machine.
"""

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from environment import environment

COMMANDS = {
    "tasft --help": (["tasft", "--help"], 0),
    "tasft check, a field misspelled": (["tasft", "check", "demo", "train.penality=nlcl"], 2),
    "tasft run, no such recipe": (["tasft", "run", "demmo"], 2),
    "tasft judge, no judge named": (["tasft", "judge", "replies.csv"], 2),
    "trl --help": (["trl", "--help"], 0),
    "lm_eval --help": (["lm_eval", "--help"], 0),
    "accelerate --help": (["accelerate", "--help"], 0),
}


def timed(command: list[str], code: int, times: int, folder: str) -> dict[str, float]:
    """The least CPU and wall seconds of a command."""
    cpu, wall = [], []
    for _ in range(times):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - started)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return {"cpu_s": round(min(cpu), 2), "wall_s": round(min(wall), 2), "n": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="How often each command is run.")
    parser.add_argument("--runs", nargs=2, metavar=("A", "B"), help="Two finished runs, for tasft compare.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    asked = parser.parse_args()
    commands = dict(COMMANDS)
    if asked.runs:
        folders = [str(Path(run).absolute()) for run in asked.runs]
        commands["tasft compare, two runs"] = (["tasft", "compare", *folders], 0)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "replies.csv").write_text("prompt,completion\nWhat is a pear?,A fruit.\n")
        for name, (command, code) in commands.items():
            if shutil.which(command[0]) is None:
                continue
            figures[name] = timed(command, code, asked.times, folder)
            print(f"{name}: {figures[name]}", flush=True)
    asked.out.write_text(
        json.dumps({"environment": environment("cpu", "none", 1), "commands": figures}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
