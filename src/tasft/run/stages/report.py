"""The report of a run, and whether its gate is met."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tasft.core import provenance
from tasft.core.step import Step
from tasft.models.load import check_trained
from tasft.report import write_report
from tasft.report.read import read_run
from tasft.run import gate, trackers
from tasft.run.context import Context


def steps(context: Context, earlier: Iterable[Step]) -> Iterator[Step]:
    """All files of the run -> `report`, with `gate.json` where the recipe has limits.

    Args:
        context: What the run is given.
        earlier: The steps of all other stages.
    """
    reads = {"recipe": context.spec.model_dump(), "steps": [step.key for step in earlier]}

    def work(folder: Path) -> None:
        for name in ("adapter", "model"):
            check_trained(context.folder / "train" / name)
        if context.spec.gate:
            provenance.write_json(folder / "gate.json", gate.judge(context.spec.gate, read_run(context.folder)))
        write_report(context.folder)
        if names := context.spec.train.report_to:
            trackers.tell_rates(context.folder, names, context.spec.name)

    yield Step(context.folder / "report", reads, work, costs_nothing=True)
