"""What is meant by a word that names a model."""

from dataclasses import dataclass
from pathlib import Path

from tasft.core.errors import UserError
from tasft.data.settings import PromptFormat
from tasft.models.load import base_of
from tasft.models.precision import fastest
from tasft.run import recipe_file
from tasft.run.context import Context
from tasft.run.recipe import Model


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        title: What it is called.
        spec: How its base is loaded and prompts are written; the base may be a folder of weights that were trained.
        adapter: On the base, or None.
    """

    title: str
    spec: Model
    adapter: Path | None = None


def sides_of(base: str, tuned: str | None, prompt: PromptFormat = "chat") -> tuple[Side, Side]:
    """The two models that are meant.

    Args:
        base: A run's state such as RUN/evaluate/base; a run, its final model; or a model: hub name, folder, adapter,
            .gguf file.
        tuned: Likewise; None when `base` is a run, whose base and final models are then meant.
        prompt: How a model alone is asked; one of a run is asked as there.

    Raises:
        UserError: Something is not there.
    """
    if tuned is not None:
        return _side(base, prompt), _side(tuned, prompt)
    if not _is_run(Path(base)):
        raise UserError(f"{base} is not a run folder, which has a base and a final model: name two models")
    return _state(Path(base), "base"), _state(Path(base), "final")


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file()


def _side(name: str, prompt: PromptFormat) -> Side:
    path = Path(name)
    if _is_run(path):
        return _state(path, "final")
    whole = path.absolute()
    if whole.parent.name == "evaluate" and _is_run(whole.parents[1]):
        return _state(whole.parents[1], whole.name)
    if (path / "adapter_config.json").is_file():
        return Side(name, Model(base=base_of(path), prompt=prompt, dtype=fastest().dtype), path)
    return Side(name, Model(base=name, prompt=prompt, dtype=fastest().dtype))


def _state(run: Path, state: str) -> Side:
    spec = recipe_file.load(str(run))
    title = f"{spec.name}: {state}"
    if state == "base":
        return Side(title, spec.model)
    folder = Context(spec, run).trained(state)
    if (folder / "adapter_config.json").is_file():
        return Side(title, spec.model, folder)
    return Side(title, spec.model.model_copy(update={"base": str(folder)}))
