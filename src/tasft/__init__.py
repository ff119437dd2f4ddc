"""Make a language model safe while it is fine-tuned, from nothing but its own harmful answers."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasft.core.errors import UserError
    from tasft.data.rows import Example
    from tasft.judges import JUDGES
    from tasft.loss import PENALTIES, mark
    from tasft.report.results import results
    from tasft.run.doors import evaluate, harvest, judge, run
    from tasft.train.config import TASFTConfig
    from tasft.train.losses import Avoiding, losses_for
    from tasft.train.monitor import CollapseMonitor
    from tasft.train.settings import MonitorSettings
    from tasft.train.trainer import TASFTTrainer

__all__ = [
    "JUDGES",
    "PENALTIES",
    "Avoiding",
    "CollapseMonitor",
    "Example",
    "MonitorSettings",
    "TASFTConfig",
    "TASFTTrainer",
    "UserError",
    "evaluate",
    "harvest",
    "judge",
    "losses_for",
    "mark",
    "results",
    "run",
]

_HOMES = {
    "JUDGES": "judges",
    "PENALTIES": "loss",
    "Avoiding": "train.losses",
    "CollapseMonitor": "train.monitor",
    "Example": "data.rows",
    "MonitorSettings": "train.settings",
    "TASFTConfig": "train.config",
    "TASFTTrainer": "train.trainer",
    "UserError": "core.errors",
    "evaluate": "run.doors",
    "harvest": "run.doors",
    "judge": "run.doors",
    "losses_for": "train.losses",
    "mark": "loss",
    "results": "report.results",
    "run": "run.doors",
}


class _Door(ModuleType):
    """A package that is called as the function of its name is: `tasft.run` is both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("tasft.run.doors"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This module, in which the import of `tasft.run` puts the package in the place of the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("run", "harvest", "evaluate") and isinstance(value, ModuleType):
            value.__class__ = _Door
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # torch, transformers and pandas take seconds to import; `tasft --help` needs none of them.
    if name in _HOMES:
        return getattr(import_module(f"tasft.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
