"""Recipes as YAML: found by name or path, read with all faults at once, written in full."""

import os
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from tasft.core.errors import UserError
from tasft.core.redact import redacted
from tasft.core.suggest import did_you_mean, nearest
from tasft.data.sources import missing
from tasft.run.recipe import RENAMED, Recipe, renamed, sources_in

MAX_VALUES = 100_000
MAX_DEPTH = 50


def shipped() -> dict[str, Path]:
    """Recipes and sweep files that come with tasft, by name."""
    packed = Path(str(resources.files("tasft") / "recipes"))
    # A checkout keeps them at its root; the wheel carries them inside the package.
    folder = packed if packed.is_dir() else Path(__file__).parents[3] / "recipes"
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}


def find(source: str) -> Path:
    """The file that is meant: a YAML file, that of a run folder, or a shipped one by its name.

    Raises:
        UserError: There is none.
    """
    path = Path(source)
    # os.path, to which a name that no file can have is no file.
    if os.path.isfile(path / "recipe.yaml"):
        path = path / "recipe.yaml"
    elif not os.path.isfile(path):
        path = shipped().get(source, path)
    if not os.path.isfile(path):
        near = did_you_mean(source, (*shipped(), *(file.name for file in Path().glob("*.yaml"))))
        raise UserError(
            f"{source!r:.100} is neither a recipe file, a run folder, nor one of {', '.join(shipped())}{near}"
        )
    return path


def is_sweep(source: str) -> bool:
    """Whether the file that is meant describes a sweep."""
    return "base" in read(find(source))


def is_recipe(source: str) -> bool:
    """Whether `load` would look for a recipe there: a YAML file by its name, a shipped recipe, or a run folder."""
    named = Path(source).suffix in (".yaml", ".yml") and not os.path.isdir(source)
    return named or source in shipped() or os.path.isfile(Path(source) / "recipe.yaml")


def load(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A YAML file, the name of a shipped recipe, or a run folder; or the fields themselves.
        overrides: `section.field=value`, each value in YAML.

    Raises:
        UserError: Names every fault, each with its field.
    """
    path = find(source) if isinstance(source, str) else Path("recipe")
    values = read(path) if isinstance(source, str) else deepcopy(dict(source))
    if "base" in values:
        raise UserError(f"{path} is a sweep file: run it with tasft sweep")
    faults = [fault for override in overrides if (fault := _override(values, override))]
    if faults:
        raise UserError(faults)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_faults(path, values, error)) from None


def _faults(path: Path, values: dict[str, Any], error: ValidationError) -> list[str]:
    """What is wrong with the fields of a recipe, what is then wrong between them, and files that are not there."""
    faults = sentences(path, error)
    meant = deepcopy(values)
    # What is wrong between fields shows only when each alone is right: taken as they were probably meant.
    mended = [_mend(meant, fault) for fault in _errors(error)]
    if all(mended):
        try:
            Recipe.model_validate(meant)
        except ValidationError as second:
            faults += sentences(path, second)
    absent = {field: missing(source) for field, source in sources_in(meant).items()}
    return [*dict.fromkeys(faults), *(f"{field}: {fault}" for field, fault in absent.items() if fault)]


def _mend(values: dict[str, Any], fault: Any) -> bool:
    """Write a field, or its value, as it was probably meant; whether that is known."""
    *path, name = fault["loc"] or [None]
    meant = _meant(fault)
    section: Any = values
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    if meant is None or not isinstance(section, dict) or name not in section:
        return False
    if fault["type"] != "extra_forbidden":
        section[name] = meant
    elif meant not in section:
        section[meant] = section.pop(name)
    return True


def _meant(fault: Any) -> str | None:
    """The field or the value that was probably meant by one that there is not."""
    if fault["type"] == "extra_forbidden":
        name, known = str(fault["loc"][-1]), list(_fields_at(fault["loc"][:-1]))
    elif fault["type"] == "literal_error":
        name, known = str(fault["input"]), re.findall(r"'([^']*)'", fault["ctx"]["expected"])
    else:
        return None
    new = RENAMED.get(name)
    return new if new in known else nearest(name, known)


def _fields_at(path: Sequence[Any]) -> Collection[str]:
    """Names of the fields of a section of a recipe."""
    section: Any = Recipe
    for part in path:
        if isinstance(part, int):  # Of a list, whose entries are sections too.
            continue
        # Of a mapping whose entries the user names, each value is a section.
        inner = (
            section.model_fields[part].annotation if part in _fields(section) else (get_args(section) or (None,))[-1]
        )
        section = next((kind for kind in _within(inner) if _fields(kind) or get_origin(kind) is dict), None)
    return _fields(section)


def _within(kind: Any) -> Iterator[Any]:
    """A type, then those that it is made of."""
    yield kind
    for inner in get_args(kind):
        yield from _within(inner)


def _fields(kind: Any) -> Collection[str]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else ()


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` reads it back."""
    return as_yaml(recipe.model_dump())


def as_yaml(value: Any, **options: Any) -> str:
    """A value as YAML that reads back as the same, in its own letters where that can be."""
    written = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **options)
    # PyYAML writes these as they are and reads them as line breaks: escaped they stay.
    if re.search("[\x85\u2028\u2029]", written):
        return yaml.safe_dump(value, sort_keys=False, **options)
    return written


