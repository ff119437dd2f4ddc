"""Parts of one's own: judges, penalties, engines, prompt sets and anchors that a recipe names by `module:name`.

A package may register one under a name of its own as an entry point of the group `tasft.judges`, `tasft.penalties`,
`tasft.engines`, `tasft.prompt_sets` or `tasft.anchors`.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from tasft.core.errors import UserError
from tasft.core.provenance import content_hash, file_hash
from tasft.core.settings import Settings
from tasft.core.suggest import did_you_mean


class Part(Settings):
    """A class or a function of one's own."""

    target: str = Field(
        description="Where it is: mypkg.parts:Name, in the folder where you run tasft; or a registered name."
    )
    options: dict[str, Any] = Field({}, description="Given to it by name: to a class when it is made, else each time.")


@cache
def registered(kind: str) -> dict[str, str]:
    """Targets that installed packages registered, by their names; `kind` is judges, penalties and so on."""
    return {entry.name: entry.value for entry in entry_points(group=f"tasft.{kind}")}


class Own:
    """What a target is, ready to be called.

    Args:
        kind: Of the part: judges, penalties and so on.
        part: What the recipe says.
        takes: Gives the names of what the part is called with: places first, then, after `*`, keywords.

    Attributes:
        version: Content hash of the target, its options and the file that holds it.

    Raises:
        UserError: It cannot be imported or made, or does not take what it is given; says which.
    """

    def __init__(self, kind: str, part: Part, takes: Callable[[Any], list[str]]) -> None:
        self.where = part.target
        target = part.target if ":" in part.target else registered(kind).get(part.target)
        if target is None:
            known = registered(kind)
            raise UserError(
                f"{part.target!r:.80} is no part: write it as mypkg.parts:Name, or as a name that a package registered "
                f"under tasft.{kind} ({', '.join(known) or 'none has'}){did_you_mean(part.target, known)}"
            )
        imported, file = _imported(target, trusted=target != part.target)
        with self.at_work("was made"):
            self.made: Any = imported(**part.options) if isinstance(imported, type) else imported
        if not callable(self.made):
            raise UserError(f"{self.where} is a {type(self.made).__name__}, and cannot be called")
        self._call: Callable[..., Any] = (
            self.made if isinstance(imported, type) or not part.options else partial(self.made, **part.options)
        )
        self._check(takes(self.made))
        self.version = content_hash([target, part.options, file and file_hash(file)])

    def _check(self, takes: list[str]) -> None:
        places = takes[: takes.index("*")] if "*" in takes else takes
        try:
            inspect.signature(self._call).bind(*places, **dict.fromkeys(takes[len(places) + 1 :]))
        except TypeError as error:
            named = ", ".join(takes)
            raise UserError(
                f"{self.where} takes {inspect.signature(self._call)}, but is called with ({named}): {error}"
            ) from None
        except ValueError:  # Of a function in C nothing is known.
            return

    @contextmanager
    def at_work(self, when: str = "worked") -> Iterator[None]:
        """Within, what is raised is a fault of the part."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise UserError(
                f"{self.where} raised an error when it {when}: {reason} ({last.filename}:{last.lineno})"
            ) from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        Raises:
            UserError: It raised something.
        """
        with self.at_work():
            return self._call(*args, **kwargs)

    def one_each(self, found: Any, given: Sequence[Any], what: str) -> list[Any]:
        """What it gave back, if that is one thing for each that it was given.

        Raises:
            UserError: It is not.
        """
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(given):
            count = len(found) if isinstance(found, Sequence) and not isinstance(found, str) else type(found).__name__
            raise UserError(f"{self.where} gave back {count} {what} for {len(given)}: give a list of one for each")
        return list(found)


def _imported(target: str, trusted: bool) -> tuple[Any, Path | None]:
    """What `module:name` is, and the file that holds it.

    A recipe may be somebody else's: unless a package registered it, only what lies in the folder where the command
    runs is had, and nothing of Python or of an installed package, which could be asked to do anything.
    """
    module, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    root = module.partition(".")[0]
    if not trusted and not _is_here(root):
        raise UserError(
            f"{target}: {root} does not lie in this folder: a recipe may name what does, or what an installed package "
            "registered (entry points of tasft.judges and so on)"
        )
    try:
        imported: Any = import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise UserError(
            f"{target}: {module} cannot be imported ({reason}); is it installed, or in this folder?"
        ) from error
    home = imported
    for part in name.split("."):
        if not hasattr(imported, part):
            known = [attribute for attribute in vars(home) if not attribute.startswith("_")]
            raise UserError(f"{target}: {module} has no {name}{did_you_mean(name, known)}")
        imported = getattr(imported, part)
    # What the module itself imported from elsewhere is not it.
    if not trusted and getattr(imported, "__module__", root).partition(".")[0] != root:
        raise UserError(f"{target}: {name} is of {imported.__module__}, and not defined in {root}: define it there")
    file = getattr(home, "__file__", None)
    return imported, Path(file) if file else None


def _is_here(root: str) -> bool:
    """Whether a module lies in the folder where the command runs; true of one that there is not, to be told so."""
    try:
        spec = find_spec(root)
    except ValueError:
        return False
    if spec is None:
        return True
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    location = next((Path(path).resolve() for path in places if path and os.path.exists(path)), None)
    return (
        location is not None
        and location.is_relative_to(Path.cwd().resolve())
        and {"site-packages", "dist-packages"}.isdisjoint(location.parts)
    )


def fields_of(row: Any, known: Mapping[str, Sequence[type]], where: str) -> dict[str, Any]:
    """The fields of a mapping that a part gave back, each of a type that it may have.

    Raises:
        UserError: It is none, or has a field that is not known, or one of another type.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a dictionary with some of {', '.join(known)}, found {row!r:.60}")
    # Without the types of numpy and of tensors.
    row = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
    for name, value in row.items():
        if name not in known:
            raise UserError(f"{where}: {name!r:.40} is not known; give some of {', '.join(known)}")
        if value is not None and type(value) not in known[name]:
            kinds = " or ".join(kind.__name__ for kind in known[name])
            raise UserError(f"{where}: {name} is {value!r:.60}; give {kinds}, or None where it is not known")
    return row
