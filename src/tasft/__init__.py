"""Make a language model safe while it is fine-tuned, from nothing but its own harmful answers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasft.report.results import results
    from tasft.train.trainer import TASFTConfig, TASFTTrainer

__all__ = ["TASFTConfig", "TASFTTrainer", "results"]

# torch, transformers and pandas take seconds to import; `tasft --help` needs none of them.
_MODULES = {
    "TASFTConfig": "tasft.train.trainer",
    "TASFTTrainer": "tasft.train.trainer",
    "results": "tasft.report.results",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
