"""Pages of the site that are made from the code, and from files beside `docs/`: a hook of MkDocs, see mkdocs.yml."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import textstat
import typer.main
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic import TypeAdapter
from typer.cli import get_docs_for_click

import tasft
from tasft.cli.main import app
from tasft.core.measures import MEASURES
from tasft.core.names import PENALTIES
from tasft.data.rows import Example, Prompt
from tasft.data.sets import GROUPS, KNOWN
from tasft.judges.base import Verdict
from tasft.models.engine import Reply
from tasft.run.recipe import Recipe

ROOT = Path(__file__).parents[1]
BESIDE = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository that are pages too, and where."""
SCHEMAS = ROOT / "docs" / "schemas"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"object": "mapping", "array": "list", "string": "text", "boolean": "true, false"}
"""Words of JSON schema -> ours."""


def on_files(files: Files, config: Any) -> Files:
    """Add what is made here to what lies in `docs/`."""
    made = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in BESIDE.items()}
    made |= {f"reference/{name}.md": page() for name, page in PAGES.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to pages of the site; a file that is none is named only."""
    here = page.file.src_uri
    beside = {site: name for name, site in BESIDE.items()}
    origin = posixpath.dirname(beside.get(here, f"docs/{here}"))

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(origin, target))
        site = BESIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is None:
            return text if text.startswith("`") else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor or ''})"

    return re.sub(r"\[([^\]]+)\]\((?![a-z]+:)([^)#\s]+)(#[^)]*)?\)", led, markdown)


def on_post_build(config: Any, **_: Any) -> None:
    """Say how easy the words read; refuse a page that loads anything from elsewhere."""
    loaded = re.compile(
        r"<(?:script|img|iframe|link(?! rel=\"(?:canonical|alternate)))[^>]*(?:src|href)=\"?(?:https?:)?//"
    )
    for path in Path(config["site_dir"]).rglob("*.html"):
        if found := loaded.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path}: loads something from elsewhere: {found[0]}")
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs").glob("[gs]*/*.md")),
    ):
        words = prose(path.read_text(encoding="utf-8"))
        print(f"Flesch {textstat.flesch_reading_ease(words):5.1f}  {path.relative_to(ROOT)}")


def prose(markdown: str) -> str:
    """The sentences of a page: no code, no table, no heading, no markup; each point of a list is a sentence."""
    text = re.sub(r"```(?s:.*?)```|<!--(?s:.*?)-->|^ {4}.*|^[|#!<].*", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"[*`_]", "", text)
    points = re.split(r"\n\s*\n|^\s*(?:-|\d+\.) ", text, flags=re.MULTILINE)
    joined = (" ".join(point.split()) for point in points)
    return " ".join(point if point[-1] in ".!?" else f"{point}." for point in joined if point)


# The recipe ------------------------------------------------------------------------------------------------------


def recipe() -> str:
    """Every field: default, what it may be, and its sentence."""
    schema = Recipe.model_json_schema()
    where: dict[str, list[str]] = {}
    found = [("", schema)]
    for path, section in found:  # It grows while sections are met.
        for name, field in section["properties"].items():
            for kind in _kinds(field):
                if "$ref" in kind:
                    inner = kind["$ref"].rpartition("/")[2]
                    if inner not in where:
                        found.append((f"{path}{name}.", schema["$defs"][inner]))
                    where.setdefault(inner, []).append(f"{path}{name}")
    parts = ["# Recipe", "Every field of a recipe. `tasft init` writes a file with all of them."]
    for path, section in found:
        name = section["title"]
        if path:
            others = ", ".join(f"`{each}`" for each in where[name][1:])
            also = f" Also: {others}." if others else ""
            parts.append(f"## `{where[name][0]}`\n\n{section['description'].splitlines()[0]}{also}")
        rows = ["| field | default | values | |", "|---|---|---|---|"]
        for name, field in section["properties"].items():
            default = _default(field) if name not in section.get("required", ()) else "*needed*"
            said = field.get("description") or _sentence(schema, field)
            rows.append(f"| `{name}` | {default} | {_values(field, where)} | {_cell(said)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _kinds(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas that a value may follow; of a list or a mapping, those of its members."""
    if "anyOf" in field:
        return [kind for each in field["anyOf"] for kind in _kinds(each)]
    inner = field.get("additionalProperties") or field.get("items")
    return _kinds(inner) if isinstance(inner, dict) else [field]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _sentence(schema: dict[str, Any], field: dict[str, Any]) -> str:
    """The first line of the section that a field holds."""
    named = next((kind["$ref"].rpartition("/")[2] for kind in _kinds(field) if "$ref" in kind), None)
    return schema["$defs"][named]["description"].splitlines()[0] if named else ""


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return ""
    text = json.dumps(field["default"], ensure_ascii=False)
    return f"`{_cell(text)}`" if len(text) < 60 else "*see `tasft init`*"


def _values(kind: dict[str, Any], where: dict[str, list[str]]) -> str:
    if "anyOf" in kind:
        return " or ".join(dict.fromkeys(_values(each, where) for each in kind["anyOf"]))
    if "$ref" in kind:
        path = where[kind["$ref"].rpartition("/")[2]][0]
        return f"[section](#{path.replace('.', '').lower()})"
    if "enum" in kind or "const" in kind:
        return ", ".join(f"`{each}`" for each in kind.get("enum") or [kind["const"]])
    bounds = ", ".join(f"{sign} {kind[key]}" for key, sign in BOUNDS.items() if key in kind)
    inner = kind.get("additionalProperties") or kind.get("items")
    of = f"of {_values(inner, where)}" if isinstance(inner, dict) and inner else ""
    return " ".join(filter(None, (TYPES.get(kind.get("type", "any"), kind.get("type", "any")), bounds, of)))


# Other pages -----------------------------------------------------------------------------------------------------


def commands() -> str:
    """The command line, as Typer documents it."""
    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="tasft", title="Command line")


