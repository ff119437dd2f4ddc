"""A page that is one file: its style, its script and its data inside, and a policy that lets nothing else in."""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasft.core.text import visible
from tasft.report.blocks import PAGE, Document, Replies


def page(document: Document) -> str:
    """HTML of a report.

    The page may run the one script that its Content-Security-Policy names by hash, may turn no string into markup
    or code, and may ask nobody for anything. Whatever the template prints is escaped, and hidden characters in it
    are shown by number (`tasft.core.text.visible`). The strings of the replies' JSON are such already, and the script
    prints text as text.
    """
    environment = Environment(
        loader=PackageLoader("tasft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["block"] = lambda block, name: type(block).__name__ == name
    sections = document.shown(PAGE)
    data = next((block.data for section in sections for block in section.blocks if isinstance(block, Replies)), None)
    style, code = _asset("style.css"), _asset("replies.js") if data else ""
    # Markup is not escaped: our own files, and JSON that is made fit for it.
    return environment.get_template("page.html.j2").render(
        document=document,
        sections=sections,
        style=Markup(style),  # nosec B704
        script=Markup(code),  # nosec B704
        data=Markup(json_island(data or {})),  # nosec B704
        policy=_policy(style, code),
    )


def json_island(value: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(style: str, code: str) -> str:
    return (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(code)}"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (files("tasft.report") / "templates" / name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """Applied to whatever a template prints: no hidden character reaches the page."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
