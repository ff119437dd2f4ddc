"""Tasks of lm-eval on one state of the model; a part of the stage evaluate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasft.core import ranks
from tasft.core.step import Step
from tasft.evaluate import capability
from tasft.run.context import Context


def steps(context: Context, state: str, reads: dict[str, Any]) -> Iterator[Step]:
    """A state of the model -> `evaluate/STATE/capability/TASK`."""
    wanted = context.spec.evaluate.capability
    if wanted is None:
        return
    data_dir = context.spec.data.data_dir
    settings = wanted.model_dump(include={"limit", "num_fewshot"})

    def work(folder: Path) -> None:
        if not ranks.is_first():
            return  # lm-eval cannot share the work on a model that is loaded already.
        with context.models.state(state) as loaded:
            capability.measure(
                loaded,
                context.inputs.tokenizer,
                folder.name,
                folder,
                context.about,
                data_dir=data_dir,
                batch_size=wanted.batch_size,
                **settings,
            )

    for task in wanted.tasks:
        folder = context.folder / "evaluate" / state / "capability" / task
        yield Step(folder, reads | settings | {"task": capability.reads(task, data_dir)}, work)
