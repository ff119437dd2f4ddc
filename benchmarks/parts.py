"""Several measurements in one command, none of which can lose what another has found.

Each part is a process of its own with a limit of time; what it has found is written as soon as it ends, to one JSON
file and one page in Markdown.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from environment import ROOT, code, environment, machine

PYTHON = sys.executable
LAST_LINES = 30  # Of what a part said.
GRACE = 5.0  # Seconds that a part has to end once it is told to.


class Part(NamedTuple):
    """Something to measure.

    Attributes:
        title: Its heading on the page.
        command: What is run; `{json}` is where it leaves its numbers.
        seconds: The most that it may take.
        table: Its numbers as Markdown; None where what it said is all there is.
    """

    title: str
    command: tuple[str, ...]
    seconds: float
    table: Callable[[dict[str, Any]], str] | None = None


def go(title: str, parts: Mapping[str, Part], stem: Path, device: str, dtype: str, threads: int) -> None:
    """Do all parts, into STEM.json and STEM.md."""
    stem = stem.absolute()
    stem.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"environment": environment(device, dtype, threads), "parts": {}}
    for name, part in parts.items():
        print(f"{name}, at most {part.seconds:g} s ...", file=sys.stderr, flush=True)
        scratch = stem.with_name(f"{stem.name}.{name}.json")
        report["parts"][name] = run(part, scratch)
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(report, indent=2) + "\n")
        stem.with_name(f"{stem.name}.md").write_text(page(title, report, parts))
        scratch.unlink(missing_ok=True)
        print(f"{name}: {report['parts'][name]['ended']}", file=sys.stderr, flush=True)


def run(part: Part, found: Path) -> dict[str, Any]:
    """Do a part: how it ended, its seconds, its numbers as far as it got, and what it said last."""
    command = [str(found) if word == "{json}" else word for word in part.command]
    found.unlink(missing_ok=True)
    start = time.perf_counter()
    # A group of its own: a part's own children must end with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=part.seconds)
        ended = "done" if process.returncode == 0 else f"ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        said, ended = stop(process), f"stopped after {part.seconds:g} s"
    return {
        "ended": ended,
        "seconds": time.perf_counter() - start,
        "result": read(found),
        "said": said.splitlines()[-LAST_LINES:],
    }


def stop(process: "subprocess.Popen[str]") -> str:
    """End a part and its children; what it said."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        said, _ = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    return said


def read(path: Path) -> dict[str, Any] | None:
    """A part's numbers; None if it left none, or half of them."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def page(title: str, report: dict[str, Any], parts: Mapping[str, Part]) -> str:
    """The report in Markdown."""
    where = report["environment"]
    blocks = [f"# {title}", f"{machine(where)}; {code(where)}."]
    for name, found in report["parts"].items():
        blocks += [f"## {parts[name].title}", f"{found['ended']}, {found['seconds']:.0f} s."]
        table = parts[name].table
        if table and found["result"]:
            blocks.append(shown(table, found["result"]))
        if table is None or found["ended"] != "done":
            blocks.append("\n".join(("```", *found["said"][-8:], "```")))
    return "\n\n".join(blocks) + "\n"


def shown(table: Callable[[dict[str, Any]], str], result: dict[str, Any]) -> str:
    """A table; what is not one yet is no reason to lose the page."""
    try:
        return table(result)
    except Exception as error:  # whatever an unfinished result lacks
        return f"No table: {type(error).__name__}: {error}"
