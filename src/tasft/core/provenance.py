"""What was read, with what, and files that are never half-written."""

import errno
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from packaging.requirements import Requirement

from tasft.core.errors import UserError


def require(package: str) -> None:
    """Refuse an installed release that is older than our own requirements allow.

    pip sees to that once; later another package may take it back, and what changed may fail silently.

    Raises:
        UserError: Names both versions.
    """
    for line in metadata.requires("tasft") or []:
        requirement = Requirement(line)
        version = metadata.version(package)
        if requirement.name == package and not requirement.specifier.contains(version, prereleases=True):
            raise UserError(f"{package} {version} is too old for tasft: pip install '{package}{requirement.specifier}'")


def content_hash(value: object) -> str:
    """SHA-256, first 16 hexadecimal digits, of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name may be as long as names can be.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)
        raise


def read_json(path: Path) -> Any:
    """The JSON object in a file that `write_json` wrote; None when there is no file.

    Raises:
        UserError: It was damaged since.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not JSON any more; remove it to have that step done again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object any more; remove it to have that step done again")
    return content


def write_json(path: Path, value: object) -> None:
    """Write one JSON document atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    atomic_write_text(path, _lines(rows))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a file that grows while a stage runs, its owner's alone; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=_private) as file:
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno:
            error.filename = str(path)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def resume_jsonl(path: Path, kind: type | None = None) -> list[dict[str, Any]]:
    """Rows that an interrupted stage left; a torn last line is cut off the file.

    Args:
        path: The file; no rows if it is not there.
        kind: The dataclass that each row holds the fields of; None for any.

    Raises:
        UserError: A line before the last is none of these rows: the file was edited or the disk is bad.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    named = fields(kind) if kind else ()
    wanted = {field.name for field in named if field.default is MISSING and field.default_factory is MISSING}
    known = {field.name for field in named}
    rows = []
    # Not splitlines(): replies may hold U+2028 and friends, which JSON leaves unescaped.
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        reason = None
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg})"
        except (UnicodeDecodeError, RecursionError, ValueError):
            reason = "not JSON"
        else:
            if not isinstance(row, dict) or (kind and not wanted <= row.keys() <= known):
                reason = f"no {kind.__name__.lower()}" if kind else "no JSON object"
        if reason:
            raise UserError(f"{path}:{number}: {reason}; remove that line to have it done again")
        rows.append(row)
    return rows


# What the place that is written to may answer, and nobody but the user can change.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, a full disk, a spent quota or a folder that may not be written is the user's to mend.

    Raises:
        UserError: Says which, and where.
    """
    try:
        yield
    except Exception as error:
        fault = refused(error, folder)
        if fault is None:
            raise
        raise fault from error


def refused(error: BaseException, place: Path | None = None) -> UserError | None:
    """What to say where a disk or a folder refused something; None if that is not what went wrong.

    Args:
        error: What was raised.
        place: Where it was to be written, if the error does not say it; None where it may have been read, too.
    """
    reason = _refusal(error)
    if reason is None:
        return None
    named = getattr(error, "filename", None) or place or "a file"
    return UserError(
        f"{named}: cannot be {'written' if place else 'read or written'} ({reason}): make room, see to its permissions "
        "or choose another place, and run the same command again; what was written before is kept"
    )


def _refusal(error: BaseException) -> str | None:
    """Why a file could not be written; None if that is not what went wrong."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _REFUSALS else None
    # safetensors gives the system's number in its text, torch only the fact.
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(match[1])) if int(match[1]) in _REFUSALS else None
    return "file write failed" if re.search("inline_container|iostream error", str(error)) else None


@contextmanager
def private() -> Iterator[None]:
    """Within, files and folders that this process or its children make are their owner's alone, whoever writes them.

    Replies are harmful text. This sets the umask, which all threads share.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def refuse_links(folder: Path) -> None:
    """Refuse a folder with a symbolic link that leads out of it: what is written there would land elsewhere.

    Raises:
        UserError: Names each.
    """
    home = folder.resolve()
    paths = (Path(where) / name for where, *names in os.walk(folder) for name in (*names[0], *names[1]))
    faults = [
        f"{path} is a link that leads out of {folder}: whoever made it chose where tasft would write; remove it"
        for path in paths
        if path.is_symlink() and not path.resolve().is_relative_to(home)
    ]
    if faults:
        raise UserError(sorted(faults))


def lock(run: Path, wait: bool = False) -> FileLock:
    """The lock of a run folder, held; the operating system lets go when the process ends.

    Args:
        run: Made if it is not there.
        wait: Until another process lets go.

    Raises:
        UserError: Another process holds it, and this one does not wait; or a link leads out of the folder.
    """
    holder = run / ".lock.json"
    held = FileLock(run / ".lock", timeout=-1 if wait else 0)
    try:
        run.mkdir(parents=True, exist_ok=True)
        refuse_links(run)
        # Replies are harmful text: for the eyes of whoever made the run.
        run.chmod(0o700)
        held.acquire()
    except Timeout:
        raise UserError(
            f"{run} is in use by another tasft process{_described(holder)}: wait for it, or choose another folder "
            "with --out"
        ) from None
    except OSError as error:
        raise UserError(f"{run}: {error.strerror}: choose another folder with --out") from None
    with writing(run):
        write_json(
            holder,
            {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"},
        )
    return held


def _described(holder: Path) -> str:
    """Who wrote that it holds a lock; empty while it has not yet."""
    try:
        return " (process {pid} on {host}, since {since})".format_map(read_json(holder) or {})
    except (UserError, OSError, KeyError):
        return ""


@cache
def commit() -> str | None:
    """Commit of the checkout that this package runs from, as it was when first asked; None for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Versions and machine, as the manifest records them."""
    packages = ["tasft", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy"]
    return {
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "commit": commit(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
