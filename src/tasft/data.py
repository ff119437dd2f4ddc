"""Rows: prompts to be answered, and examples to imitate or to avoid."""

import csv
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar
from urllib.parse import parse_qsl

from tasft.errors import UserError
from tasft.provenance import content_hash
from tasft.sets import KNOWN, NamedSet, differences, locate

T = TypeVar("T")

Messages = list[dict[str, Any]]
Rows = list[tuple[int, dict[str, Any]]]
File = BufferedReader | gzip.GzipFile

# Bytes. A file without line ends, by mistake or by malice, is refused before it fills the memory.
MAX_ROW = 4 << 20
MAX_LIST = 256 << 20

# How files begin that are taken for text by their name alone, and what to do with them.
STRANGERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run git lfs pull",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"PAR1": "a Parquet file: save it as JSONL",
    b"\x1f\x8b": "packed by gzip: give it a name that ends in .gz",
    b"\xff\xfe": "in UTF-16: save it as UTF-8",
    b"\xfe\xff": "in UTF-16: save it as UTF-8",
    b"<!DOCTYPE": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}

# What a recipe may say of a data set on the hub: nothing that names a place to write to, or holds a key.
HUB_ARGUMENTS = ("split", "name", "revision", "data_dir", "data_files")


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered, with what its file says of it."""

    id: str
    prompt: str
    topic: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Example:
    """One row of training data, TRL's *unpaired preference* format.

    Attributes:
        prompt: Text, or chat messages.
        completion: Text, or chat messages of which the last is the assistant's.
        label: True is a row to imitate, False one to avoid.
        id: Name of the row; empty when its file gives none.
        source: Where it comes from: a data set, or a stage of a run.
        ends: Whether the completion ends where its text does. False for a reply that was cut at a
            length limit, so that stopping there is not learned.
        input: What the instruction in `prompt` is about, Alpaca's context; empty for none.
        tools: JSON schemas of the functions that the chat template offers to the model.
        weight: Scales the row's share of its kind; above 0.
    """

    prompt: str | Messages
    completion: str | Messages
    label: bool
    id: str = ""
    source: str = ""
    ends: bool = True
    input: str = ""
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0

    def row(self) -> dict[str, Any]:
        """The example as a JSON object; `input`, `tools` and `weight` only where they say something."""
        row = asdict(self)
        seldom = {"input": "", "tools": None, "weight": 1.0}
        return {key: value for key, value in row.items() if key not in seldom or value != seldom[key]}


def read_rows(path: Path) -> Rows:
    """Number and fields of each row of a file: CSV or JSON if its name says so, else JSONL; `.gz` of any.

    JSON is a list of objects; a list of texts, which are taken for prompts; or an object of columns, such as
    {"instructions": [...]}. The number is that of the line on which the row begins; in JSON, its place, from 1. Blank
    lines are passed over. Cells of CSV are text, whatever they look like.

    Raises:
        UserError: The file is missing, damaged, not UTF-8 or empty, or rows are not what they should be; names
            them all.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    gzipped = path.suffix == ".gz"
    name = path.with_suffix("") if gzipped else path
    read = {".csv": _csv_rows, ".json": _json_rows}.get(name.suffix.lower(), _jsonl_rows)
    faults: list[str] = []
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            begins = file.peek(64)
            if stranger := next((what for mark, what in STRANGERS.items() if begins.startswith(mark)), None):
                raise UserError(f"{path}: this is {stranger}")
            rows = read(path, file, faults)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not rows and not faults:
        faults.append(f"{path}: holds no rows")
    if faults:
        raise UserError(faults)
    return rows


