"""A first recipe for somebody's model and data, with every field and what it means."""

import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from tasft.core.errors import UserError
from tasft.models.bundled import BUNDLED
from tasft.models.load import load_tokenizer, sketch
from tasft.run import recipe_file
from tasft.run.recipe import Recipe

WIDTH = 120
_HEAD = """\
# Check this file with `tasft check`, run it with `tasft run`. A line with # right before its first word is a field that
# you may set, with its default or an example: take the # away.
"""
# What stands in a line that only shows how a section may look.
_EXAMPLES = {"gate": {"harmful": 2, "incoherent": 5, "over_refusal": 5}}


def values_of(
    name: str,
    base: str,
    prompt: str,
    imitate: str,
    toxic: str,
    benign: str,
    heldout_toxic: str,
    heldout_benign: str,
) -> dict[str, Any]:
    """What a first recipe sets: what the demo does, with this model and these data.

    With rows to imitate the model is fine-tuned on them, harvested, and trained from the start again on both, as the
    paper does. Without, `imitate: none`, it is held to its own benign answers, as in the demo.
    """
    values = recipe_file.read(recipe_file.shipped()["demo"])
    lora = adapter_of(base, values["model"]["lora"])
    values |= {
        "name": name,
        "model": {"base": base, "prompt": prompt, **({"lora": lora} if lora else {})},
        "data": {"toxic_prompts": toxic, "benign_prompts": benign},
    }
    values["evaluate"]["sets"] = {
        "toxic": {"source": heldout_toxic, "kind": "toxic"},
        "benign": {"source": heldout_benign, "kind": "benign"},
    }
    if imitate != "none":
        values["data"]["imitate"] = {"source": imitate}
        values["sft"] = {"epochs": 3}
        values["harvest"] = {key: values["harvest"][key] for key in ("judge", "anchors")}
        steps = {"penalty_weight": 0.5, "batch_size": 10, "avoid_per_step": 1, "epochs": 3}
        values["train"] = {"penalty": values["train"]["penalty"], **steps}
    return values


def adapter_of(base: str, lora: Mapping[str, Any]) -> dict[str, Any] | None:
    """The adapter of the demo on the upper third of a model's layers; None where the model is not on this machine."""
    if base not in BUNDLED and not Path(base).exists():
        return None
    model = sketch(base)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    layers = model.config.get_text_config().num_hidden_layers
    if not (targets := [name for name in lora["target_modules"] if name in names]):
        return None
    upper = list(range(layers - -(-layers // 3), layers))
    return {**lora, "target_modules": targets, "layers_to_transform": upper}


def text(values: Mapping[str, Any]) -> str:
    """A recipe of these values as YAML; comments are the descriptions of the fields, other fields commented out."""
    return _HEAD + "\n" + "\n".join(_lines(Recipe, values, "")) + "\n"


def _lines(section: type[BaseModel], values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
        if field.description:
            named = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
            comment = f"{field.description} One of: {', '.join(named)}." if named else field.description
            yield from textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if name in values and inner:
            yield f"{indent}{name}:"
            yield from _lines(inner, values[name], f"{indent}  ")
        elif name in values:
            yield from (f"{indent}{line}" for line in _yaml(name, values[name]))
        else:
            default = field.get_default(call_default_factory=True)
            yield from (f"{indent}#{line}" for line in _yaml(name, _EXAMPLES.get(name, default)))
        if not indent:
            yield ""


def _yaml(name: str, value: Any) -> list[str]:
    """A field on one line, or on few where it is long."""
    plain = value.model_dump() if isinstance(value, BaseModel) else value
    written = recipe_file.as_yaml(plain, default_flow_style=True, width=WIDTH - 30)
    first, *others = written.removesuffix("...\n").splitlines()
    return [f"{name}: {first}", *(f"  {line}" for line in others)]


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a recipe to a file that is not there yet.

    Raises:
        UserError: The file is there, or cannot be written.
    """
    written = text(values)
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"{path} is there already and stays as it is: choose another with --out") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        with file:
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink()  # Half a recipe, or an empty one, would be in the way of the next try.
        raise UserError(f"{path}: {error.strerror}: nothing is written") from None


def prompt_of(base: str) -> str:
    """Chat where the model's tokenizer has a template, or the model is not on this machine; else alpaca."""
    if base not in BUNDLED and not Path(base).exists():
        return "chat"
    return "chat" if load_tokenizer(base).chat_template else "alpaca"
