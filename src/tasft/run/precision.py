"""What `auto` means in a recipe."""

from typing import Any

from tasft.models.precision import Choice
from tasft.run.recipe import Recipe


def is_settled(spec: Recipe) -> bool:
    """Whether a recipe leaves no precision to the machine."""
    return "auto" not in (spec.model.dtype, spec.train.precision, spec.sft.precision if spec.sft else None)


def settled(spec: Recipe, choice: Choice) -> Recipe:
    """A recipe with a precision in place of each `auto`; weights that are trained themselves stay in float32."""
    parts: dict[str, Any] = {
        name: part.model_copy(update={"precision": choice.autocast})
        for name, part in (("train", spec.train), ("sft", spec.sft))
        if part and part.precision == "auto"
    }
    if spec.model.dtype == "auto":
        dtype = choice.dtype if spec.model.lora else "float32"
        parts["model"] = spec.model.model_copy(update={"dtype": dtype})
    return spec.model_copy(update=parts)
