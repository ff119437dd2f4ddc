"""Where rows come from: a file, a folder, a named set, a data set of the hub, or a function of one's own."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from tasft.core.errors import UserError
from tasft.core.parts import Own, Part, registered
from tasft.core.provenance import content_hash
from tasft.core.suggest import did_you_mean, nearest
from tasft.data.files import KINDS, Rows, kind_of, read_rows
from tasft.data.sets import KNOWN, NamedSet, differences, locate

# What a recipe may say of a data set on the hub: nothing that names a place to write to, or holds a key.
HUB_ARGUMENTS = ("split", "name", "revision", "data_dir", "data_files")


PYTHON = "python:"
"""Begins a source that is a function of one's own, as in `python:mypkg.sets:prompts`."""

# Sets too large for a file that is read whole, by name: where the hub has them. Read the licence there.
ON_HUB = {
    # Ganguli et al. 2022 (arXiv 2209.07858), MIT: 38,961 attacks by people on a language model.
    "hh-rlhf-red-team": "hub:Anthropic/hh-rlhf?data_dir=red-team-attempts&split=train#transcript",
}


class Source(NamedTuple):
    """Rows that were read.

    Attributes:
        where: The file, the folder or the data set.
        rows: Number and fields of each.
        column: Field that the source names to hold the prompt; empty if it names none.
        places: Of each number the file and line, where the rows are of several files.
    """

    where: str
    rows: Rows
    column: str = ""
    places: Mapping[int, str] = {}

    def at(self, number: int) -> str:
        """What begins each fault of a row."""
        return self.places.get(number) or f"{self.where}:{number}"


def read_source(source: str | Path, data_dir: str | None = None) -> Source:
    """Rows of a source: a named set, a file that `read_rows` reads, a folder of such files, or a data set.

    A folder holds no `.txt`. It may also be what `datasets.Dataset.save_to_disk` wrote.
    `hub:OWNER/NAME?split=train` is read with `datasets.load_dataset`, which gets what is after the question mark as
    its arguments, those of `HUB_ARGUMENTS`. `#COLUMN` at the end of any source names the field with the prompt.

    Args:
        source: As above; a `Path` is a file, whatever letters are in it.
        data_dir: Where the files of named sets are looked for; None downloads them.

    Raises:
        UserError: It is none of these, or cannot be read; names every fault.
    """
    if isinstance(source, Path):
        return _folder(source) if source.is_dir() else Source(str(source), read_rows(source))
    location, column = parts_of(source)
    if location in KNOWN:
        path = locate(location, data_dir)
        return Source(str(path), _rows_of(KNOWN[location], path), column)
    if location.startswith("hub:"):
        return Source(location, _hub_rows(location), column)
    if _is_own(location):
        return Source(location, _own_rows(location), column)
    if fault := missing(source):
        raise UserError(fault)
    return read_source(Path(location))._replace(column=column)


def missing(source: str) -> str | None:
    """Why there is nothing to read at a source, found without reading; None where there may be."""
    location, _ = parts_of(source)
    # A name that no file can have is no file.
    if location in KNOWN or location.startswith("hub:") or _is_own(location) or os.path.exists(location):
        return None
    known = (*KNOWN, *ON_HUB, *registered("prompt_sets"))
    fault = f"{location!r:.100} is neither a file nor one of {', '.join(known)}"
    folder, name = os.path.split(location)
    try:
        beside = [file.name for file in os.scandir(folder or ".") if file.is_file()]
    except (OSError, ValueError):
        beside = []
    if near := nearest(name, beside):
        return f"{fault}; did you mean {os.path.join(folder, near)}?"
    return fault + did_you_mean(location, known)


def parts_of(source: str) -> tuple[str, str]:
    """The place that a source names, and the column after its last `#`, empty for none.

    A `#` can be in the name of a file, too: the longest beginning that is there is the place.
    """
    source = ON_HUB.get(source, source)
    ends = [len(source), *(at for at in range(len(source) - 1, -1, -1) if source[at] == "#")]
    for end in ends:
        # To os.path a name that no file can have is no file.
        if source[:end] in KNOWN or os.path.exists(source[:end]):
            return source[:end], source[end + 1 :]
    location, _, column = source.partition("#")
    return location, column


