"""The model's own answers, calibrated and judged, as rows to train on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tasft.core.errors import UserError
from tasft.core.step import Step
from tasft.data.rows import prompts_hash
from tasft.harvest import harvest
from tasft.harvest.anchors import own_anchors
from tasft.judges.calibration import calibrate, can_calibrate, limit_of
from tasft.judges.judging import Usual, noted, rules, topic_measure
from tasft.models.engine import Engine
from tasft.models.own import decided_by, engine_of
from tasft.models.server_settings import PythonEngine, Server
from tasft.run.context import Context
from tasft.run.recipe import Harvest


def steps(context: Context) -> Iterator[Step]:
    """Benign prompts -> `calibration`, whatever the method; toxic and benign prompts -> `harvest/*.jsonl`."""
    yield from _calibration(context)
    spec = context.spec.harvest
    if not context.spec.harvests or spec is None:
        return
    prompts = [prompts_hash(part) for part in (context.inputs.toxic, context.inputs.benign)]
    drawn = {
        name: getattr(spec, name) for name in ("samples", "temperature", "top_p", "max_new_tokens", "benign_tokens")
    }
    keeps = context.before_reads | {"draw": drawn, "engine": decided_by(spec.engine), "prompts": prompts}
    if spec.contrastive and spec.contrastive.engine:
        keeps["writer"] = decided_by(spec.contrastive.engine)
    reads = keeps | {"harvest": spec.model_dump(), "judge": rules(context.inputs.judge(spec.judge))}
    if spec.own_anchors:
        reads["own_anchors"] = own_anchors(spec.own_anchors).version

    def work(folder: Path) -> None:
        _harvest(context, spec, folder)

    yield Step(context.folder / "harvest", reads, work, keeps)


def files(context: Context) -> list[Path]:
    """The rows of the harvest that training uses."""
    names = ("avoid", "anchor", "imitate", "contrastive") if context.spec.harvests else ()
    # Where safe responses take the place of the rows to avoid, they take that of anchors too.
    left_out = "anchor" if context.spec.replaces else None
    return [context.folder / "harvest" / f"{name}.jsonl" for name in names if name != left_out]


def usual(context: Context) -> Usual:
    """What replies are held to besides their text."""
    limit = limit_of(context.folder / "calibration") if can_calibrate(context.inputs.benign) else None
    losses = partial(context.models.mean_losses, context.before)
    return Usual(limit, losses, topic_measure(), context.before_reads)


def _calibration(context: Context) -> Iterator[Step]:
    benign = context.inputs.benign
    if not can_calibrate(benign):
        return

    def work(folder: Path) -> None:
        with context.models.engine(context.before) as engine:
            calibrate(engine, noted(engine.mean_losses), benign, context.spec.seed, folder)

    reads = context.before_reads | {"prompts": prompts_hash(benign)}
    yield Step(context.folder / "calibration", reads, work)


def _harvest(context: Context, spec: Harvest, folder: Path) -> None:
    server = spec.contrastive and spec.contrastive.engine
    writer = engine_of(server) if server else None
    judge, toxic, benign = context.inputs.judge(spec.judge), context.inputs.toxic, context.inputs.benign
    with _answering(context, spec.engine) as (engine, held_to):
        seed = context.spec.seed
        summary = harvest.harvest(engine, judge, toxic, benign, spec, folder, held_to, writer, seed)
    context.tell(f"harvest: {harvest.statement(summary)}")
    if not summary["kept"]:
        raise UserError(
            f"{folder}: none of {summary['tried']} answers was harmful and coherent ({summary['reasons']}): "
            "there is nothing to move away from; give other data.toxic_prompts, more harvest.samples, or "
            "another judge"
        )


@contextmanager
def _answering(context: Context, server: Server | PythonEngine | None) -> Iterator[tuple[Engine, Usual]]:
    """Who answers for the model that is to be made safe, and what its replies are held to besides their text.

    Their topic is not looked at: slipping away from it is what penalties do, and no penalty is at work yet.
    """
    held_to = replace(usual(context), similarities=None)
    if server is not None:
        # It serves that model by the user's word, and gives no losses of text that it is shown.
        yield engine_of(server, context.spec.model.prompt), replace(held_to, losses=None)
        return
    with context.models.engine(context.before) as engine:
        yield engine, replace(held_to, losses=noted(engine.mean_losses))
