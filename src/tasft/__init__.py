"""Make a language model safe while it is fine-tuned, from nothing but its own harmful answers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasft.core.errors import UserError
    from tasft.data.rows import Example
    from tasft.judges import JUDGES
    from tasft.loss import PENALTIES
    from tasft.report.results import results
    from tasft.train.config import TASFTConfig
    from tasft.train.monitor import CollapseMonitor
    from tasft.train.settings import MonitorSettings
    from tasft.train.trainer import TASFTTrainer

__all__ = [
    "JUDGES",
    "PENALTIES",
    "CollapseMonitor",
    "Example",
    "MonitorSettings",
    "TASFTConfig",
    "TASFTTrainer",
    "UserError",
    "results",
]

_HOMES = {
    "JUDGES": "judges",
    "PENALTIES": "loss",
    "CollapseMonitor": "train.monitor",
    "Example": "data.rows",
    "MonitorSettings": "train.settings",
    "TASFTConfig": "train.config",
    "TASFTTrainer": "train.trainer",
    "UserError": "core.errors",
    "results": "report.results",
}


def __getattr__(name: str) -> Any:
    # torch, transformers and pandas take seconds to import; `tasft --help` needs none of them.
    if name in _HOMES:
        return getattr(import_module(f"tasft.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