def _rows_of(known: NamedSet, path: Path) -> Rows:
    """The rows of a file that belong to a set, with fields `prompt` and `topic` besides their own."""
    rows: Rows = []
    for number, row in read_rows(path):
        missing = {known.column, *([known.topic] if known.topic else ()), *(known.only or ())[:1]} - row.keys()
        if missing:
            raise UserError(f"{path}:{number}: {', '.join(sorted(missing))} is missing: not the file of {known.url}")
        if known.only is None or row[known.only[0]] == known.only[1]:
            rows.append((number, row | {"prompt": row[known.column], "topic": row.get(known.topic, "")}))
    return rows


def differences_of(source: str, data_dir: str | None) -> list[str]:
    """What tells the file of a named set from the published one, see `tasft.data.sets.differences`."""
    name, _ = parts_of(source)
    if name not in KNOWN:
        return []
    return differences(name, locate(name, data_dir), len(read_source(source, data_dir).rows))


def _folder(folder: Path) -> Source:
    """Rows of all files of a folder that are of a kind of `KINDS`, in the order of their names; none may be `.txt`."""
    if (folder / "dataset_info.json").is_file():
        return Source(str(folder), _data_set(str(folder), lambda datasets: datasets.load_from_disk(str(folder))))
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(f"{folder}: holds several splits: name one, as in {folder / splits[0] if splits else folder}")
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds a model, and no rows")
    files = sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path) in KINDS)
    if texts := [file.name for file in files if kind_of(file) == ".txt"]:
        raise UserError(
            f"{folder}: {', '.join(texts):.200}: in a folder no .txt is read, for a licence would be a prompt on each "
            "line: take it out, or name the one file with the prompts"
        )
    rows: Rows = []
    places: dict[int, str] = {}
    faults: list[str] = []
    for file in files:
        try:
            for line, row in read_rows(file):
                rows.append((len(rows) + 1, row))
                places[len(rows)] = f"{file}:{line}"
        except UserError as error:
            faults += error.faults
    if not rows and not faults:
        faults.append(f"{folder}: holds no file of rows ({', '.join(kind for kind in KINDS if kind != '.txt')})")
    if faults:
        raise UserError(faults)
    return Source(str(folder), rows, places=places)


def _is_own(location: str) -> bool:
    return location.startswith(PYTHON) or location in registered("prompt_sets")


def _own_rows(location: str) -> Rows:
    own = Own("prompt_sets", Part(target=location.removeprefix(PYTHON)), lambda _: [])
    with own.at_work():
        items = list(own())
    rows = [{"prompt": row} if isinstance(row, str) else row for row in items]
    if strange := [row for row in rows if not isinstance(row, dict)]:
        raise UserError(f"{location}: gave back {strange[0]!r:.40}; a row is a dictionary, or the text of a prompt")
    if not rows:
        raise UserError(f"{location}: holds no rows")
    return list(enumerate(rows, 1))


def _hub_rows(location: str) -> Rows:
    name, _, query = location.removeprefix("hub:").partition("?")
    arguments = dict(parse_qsl(query))
    if not name or "split" not in arguments:
        raise UserError(f"{location!r}: expected hub:OWNER/NAME?split=train")
    if others := sorted(arguments.keys() - set(HUB_ARGUMENTS)):
        # Not what they say: it may be a key.
        raise UserError(
            f"hub:{name}: {', '.join(others)}: leave that out; an address may say {', '.join(HUB_ARGUMENTS)} (a token "
            "belongs into the environment variable HF_TOKEN)"
        )
    return _data_set(location, lambda datasets: datasets.load_dataset(name, **arguments))


def _data_set(location: str, load: Callable[[Any], Any]) -> Rows:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{location} needs the package datasets: pip install '.[hub]'") from None
    try:
        return list(enumerate(load(datasets), 1))
    except Exception as error:  # hub, cache and parsing errors share no base class
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{location}: cannot be loaded ({type(error).__name__}: {reason:.200})") from error


def source_hash(source: str, data_dir: str | None = None) -> str:
    """Content hash of a source, whatever its place on disk."""
    return content_hash([row for _, row in read_source(source, data_dir).rows])
