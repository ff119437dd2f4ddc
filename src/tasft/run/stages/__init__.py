"""The stages of a run, in order.

Each is a function of what a run is given: it names its steps, with all that each step reads. Later steps may read what
earlier ones wrote.
"""

from collections.abc import Callable, Iterator

from tasft.core.step import Step
from tasft.run.context import Context
from tasft.run.stages import evaluate, harvest, report, sft, train

Stage = Callable[[Context], Iterator[Step]]

_BEFORE_REPORT: dict[str, Stage] = {
    "sft": sft.steps,
    "harvest": harvest.steps,
    "train": train.steps,
    "evaluate": evaluate.steps,
}


def _report(context: Context) -> Iterator[Step]:
    return report.steps(context, (step for stage in _BEFORE_REPORT.values() for step in stage(context)))


STAGES: dict[str, Stage] = {**_BEFORE_REPORT, "report": _report}
"""Name -> its steps."""
