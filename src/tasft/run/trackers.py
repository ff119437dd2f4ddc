"""Trackers such as TensorBoard: what training logs goes there by transformers, the rates by accelerate. No texts do."""

from collections.abc import Iterable
from pathlib import Path

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.core.suggest import did_you_mean
from tasft.report.read import read_run
from tasft.report.results import rows


def check(names: Iterable[str]) -> None:
    """See that transformers can report there.

    Raises:
        UserError: Names every tracker that it does not know, or whose package is not installed.
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    here, faults = get_available_reporting_integrations(), []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            faults.append(
                f"report_to: transformers knows no tracker {name!r:.40}; use some of {known}"
                f"{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
            )
        elif name not in here:
            package = "tensorboardX" if name == "tensorboard" else name.replace("_", "-")
            faults.append(f"report_to: the package of {name} is not installed: pip install {package}")
    if faults:
        raise UserError(faults)


def tell_rates(run: Path, names: Iterable[str], called: str) -> None:
    """Report the rates of each state of a run, at its step of the training, to the trackers that accelerate knows.

    Args:
        run: A run that was evaluated. TensorBoard's files go to `run/train/runs/NAME-rates`.
        names: Of trackers; others than accelerate's get what training logs only.
        called: Name of the run; one there is called `NAME-rates`.

    Raises:
        UserError: A tracker does not take them; says why.
    """
    record = read_run(run)
    last = (provenance.read_json(run / "train" / "summary.json") or {}).get("steps", 0)
    steps = {"final": last} | {f"checkpoint-{step}": step for step in record.checkpoints}
    steps |= {record.before: 0} if record.before else {}
    rates: dict[int, dict[str, float]] = {}
    for state, name, _, judge, measure, value, *_ in rows(record):
        if state in steps and value is not None:
            rates.setdefault(steps[state], {})["/".join(filter(None, (name, judge, measure)))] = value
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        kind = LOGGER_TYPE_TO_CLASS.get(name)
        if kind is None:
            continue
        options = {"logging_dir": run / "train" / "runs"} if kind.requires_logging_directory else {}
        try:
            tracker = kind(f"{called}-rates", **options)
            tracker.start()
            for step, values in sorted(rates.items()):
                tracker.log(values, step=step)
            tracker.finish()
        except Exception as error:  # those of every tracker
            reason = " ".join(str(error).split())
            raise UserError(
                f"report_to: {name} did not take the rates ({type(error).__name__}: {reason:.200}); all files of the "
                "run are whole: put it right and run tasft report again, or leave it out"
            ) from error
