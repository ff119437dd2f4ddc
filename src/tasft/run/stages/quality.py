"""Answers to instructions by one state of the model; a part of the stage evaluate."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasft.core import provenance, ranks
from tasft.core.step import Step
from tasft.evaluate import quality
from tasft.evaluate.references import prompts_of
from tasft.evaluate.settings import Annotator, Quality
from tasft.models.engine import Sampling, collect, replies_in, requests_for
from tasft.run.context import Context


def steps(context: Context, state: str, reads: dict[str, Any]) -> Iterator[Step]:
    """Instructions with reference answers -> `evaluate/STATE/quality/{reference,replies,annotator}`."""
    wanted = context.spec.evaluate.quality
    if wanted is None:
        return
    rows = context.inputs.references
    reads = reads | {"rows": provenance.content_hash([asdict(row) for row in rows])}
    yield _likelihood(context, state, reads)
    if wanted.annotator:
        yield from _comparison(context, state, reads, wanted, wanted.annotator)


def _likelihood(context: Context, state: str, reads: dict[str, Any]) -> Step:
    rows, models = context.inputs.references, context.models
    moved = state not in ("base", context.before)

    def work(folder: Path) -> None:
        before = None
        if moved:
            with models.engine(context.before) as engine:
                before = quality.remember(engine, rows)
        with models.engine(state) as engine:
            quality.measure(engine, rows, folder, context.about, before)

    folder = context.folder / "evaluate" / state / "quality" / "reference"
    return Step(folder, reads | {"before": context.before_reads if moved else None}, work)


def _comparison(
    context: Context, state: str, reads: dict[str, Any], wanted: Quality, annotator: Annotator
) -> Iterator[Step]:
    rows, beside = context.inputs.references, context.folder / "evaluate" / state / "quality"
    drawn = {"max_new_tokens": wanted.max_new_tokens, "seed": context.spec.seed}

    def answer(folder: Path) -> None:
        with context.models.engine(state) as engine:
            asked = requests_for(prompts_of(rows))
            collect(engine, asked, Sampling(**drawn), folder / "replies.jsonl", "quality")

    def annotate(folder: Path) -> None:
        if not ranks.is_first():
            return
        replies = replies_in(beside / "replies" / "replies.jsonl", "quality")
        answers = [replies[row.id] for row in rows]
        quality.annotate(rows, answers, annotator.config, annotator.server, folder, context.about)

    yield Step(beside / "replies", reads | drawn, answer)
    server = annotator.server and annotator.server.model_dump(include={"model", "body"})
    asks: dict[str, Any] = {"annotator": annotator.config, "server": server}
    if files := quality.annotator_files(annotator.config):
        asks["files"] = files
    yield Step(beside / "annotator", reads | drawn | asks, annotate)
