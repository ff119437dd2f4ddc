"""Tables in pages: what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is written by a script."""

import re
from pathlib import Path


def placed(page: str, name: str, text: str) -> str:
    """The page with a text between the markers of its name.

    Raises:
        ValueError: The page lacks them.
    """
    pattern = rf"(<!-- {name}:begin -->).*?(<!-- {name}:end -->)"
    page, found = re.subn(
        pattern, lambda match: f"{match[1]}\n\n{text.strip()}\n\n{match[2]}", page, count=1, flags=re.DOTALL
    )
    if not found:
        raise ValueError(f"there is no <!-- {name}:begin --> ... <!-- {name}:end -->")
    return page


def put(path: Path, name: str, text: str) -> None:
    """Write a text between the markers of its name in a file."""
    try:
        page = placed(path.read_text(encoding="utf-8"), name, text)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None
    path.write_text(page, encoding="utf-8")
