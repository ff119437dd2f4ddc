"""A setting has one default, whether a recipe or Python leaves it out."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
from pydantic import BaseModel
from transformers import TrainingArguments

import tasft
from tasft.data.encode import Encoding
from tasft.data.settings import PromptSettings
from tasft.run.recipe import Recipe
from tasft.train.config import OWN, TASFTConfig
from tasft.train.settings import Train

# Parameters that bear the name of a setting and are something else.
OTHER = {
    # Of transformers, whose defaults its users know.
    "TASFTConfig": {field.name for field in dataclasses.fields(TrainingArguments)},
    # Of one reply, of a model, of a row: not of a run.
    "Sampling": {"temperature", "top_p"},
    "Request": {"prefix"},
    "requests_for": {"prefix"},
    "Head": {"temperature"},
    "logits": {"temperature"},
    "Example": {"source"},
    # Replies that are drawn together, not rows of a step.
    "TransformersEngine": {"batch_size"},
    # What a recipe's auto comes to is decided before a model is loaded.
    "load_model": {"dtype"},
    # The usual value of each, which a recipe takes where it says none.
    "npo": {"beta"},
    "npo_mean": {"beta"},
    "simnpo": {"beta"},
}
NONE_IS_EMPTY = ({}, None)


def sections():
    """Every section of a recipe, by its class."""
    waiting, known = [Recipe], set()
    while waiting:
        section = waiting.pop()
        if section in known:
            continue
        known.add(section)
        for field in section.model_fields.values():
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if inspect.isclass(kind) and issubclass(kind, BaseModel):
                    waiting.append(kind)
    return known


def declared():
    """Of each setting's name, the defaults that sections declare."""
    defaults = {}
    for section in sections():
        for name, field in section.model_fields.items():
            if not field.is_required():
                defaults.setdefault(name, []).append(field.get_default(call_default_factory=True))
    return defaults


def functions():
    """Public functions and dataclasses; but options override a recipe, and the report reads a finished one."""
    for module in pkgutil.walk_packages(tasft.__path__, "tasft."):
        if module.name.startswith(("tasft.cli", "tasft.report")) or module.name.endswith(("page", "tiles_triton")):
            continue
        try:
            found = vars(importlib.import_module(module.name))
        except ModuleNotFoundError as error:  # What a door to another package needs need not be installed.
            if str(error.name).startswith("tasft"):
                raise
            continue
        for name, thing in found.items():
            is_ours = getattr(thing, "__module__", None) == module.name and not name.startswith("_")
            is_dataclass = inspect.isclass(thing) and dataclasses.is_dataclass(thing)
            if is_ours and (inspect.isfunction(thing) or is_dataclass):
                yield module.name, name, thing


def test_no_default_in_python_differs_from_that_of_a_recipe():
    defaults, wrong, seen = declared(), [], 0
    for module, name, thing in functions():
        for parameter in inspect.signature(thing).parameters.values():
            known = defaults.get(parameter.name)
            given = parameter.default
            if known is None or given is parameter.empty or parameter.name in OTHER.get(name, ()):
                continue
            if "factory" in repr(given):
                given = next(field for field in dataclasses.fields(thing) if field.name == parameter.name)
                given = given.default_factory()
            given = list(given) if isinstance(given, tuple) else given
            seen += 1
            if given not in known and not (given is None and any(each in NONE_IS_EMPTY for each in known)):
                wrong.append(f"{module}.{name}({parameter.name}={given!r}), a recipe has {known}")
    assert not wrong, wrong
    assert seen > 40


@pytest.mark.parametrize("name", sorted(OWN & Train.model_fields.keys()))
def test_the_trainer_and_a_recipe_have_the_same_default_and_sentence(name, tmp_path):
    (field,) = (field for field in dataclasses.fields(TASFTConfig) if field.name == name)
    assert getattr(TASFTConfig(output_dir=str(tmp_path), use_cpu=True), name) == Train.model_fields[name].default
    assert field.metadata["help"] == Train.model_fields[name].description


def test_rows_are_encoded_alike_by_default(tmp_path):
    assert TASFTConfig(output_dir=str(tmp_path), use_cpu=True).encoding() == Encoding()
    assert Encoding().max_length == Train.model_fields["max_length"].default
    assert Encoding().style == PromptSettings().prompt


def test_a_default_that_is_changed_in_place_stays_as_it_was_declared():
    Encoding().chat_template_kwargs["enable_thinking"] = False
    assert Encoding().chat_template_kwargs == {} == PromptSettings().chat_template_kwargs


def test_every_field_of_a_recipe_has_a_sentence():
    for section in sections():
        for name, field in section.model_fields.items():
            is_section = inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)
            assert field.description or is_section, f"{section.__name__}.{name}"
