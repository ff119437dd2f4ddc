"""A piece of a run that is done once."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from tasft.core import provenance, ranks


@dataclass(frozen=True)
class Step:
    """A piece of a run that is done once and redone when what it reads changes.

    Attributes:
        folder: What it fills, in the run folder; it owns the whole of it.
        reads: Everything that its result depends on, as JSON.
        work: Fills the folder.
        keeps: Of what it reads, that without which nothing in the folder is of use. When only other things change the
            folder stays: the work finds out itself what still holds.
        costs_nothing: Whether it is done again in seconds, so that an earlier result is not kept.
    """

    folder: Path
    reads: dict[str, Any]
    work: Callable[[Path], None]
    keeps: dict[str, Any] | None = None
    costs_nothing: bool = False

    @property
    def key(self) -> str:
        """Hash of what the step reads."""
        return provenance.content_hash(self.reads)

    @property
    def is_done(self) -> bool:
        """Whether the folder holds the finished work on exactly these inputs."""
        return done_key(self.folder) == self.key

    @property
    def outdated_by(self) -> list[str]:
        """Of finished work on other inputs, what has changed since; empty where there is none."""
        done = provenance.read_json(self.folder / "done.json") or {}
        if not done or done.get("key") == self.key:
            return []
        return list(_changed(done.get("reads"), json.loads(json.dumps(self.reads)))) or ["settings"]

    def run(self) -> float:
        """Do what is left; seconds it took.

        A folder begun with other inputs is first set aside, in `earlier` of its run, and it is said why; one begun with
        the same is taken up. Of several processes all do the work, and the first writes.
        """
        path = self.folder / "begun.json"
        if ranks.is_first():
            begun = provenance.read_json(path) or {}
            keeps = self.keeps and provenance.content_hash(self.keeps)
            same = begun.get("key") == self.key or (keeps is not None and begun.get("keeps") == keeps)
            if self.folder.exists() and not same:
                self._set_aside(begun.get("reads"))
            # What it held until now is not that any more, even if the work breaks off.
            (self.folder / "done.json").unlink(missing_ok=True)
            provenance.write_json(path, {"key": self.key, "reads": self.reads, "keeps": keeps})
        ranks.wait()
        started = time.monotonic()
        self.work(self.folder)
        ranks.wait()
        if ranks.is_first():
            provenance.write_json(self.folder / "done.json", {"key": self.key, "reads": self.reads})
        return time.monotonic() - started

    def _set_aside(self, reads: Any) -> None:
        """Clear the folder, which was begun with what `reads` says; what it holds is kept unless it costs nothing."""
        if self.costs_nothing or {path.name for path in self.folder.iterdir()} <= {"begun.json", "done.json"}:
            shutil.rmtree(self.folder)
            return
        kept = _earlier(self.folder)
        changed = ", ".join(_changed(reads, json.loads(json.dumps(self.reads)))) or "settings"
        print(f"note: {self.folder} was made with other {changed}: what it held is kept as {kept}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        self.folder.rename(kept)

    def share(self, store: Path, name: Path) -> float | None:
        """Do the step where other runs find it, or take what they have done; seconds it took, None if it was there.

        The work is done below `store`, under the hash of what it reads: two runs never do the same work, and one that
        was killed is taken up by whoever comes next. Steps that keep the same are drafted in one folder, one after the
        other, so that what holds for all of them is there for the next.

        Args:
            store: The folder of all shared steps.
            name: The step's folder in any run.
        """
        kept = self.keeps and store / f"{provenance.content_hash(self.keeps)}.draft"
        seconds = None
        with provenance.lock(store / self.key, wait=True):
            shared = replace(self, folder=store / self.key / name)
            if not shared.is_done:
                with provenance.lock(kept, wait=True) if kept else nullcontext():
                    drafted = replace(self, folder=kept / name) if kept else shared
                    seconds = drafted.run()
                    if kept:
                        _take(drafted.folder, shared.folder)
            before = done_key(self.folder)
            # What other inputs gave is in the store too, or was made by a run of its own.
            if before not in (None, self.key) and not (store / before / name / "done.json").is_file():
                self._set_aside((provenance.read_json(self.folder / "begun.json") or {}).get("reads"))
            _take(shared.folder, self.folder)
        return seconds


EARLIER = "earlier"
"""The folder, in that of a run, where results are kept that are replaced by others."""


def _earlier(folder: Path) -> Path:
    """Where a step's folder is set aside: a free name in `earlier` of its run, which is the folder that is locked."""
    run = next((parent for parent in folder.parents if (parent / ".lock.json").exists()), folder.parent)
    beside = run / EARLIER / folder.relative_to(run)
    return next(path for number in count(1) if not (path := beside.with_name(f"{beside.name}.{number}")).exists())


def _changed(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values that differ, the first few."""
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        names = [*now, *(key for key in was if key not in now)]
        parts = ((key, f"{name}.{key}" if name else key) for key in names)
        yield from islice(
            (changed for key, whole in parts for changed in _changed(was.get(key), now.get(key), whole)), 4
        )
    elif name:
        yield name


def _take(source: Path, target: Path) -> None:
    """Fill a folder with a finished step; `done.json` comes last."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns("done.json"))
    shutil.copy2(source / "done.json", target)


def _link(source: str, target: str) -> None:
    # Weights are large, and replaced when they change; a file of rows may grow where it is.
    if source.endswith(".jsonl"):
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # Not every shared storage has links.
        shutil.copy2(source, target)


def done_key(folder: Path) -> str | None:
    """Key of the step that filled a folder; None if it is not done."""
    return (provenance.read_json(folder / "done.json") or {}).get("key")


OUTLIVED = "is of an earlier training, and is left out: run tasft evaluate again"
"""What to say of a result that `outlived` is true of."""


def outlived(result: Path) -> bool:
    """Whether a result in `evaluate` of a run is of weights that a later training has replaced, or begun to replace.

    Where the training was removed, the last one is that which the final model was evaluated of.
    """
    path, reads = result.absolute(), _begun(result).get("reads") or {}
    home = next((parent for parent in path.parents if parent.name == "evaluate"), None)
    if home is None:
        return False
    state, *name = path.relative_to(home).parts
    if state == "sft":
        now = _begun(home.parent / "sft").get("reads") or {}
        return bool(reads) and any(reads.get(key) != value for key, value in now.items())
    last = _begun(home / "final" / Path(*name)).get("reads") or {}
    trained = _begun(home.parent / "train").get("key") or last.get("train")
    return "train" in reads and trained not in (None, reads["train"])


def _begun(folder: Path) -> dict[str, Any]:
    """Key and reads of the step that fills or has filled a folder."""
    return provenance.read_json(folder / "done.json") or provenance.read_json(folder / "begun.json") or {}
