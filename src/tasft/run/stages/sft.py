"""Fine-tuning on the rows to imitate, before anything is harvested."""

from collections.abc import Iterator
from pathlib import Path

from tasft.core.step import Step
from tasft.run import training
from tasft.run.context import Context
from tasft.run.recipe import Recipe
from tasft.train.settings import Train


def settings_of(spec: Recipe) -> Train | None:
    """The training without any penalty that the recipe's sft section asks for."""
    if spec.sft is None:
        return None
    return Train(**spec.sft.model_dump(), method="sft", penalty="none", kl_rows=0, monitor=None)


def steps(context: Context) -> Iterator[Step]:
    """Rows of data.imitate -> `sft/adapter` or `sft/model`."""
    settings = settings_of(context.spec)
    if settings is None:
        return

    def work(folder: Path) -> None:
        training.train(context, settings, context.inputs.imitate, folder)

    yield Step(context.folder / "sft", context.before_reads, work)
