"""Files of rows: JSONL, JSON, tables and Parquet, with every bad line named."""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any

from tasft.core.errors import UserError

Rows = list[tuple[int, dict[str, Any]]]
File = BufferedReader | gzip.GzipFile

# Bytes. A file without line ends, by mistake or by malice, is refused before it fills the memory.
MAX_ROW = 4 << 20
MAX_LIST = 256 << 20

# How files begin that are taken for text by their name alone, and what to do with them.
STRANGERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run git lfs pull",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"PAR1": "a Parquet file: give it a name that ends in .parquet",
    b"\x1f\x8b": "packed by gzip: give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "packed by Zstandard: give it a name that ends in .zst",
    b"\xff\xfe": "in UTF-16: save it as UTF-8",
    b"\xfe\xff": "in UTF-16: save it as UTF-8",
    b"<!DOCTYPE": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}


def read_rows(path: Path) -> Rows:
    """Number and fields of each row of a file, of the kind in `KINDS` that its name says; `.gz` and `.zst` of any.

    JSON is a list of objects; a list of texts, which are taken for prompts, as the lines of `.txt` are; or an object of
    columns, such as {"instructions": [...]}. The number is that of the line on which the row begins; in JSON and
    Parquet, its place, from 1. Blank lines are passed over. Cells of CSV and TSV are text, whatever they look like.

    Raises:
        UserError: The file is missing, damaged, not UTF-8 or empty, or rows are not what they should be; names
            them all.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    read = KINDS.get(kind_of(path), _jsonl_rows)
    faults: list[str] = []
    try:
        with _opened(path) as file:
            begins = file.peek(64)
            stranger = next((what for mark, what in STRANGERS.items() if begins.startswith(mark)), None)
            if stranger and read is not _parquet_rows:
                raise UserError(f"{path}: this is {stranger}")
            rows = read(path, file, faults)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not rows and not faults:
        faults.append(f"{path}: holds no rows")
    if faults:
        raise UserError(faults)
    return rows


def kind_of(path: Path) -> str:
    """The end of a file's name that says what it holds: `.csv` of `rows.csv.gz`."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix.lower()


def _opened(path: Path) -> AbstractContextManager[File]:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return BufferedReader(_arrow(path).input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _arrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install '.[hub]'") from None
    return pyarrow


def _parquet_rows(path: Path, file: File, faults: list[str]) -> Rows:
    arrow = _arrow(path)
    try:
        return list(enumerate(arrow.parquet.read_table(file).to_pylist(), 1))
    except arrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet ({str(error).splitlines()[0]:.200})") from None


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
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Twice(f"two fields are called {name!r:.40}")
    return fields


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
        value, reason = _parsed(line)
        if reason:
            faults.append(f"{path}:{number}: not JSON ({reason})")
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
            with _opened(path) as again:
                whole, _ = _parsed(_decoded(path, again.read(MAX_LIST)))
            faults[:] = [f"{path}: neither a JSON list, nor an object on each line, nor an object of columns"]
        columns = whole and _rows_across(whole)
        if not columns:
            return lines
        faults.clear()
        return columns
    content = file.read(MAX_LIST + 1)
    if len(content) > MAX_LIST:
        raise UserError(f"{path}: a JSON list of more than {MAX_LIST >> 20} MB; write it as JSONL, a row on each line")
    values, reason = _parsed(_decoded(path, content))
    if reason:
        raise UserError(f"{path}: not JSON ({reason})")
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


def _text_rows(path: Path, file: File, faults: list[str]) -> Rows:
    return [(number, {"prompt": line.strip()}) for number, line in enumerate(_lines(path, file), 1) if line.strip()]


def _csv_rows(path: Path, file: File, faults: list[str], delimiter: str = ",") -> Rows:
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
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
        reason = "a carriage return alone ends a line: save it with line feeds" if "new-line" in str(error) else error
        faults.append(f"{path}:{begin}: not CSV ({reason})")
    return rows


KINDS: dict[str, Callable[[Path, File, list[str]], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".txt": _text_rows,
    ".parquet": _parquet_rows,
}
"""How a file of such a name is read; any other is taken for JSONL."""
PACKED = (".gz", ".zst")