class _Loader(yaml.SafeLoader):
    """YAML that is nothing but mappings with a text for each key, lists, text, numbers, truth and null."""

    # Without dates, which nothing here wants to be more than text, and without Python's own types.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError):
            what = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{node.value!r:.40} cannot be read as {what}", problem_mark=node.start_mark
            ) from None

    def flatten_mapping(self, node: Any) -> None:
        seen = set()
        for key, _ in node.value:
            kind = key.tag.rpartition(":")[2]
            if kind not in ("str", "merge"):
                shown = f", found {key.value!r:.40}: put it in quotation marks" if kind not in ("map", "seq") else ""
                raise yaml.MarkedYAMLError(
                    problem=f"the name of a field must be text{shown}", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the field {key.value!r:.40} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        super().flatten_mapping(node)


def _parsed(text: str, where: str) -> Any:
    """What YAML says.

    Raises:
        UserError: It is none, or more than a recipe can mean.
    """
    try:
        # Of the two loaders this is the one that makes no objects.
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{where}:{line}: not YAML (it holds the character U+{ord(text[error.position]):04X})"
        ) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{where}:{line}: not YAML ({error.problem})") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep") from None
    level, seen, depth = [value], 0, 0
    while level:
        seen, depth = seen + len(level), depth + 1
        if seen > MAX_VALUES:
            raise UserError(f"{where}: more than {MAX_VALUES:,} values, with each alias (*name) written out")
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} deep, with each alias (*name) written out")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return value


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Fields of a YAML file and of what it extends, not yet checked.

    Raises:
        UserError: It cannot be read, or is no mapping.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    values = _parsed(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as `model:`, found {_shown(values)}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str) or not os.path.isfile(path.parent / parent):
        raise UserError(f"{path}: extends must name a recipe file, found {_shown(parent)}")
    below = read(path.parent / parent, (*seen, path.resolve()))
    if "base" in below and not values.keys().isdisjoint({"model", "train", "evaluate"}):
        raise UserError(f"{path}: extends {parent}, which is a sweep file; name a recipe")
    return _merge(below, values)


class _Repr(reprlib.Repr):
    """Cuts what is long, but not through a key: half of one would not be known for what it is."""

    def repr_str(self, x: str, level: int) -> str:
        """A text without keys, then cut."""
        return super().repr_str(redacted(x), level)


def _shown(value: Any) -> str:
    """The beginning of a value, which may unfold to more than fits the memory."""
    return f"{_Repr().repr(value):.60}"


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def _override(values: dict[str, Any], override: str) -> str | None:
    shown = f"{redacted(override)!r:.100}"
    field, equals, text = override.partition("=")
    *sections, name = field.split(".")
    if not equals or not all((*sections, name)):
        return f"{shown}: expected section.field=value"
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            return f"{shown}: {section} is not a section"
        values = inner
    try:
        values[name] = _parsed(text, shown)
    except UserError as error:
        return str(error)
    return None


TAGS = ("<one>", "<list>", "<server>", "<python>")
"""What tells the kinds of a field apart, in pydantic's places alone."""


def sentences(path: Path, error: ValidationError) -> list[str]:
    """What pydantic found wrong with the fields of a file."""
    return [sentence for fault in _errors(error) for sentence in _sentences(path, fault)]


def _errors(error: ValidationError) -> list[Any]:
    """Faults, each at the place that the file has it: without the tags that tell the kinds of a field apart."""

    def place(fault: Any) -> tuple[Any, ...]:
        # A field that there is not ends in the user's own word, whatever it looks like.
        own = len(fault["loc"]) - 1 if fault["type"] == "extra_forbidden" else None
        return tuple(part for number, part in enumerate(fault["loc"]) if number == own or part not in TAGS)

    return [{**fault, "loc": place(fault)} for fault in error.errors()]


def _sentences(path: Path, fault: Any) -> list[str]:
    where = "".join(f"{part}: " for part in [".".join(str(part) for part in fault["loc"])] if part)
    if fault["type"] == "value_error":
        # Ours: each argument is a fault.
        return [f"{path}: {where}{reason}" for reason in fault["ctx"]["error"].args]
    shown = f", found {_shown(fault['input'])}"
    meant = _meant(fault)
    asked = str(fault["loc"][-1] if fault["type"] == "extra_forbidden" and fault["loc"] else fault["input"])
    hint = "" if meant is None else renamed(asked) if RENAMED.get(asked) == meant else f"; did you mean {meant}?"
    what = {
        "extra_forbidden": "no such field",
        "missing": "is missing",
        "string_pattern_mismatch": "use letters, digits, '.', '_' and '-', a letter or a digit first" + shown,
        "string_unicode": "holds half a character (U+D800 to U+DFFF)" + shown,
        "string_too_short": "is empty",
        "too_short": "is empty",
        "model_type": "expected fields of its own, such as `field: value`" + shown,
        "dict_type": "expected fields of its own, such as `field: value`" + shown,
    }.get(fault["type"], f"{fault['msg'][0].lower()}{fault['msg'][1:]}{shown}")
    return [f"{path}: {where}{what}{hint}"]
