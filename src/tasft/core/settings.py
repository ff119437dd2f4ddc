"""Settings that are declared once: a recipe has them as sections, and the classes that use them take their defaults."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from tasft.core.errors import UserError


class Settings(BaseModel):
    """Fields with their defaults and a sentence on each."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {value}")
    return value


# YAML reads 1e-4 as text and 1 as an integer: both are meant as numbers. Truth is not.
Number = Annotated[float, Field(strict=False), BeforeValidator(_no_truth)]


# Names become folders.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=200)]
Place = Annotated[str, Field(min_length=1)]


def setting(section: type[Settings], name: str) -> Any:
    """The field of a dataclass that is declared in a section: its default and its sentence are those there."""
    declared = section.model_fields[name]
    default, help_ = declared.get_default(call_default_factory=True), {"help": declared.description}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=help_)
    return field(default=default, metadata=help_)


def check_settings(section: type[Settings], values: Mapping[str, Any]) -> None:
    """See that values given in Python are such as a recipe may have: `sampling="unifrom"` would be taken for another.

    Raises:
        UserError: Names all that are not.
    """
    faults = []
    for name, value in values.items():
        declared = section.model_fields[name]
        kind: Any = Annotated[declared.annotation, *declared.metadata] if declared.metadata else declared.annotation
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        try:
            TypeAdapter(kind, config=None if is_model else Settings.model_config).validate_python(value)
        except ValidationError as error:
            faults += [
                f"{name} is {value!r:.60}: {fault['msg'].removeprefix('Value error, ')}" for fault in error.errors()
            ]
    if faults:
        raise UserError(faults)