def _decoded(path: Path, content: bytes, begin: int = 0) -> str:
    try:
        return content.decode("utf-8" if begin else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {begin + error.start}; save it as UTF-8") from None


def _lines(path: Path, file: File) -> Iterator[str]:
    begin = 0
    for number in count(1):
        line = file.readline(MAX_ROW + 1)
        if not line:
            return
        if len(line) > MAX_ROW:
            raise UserError(f"{path}:{number}: more than {MAX_ROW >> 20} MB on one line; begin a line for each row")
        yield _decoded(path, line, begin)
        begin += len(line)


class _Twice(Exception):
    """Two fields of an object have one name."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Twice(f"two fields are called {name!r:.40}")
    return found


def _parsed(text: str) -> tuple[Any, str | None]:
    """A JSON value, or why it is none."""
    try:
        return json.loads(text, object_pairs_hook=_fields), None
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f" of line {error.lineno}"
        return None, f"{error.msg.removesuffix(' at')} at character {error.colno}{line}"
    except RecursionError:
        return None, "nested too deep"
    except _Twice as error:
        return None, str(error)
    except ValueError:
        return None, "a number of too many digits"


def _jsonl_rows(path: Path, file: File, faults: list[str]) -> Rows:
    rows = []
    for number, line in enumerate(_lines(path, file), 1):
        if not line.strip():
            continue
        value, why = _parsed(line)
        if why:
            faults.append(f"{path}:{number}: not JSON ({why})")
        elif isinstance(value, dict):
            rows.append((number, value))
        else:
            faults.append(f"{path}:{number}: expected an object such as {{...}}, found {value!r:.40}")
    return rows


def _json_rows(path: Path, file: File, faults: list[str]) -> Rows:
    start = file.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
        lines = _jsonl_rows(path, file, faults)
        whole = lines[0][1] if len(lines) == 1 and not faults else None
        if faults and not lines:
            # Not an object on each line; maybe one object on many.
            file.seek(0)
            whole, _ = _parsed(_decoded(path, file.read(MAX_LIST)))
            faults[:] = [f"{path}: neither a JSON list, nor an object on each line, nor an object of columns"]
        columns = whole and _rows_across(whole)
        if not columns:
            return lines
        faults.clear()
        return columns
    content = file.read(MAX_LIST + 1)
    if len(content) > MAX_LIST:
        raise UserError(f"{path}: a JSON list of more than {MAX_LIST >> 20} MB; write it as JSONL, a row on each line")
    values, why = _parsed(_decoded(path, content))
    if why:
        raise UserError(f"{path}: not JSON ({why})")
    texts = all(isinstance(value, str) for value in values)
    rows: Rows = []
    for number, value in enumerate(values, 1):
        row = {"prompt": value} if texts else value
        if not isinstance(row, dict):
            faults.append(f"{path}:{number}: expected an object such as {{...}}, found {row!r:.40}")
        elif sum(len(field) for field in row.values() if isinstance(field, str)) > MAX_ROW:
            faults.append(f"{path}:{number}: a row of more than {MAX_ROW >> 20} MB")
        else:
            rows.append((number, row))
    return rows


def _rows_across(value: Any) -> Rows | None:
    """Rows of an object of columns, lists of one length, or empty; None if it is none."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return None
    full = {name: column for name, column in value.items() if column}
    # A list of objects is a conversation: the object is a row.
    if len({len(column) for column in full.values()}) != 1 or isinstance(next(iter(full.values()))[0], dict):
        return None
    cells = zip(*full.values(), strict=True)
    return [(number, dict(zip(full, row, strict=True))) for number, row in enumerate(cells, 1)]


def _csv_rows(path: Path, file: File, faults: list[str]) -> Rows:
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(_lines(path, file), strict=True)
    rows: Rows = []
    header: list[str] = []
    begin = 1
    try:
        for cells in reader:
            number, begin = begin, reader.line_num + 1
            if not header:
                header = cells
                twice = [name for name, times in Counter(header).items() if times > 1]
                faults += [f"{path}:{number}: two columns are called {name!r:.40}" for name in twice]
            elif cells and len(cells) != len(header):
                faults.append(f"{path}:{number}: {len(cells)} cells under {len(header)} columns")
            elif cells:
                rows.append((number, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        why = "a carriage return alone ends a line: save it with line feeds" if "new-line" in str(error) else error
        faults.append(f"{path}:{begin}: not CSV ({why})")
    return rows


# Sets too large for a file that is read whole, by name: where the hub has them. Read the licence there.
ON_HUB = {
    # Ganguli et al. 2022 (arXiv 2209.07858), MIT: 38,961 attacks by people on a language model.
    "hh-rlhf-red-team": "hub:Anthropic/hh-rlhf?data_dir=red-team-attempts&split=train#transcript",
}


class Source(NamedTuple):
    """Rows that were read.

    Attributes:
        where: Begins each fault.
        rows: Number and fields of each.
        column: Field that the source names to hold the prompt; empty if it names none.
    """

    where: str
    rows: Rows
    column: str


def read_source(source: str, data_dir: str | None = None) -> Source:
    """Rows of a source: a named set, a file that `read_rows` reads, or a data set on the hub.

    `hub:OWNER/NAME?split=train` is read with `datasets.load_dataset`, which gets what is after the question mark as
    its arguments, those of `HUB_ARGUMENTS`. `#COLUMN` at the end of any source names the field with the prompt.

    Args:
        source: As above.
        data_dir: Where the files of named sets are looked for; None downloads them.

    Raises:
        UserError: It is none of these, or cannot be read; names every fault.
    """
    place, _, column = ON_HUB.get(source, source).partition("#")
    if place in KNOWN:
        path = locate(place, data_dir)
        return Source(str(path), _rows_of(KNOWN[place], path), column)
    if place.startswith("hub:"):
        return Source(place, _hub_rows(place), column)
    if not os.path.isfile(place):  # A name that no file can have is no file.
        raise UserError(f"{place!r:.100} is neither a file nor one of {', '.join((*KNOWN, *ON_HUB))}")
    return Source(place, read_rows(Path(place)), column)


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
    """What tells the file of a named set from the published one, see `tasft.sets.differences`."""
    name = source.partition("#")[0]
    if name not in KNOWN:
        return []
    return differences(name, locate(name, data_dir), len(read_source(source, data_dir).rows))


def _hub_rows(place: str) -> Rows:
    name, _, query = place.removeprefix("hub:").partition("?")
    arguments = dict(parse_qsl(query))
    if not name or "split" not in arguments:
        raise UserError(f"{place!r}: expected hub:OWNER/NAME?split=train")
    if others := sorted(arguments.keys() - set(HUB_ARGUMENTS)):
        # Not what they say: it may be a key.
        raise UserError(
            f"hub:{name}: {', '.join(others)}: leave that out; an address may say {', '.join(HUB_ARGUMENTS)} (a token "
            "belongs into the environment variable HF_TOKEN)"
        )
    try:
        import datasets
    except ImportError:
        raise UserError(f"{place} needs the package datasets: pip install 'tasft[hub]'") from None
    try:
        found = datasets.load_dataset(name, **arguments)
    except Exception as error:  # hub, cache and parsing errors share no base class
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{place}: cannot be loaded ({type(error).__name__}: {reason:.200})") from error
    return list(enumerate(found, 1))


def source_hash(source: str, data_dir: str | None = None) -> str:
    """Content hash of a source, whatever its place on disk."""
    return content_hash([row for _, row in read_source(source, data_dir).rows])


def _id(row: Mapping[str, Any], default: object) -> str:
    return str(default if row.get("id") is None else row["id"])


def repeated_ids(where: str | Path, ids: Iterable[tuple[int, str]]) -> list[str]:
    """A fault for each row, by number and id, whose id an earlier one has; no id is no fault."""
    first: dict[str, int] = {}
    faults = []
    for number, row_id in ids:
        if row_id and row_id in first:
            faults.append(f'{where}:{number}: "id" {row_id!r} is that of line {first[row_id]} too')
        first.setdefault(row_id, number)
    return faults


def drawn(rows: Sequence[T], most: int | None, text: Callable[[T], str]) -> list[T]:
    """So many rows, in their own order, or all where `most` is None.

    Which ones depends on nothing but their texts, and those of a smaller number are among those of a larger one: runs
    of any seed can be compared.
    """
    if most is None or len(rows) <= most:
        return list(rows)

    def lot(place: int) -> bytes:
        return hashlib.sha256(text(rows[place]).encode("utf-8", "surrogatepass")).digest()

    return [rows[place] for place in sorted(sorted(range(len(rows)), key=lot)[:most])]


def read_prompts(source: str, data_dir: str | None = None) -> list[Prompt]:
    """Prompts of a source with a field `prompt`, or another that it names (and `id`, `topic`, `kind`).

    Of a transcript ("Human: ... Assistant: ...") the first turn is the prompt.

    Raises:
        UserError: Names every bad row.
    """
    where, rows, column = read_source(source, data_dir)
    column = column or "prompt"
    if rows and not any(column in row for _, row in rows):
        raise UserError(
            f'{where}:{rows[0][0]}: "{column}" is missing, here and in all other rows; it has {_names(rows[0][1])}: '
            "name the one with the prompt, as in SOURCE#COLUMN"
        )
    prompts: list[tuple[int, Prompt]] = []
    faults = []
    for number, row in rows:
        value = row.get(column)
        text = _first_turn(value) if isinstance(value, str) else ""
        if column not in row:
            faults.append(f'{where}:{number}: "{column}" is missing; the row has {_names(row)}')
        elif not text.strip():
            faults.append(f'{where}:{number}: "{column}" must be text, found {value!r:.40}')
        elif not _is_whole(text):
            faults.append(f'{where}:{number}: "{column}" {HALF}')
        else:
            fields = {key: str(row.get(key, "")) for key in ("topic", "kind")}
            prompts.append((number, Prompt(_id(row, number), text, **fields)))
    faults += repeated_ids(where, ((number, prompt.id) for number, prompt in prompts))
    if faults:
        raise UserError(faults)
    return [prompt for _, prompt in prompts]


def _first_turn(text: str) -> str:
    before, human, rest = text.partition("Human:")
    return text if before.strip() or not human else rest.partition("\n\nAssistant:")[0].strip()


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name!r:.40}" for name in row if name != "label") or "no fields"


HALF = "holds half a character, U+D800 to U+DFFF, which no tokenizer reads: write it anew"


def _is_whole(text: str) -> bool:
    """Whether text can be encoded: JSON lets a file hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_message(value: object) -> bool:
    # An assistant that calls a tool need not say anything.
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and bool({"content", "tool_calls"} & value.keys())
        and isinstance(value.get("content"), str | list | None)
    )


def _is_talk(value: object) -> TypeGuard[Messages]:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _columns(row: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the fields that hold the prompt and the completion: ours, or Alpaca's."""
    ours, alpacas = ("prompt", "completion"), ("instruction", "output")
    return alpacas if row.keys() & set(alpacas) and not row.keys() & set(ours) else ours


def _fault_of_turns(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if key not in row:
        return f'"{key}" is missing; the row has {_names(row)}'
    said = [value] if isinstance(value, str) else [each.get("content") for each in value] if _is_talk(value) else []
    if not all(_is_whole(text) for text in said if isinstance(text, str)):
        return f'"{key}" {HALF}'
    if isinstance(value, str) and value.strip():
        return None
    if not _is_talk(value):
        return f'"{key}" must be text or chat messages, found {value!r:.40}'
    if key != "prompt" and value[-1]["role"] != "assistant":
        return f'the last message of "{key}" is by {value[-1]["role"]!r:.40}; it must be the assistant\'s'
    return None


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def example_of(row: Mapping[str, Any], where: str) -> Example:
    """The example that a JSON object or a row of a data set holds; fields of no concern are passed over.

    An optional field that is null counts as not given: data sets fill whole columns. A row that has `instruction`
    and `output` instead of `prompt` and `completion` is read as Alpaca's.

    Args:
        row: At least `prompt`, `completion` and `label`.
        where: Begins each fault: a file and line, or the number of a row.

    Raises:
        UserError: Names every fault of the row.
    """
    given = {key: value for key, value in row.items() if value is not None}
    asked, said = _columns(row)
    faults = [fault for key in (asked, said) if (fault := _fault_of_turns(row, key))]
    if "label" not in row:
        faults.append('"label" is missing; say true (imitate) or false (avoid)')
    elif not isinstance(row["label"], bool):
        faults.append(f'"label" is {row["label"]!r:.40}; use true (imitate) or false (avoid)')
    if not isinstance(given.get("ends", True), bool):
        faults.append(f'"ends" is {row["ends"]!r:.40}; use true or false')
    context = given.get("input", "")
    if not isinstance(context, str):
        faults.append(f'"input" must be text, found {context!r:.40}')
    elif context and not isinstance(row.get(asked), str):
        faults.append('"input" goes with a prompt that is text; write it into the messages')
    tools = given.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        faults.append(f'"tools" must be a list of JSON schemas, found {tools!r:.40}')
    if not _positive(given.get("weight", 1.0)):
        faults.append(f'"weight" is {row["weight"]!r:.40}; use a number above 0')
    if faults:
        raise UserError([f"{where}: {fault}" for fault in faults])
    return Example(
        prompt=row[asked],
        completion=row[said],
        label=row["label"],
        id=_id(row, ""),
        source=str(given.get("source", "")),
        ends=given.get("ends", True),
        input=context,
        tools=tools or None,
        weight=float(given.get("weight", 1.0)),
    )


def read_examples(
    source: str, keep: Mapping[str, Any] | None = None, drop: Mapping[str, Any] | None = None
) -> list[Example]:
    """Examples of a source in the unpaired preference format, or in Alpaca's.

    A row without `label` is one to imitate, so that plain prompt-completion files work too.

    Args:
        source: As `read_source` takes it.
        keep: Fields and values that a row must have, all of them. A field that holds a list has each of its values.
        drop: Fields and values of which a row may have none. What is left out need not be an example.

    Raises:
        UserError: Names every bad line.
    """
    where, rows, _ = read_source(source)
    keep, drop = keep or {}, drop or {}
    faults = [
        f"{where}: no row has a field {name!r:.40}; the first has {_names(rows[0][1])}"
        for name in (*keep, *drop)
        if not any(name in row for _, row in rows)
    ]
    examples: list[tuple[int, Example]] = []
    for number, row in rows:
        if not all(_has(row, *pair) for pair in keep.items()) or any(_has(row, *pair) for pair in drop.items()):
            continue
        try:
            examples.append(
                (number, example_of(row if "label" in row else {**row, "label": True}, f"{where}:{number}"))
            )
        except UserError as error:
            faults += error.faults
    faults += repeated_ids(where, ((number, example.id) for number, example in examples))
    if faults:
        raise UserError(faults)
    return [example for _, example in examples]


def _has(row: Mapping[str, Any], name: str, value: object) -> bool:
    held = row.get(name)
    return name in row and (held == value or (isinstance(held, list) and value in held))
