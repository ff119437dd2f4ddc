"""Hashes of large files, each computed once: what was found is remembered in the user's cache folder."""

import json
import os
from contextlib import suppress
from pathlib import Path

from tasft.core.provenance import atomic_write_text, file_hash


def caches() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tasft"


def _memory() -> Path:
    return caches() / "hashes.json"


def _read() -> dict[str, list[object]]:
    try:
        known = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def known_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as `file_hash`; read again only if its size or one of its times has changed."""
    name = os.path.realpath(path)
    status = os.stat(name)
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    match _read().get(name):
        case [*before, str(digest)] if before == state:
            return digest
    digest = file_hash(path)
    # What another process has written meanwhile stays; what is gone from the disk need not be remembered.
    others = {other: what for other, what in _read().items() if os.path.isfile(other)}
    with suppress(OSError):  # Of a place that cannot be written: the file is read again next time.
        atomic_write_text(_memory(), json.dumps(others | {name: [*state, digest]}) + "\n")
    return digest