def api() -> str:
    """What `import tasft` offers."""
    parts = ["# Python API", "All that `tasft.__all__` names, from its docstrings."]
    tables = {
        "JUDGES": "Kind of [judge](../judges.md) -> what makes it.",
        "PENALTIES": "Name -> [penalty](penalties.md).",
    }
    for name in tasft.__all__:
        if name in tables:
            parts.append(f"## `tasft.{name}`\n\n{tables[name]}")
            continue
        home = f"tasft.{tasft._HOMES[name]}.{name}"
        parts.append(f"## `tasft.{name}`\n\n::: {home}\n    options: {{heading_level: 3, show_root_heading: false}}")
    return "\n\n".join(parts) + "\n"


def penalties() -> str:
    """Each penalty by its docstring."""
    parts = [
        "# Penalties",
        "Which to take: [Choose a penalty](../guides/penalty.md). Formulas: [Method](../method.md).",
    ]
    for name in PENALTIES:
        home = "transport" if name.startswith("emd") else "likelihood"
        parts.append(f"## `{name}`\n\n::: tasft.loss.{home}.{name}\n    options: {{show_root_heading: false}}")
    return "\n\n".join(parts) + "\n"


def sets() -> str:
    """Named prompt sets, with licence and source."""
    rows = ["| name | prompts | kind | licence, as stated | file | what |", "|---|---:|---|---|---|---|"]
    for name, each in KNOWN.items():
        mark = "" if each.sha256 or not each.url else " †"
        file = f"[{each.file}]({each.url}){mark}" if each.url else "shipped"
        rows.append(f"| `{name}` | {each.prompts:,} | {each.kind} | {each.licence} | {file} | {_cell(each.about)} |")
    groups = "\n".join(f"- `{name}`: {', '.join(f'`{each}`' for each in inside)}" for name, inside in GROUPS.items())
    note = (
        "† Its published bytes were never in our hands: the number of prompts is as far as we know it, and a note of "
        "`tasft check` says that the file could not be compared. How to use them: [guide](../guides/prompt-sets.md)."
    )
    return "\n\n".join(["# Prompt sets", "\n".join(rows), "Several by one name:", groups, note]) + "\n"


def files() -> str:
    """The formats of files, with a JSON schema each."""
    parts = ["# Files", _FILES]
    for title, names, schema in formats():
        text = json.dumps(schema, indent=2, ensure_ascii=False)
        parts.append(f'## {title}\n\n{names}\n\n??? note "JSON schema"\n\n' + _indented(f"```json\n{text}\n```"))
    measures = "\n".join(f"| `{name}` | {_cell(each.meaning)} |" for name, each in MEASURES.items())
    parts.append(f"## Measures\n\n| | |\n|---|---|\n{measures}")
    return "\n\n".join(parts) + "\n"


def formats() -> list[tuple[str, str, dict[str, Any]]]:
    """Title, names of files and JSON schema of each format: from the types of the code, else from `docs/schemas`."""
    typed = [
        ("Rows", "`harvest/*.jsonl`, `train/data.jsonl`, and your own rows", Example),
        ("Prompts", "`data.toxic_prompts`, `evaluate.sets`, ...", Prompt),
        ("Replies", "`replies.jsonl`", Reply),
        ("Verdicts", "`verdicts.jsonl`", Verdict),
    ]
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SCHEMAS.glob("*.json"))]
    return [
        *((title, names, TypeAdapter(kind).json_schema()) for title, names, kind in typed),
        *((each["title"], f"`{each['files']}`", each) for each in kept),
    ]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


_FILES = """\
A run is a folder of files that you can open. Lines of `.jsonl` files follow these schemas; fields that one does not
name may come later.

    run/recipe.yaml manifest.json                    the resolved recipe; versions, commit, seeds, hashes
    run/calibration/                                 what coherence is measured by, whatever the method
    run/harvest/replies.jsonl verdicts.jsonl         every answer and what the judge said of it
    run/harvest/avoid.jsonl anchor.jsonl imitate.jsonl contrastive.jsonl
    run/train/data.jsonl adapter/ metrics.jsonl      both loss terms, mean EMD and entropy on avoid tokens, ...
    run/train/monitor.jsonl                          what the collapse monitor saw; empty is good
    run/evaluate/<base|sft|checkpoint-N|final>/<set>/replies.jsonl and <judge>/{verdicts.jsonl,summary.json}
    run/evaluate/<base|sft|final>/jailbreak/<attack>/replies.jsonl verdicts.jsonl summary.json
    run/evaluate/<base|sft|final>/capability/<task>/items.jsonl summary.json      BoolQ, PIQA, ... by lm-eval
    run/evaluate/<base|sft|final>/quality/<reference|annotator>/items.jsonl summary.json        AlpacaEval
    run/report/index.html report.md model_card.md results.csv

Replies are harmful text. They stay in the run folder, readable by you alone, and in its report."""

PAGES = {"recipe": recipe, "commands": commands, "api": api, "penalties": penalties, "sets": sets, "files": files}
"""Name of a page of reference -> what makes it."""
