"""Make a language model safe while it is fine-tuned, from nothing but its own harmful answers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasft.train.trainer import TASFTConfig, TASFTTrainer

__all__ = ["TASFTConfig", "TASFTTrainer"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `tasft --help` needs neither.
    if name in __all__:
        from tasft.train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
