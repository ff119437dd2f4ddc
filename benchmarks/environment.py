"""On what a benchmark ran: what a number of it can depend on, and nothing that names a machine or its user."""

import platform
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def environment(device: str, dtype: str, threads: int) -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "*.py")
    return {
        "tasft": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "commit": commit,
        "dirty": None if changed is None else changed != "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": threads,
        "device": device,
        "dtype": dtype,
    }


def _git(*words: str) -> str | None:
    """What git answers; None where there is no git, or the code is no checkout."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor()
