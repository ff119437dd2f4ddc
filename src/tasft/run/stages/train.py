"""The training that makes the model safe, in one go or in rounds."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tasft.core import provenance, ranks
from tasft.core.step import Step, done_key
from tasft.data.rows import Example, read_examples
from tasft.harvest.rounds import chosen, heavier, look
from tasft.judges.judging import rules
from tasft.models.engine import Sampling
from tasft.run import training
from tasft.run.context import Context
from tasft.run.stages import harvest
from tasft.train.baselines import safe_instead
from tasft.train.penalties import own_penalty
from tasft.train.settings import NO_MATTER


def steps(context: Context) -> Iterator[Step]:
    """Harvested rows, data.imitate and data.safe_responses -> `train/adapter` or `train/model`.

    Of several rounds the earlier ones fill `rounds/N/train/adapter`, and the look at what each has learned
    `rounds/N/look`, whose rows the later ones learn too.
    """
    spec = context.spec.train.heeded()
    reads = context.training_reads | {
        "start": context.before_reads if spec.start == "sft" else None,
        "train": spec.model_dump(exclude=NO_MATTER),
        "rows": {path.name: provenance.file_hash(path) for path in harvest.files(context)},
    }
    if spec.own_penalty:
        reads["own_penalty"] = own_penalty(spec.own_penalty).version
    if context.inputs.safe:
        reads["safe"] = provenance.content_hash([row.row() for row in context.inputs.safe])
    count = spec.rounds.count if spec.rounds else 1
    for number in range(1, count):
        folder = _round(context, number)
        # A round goes on from the one before, whose look it reads.
        reads_now = reads | {"round": number, "look": done_key(_round(context, number - 1) / "look")}
        yield Step(folder / "train", reads_now, partial(_train, context, number))
        yield _look(context, number, reads_now)
    if count > 1:
        reads |= {"look": done_key(_round(context, count - 1) / "look")}
    yield Step(context.folder / "train", reads, partial(_train, context, count))


def rows_of(context: Context, number: int = 1) -> list[Example]:
    """All rows that a round is trained on."""
    harvested = _rows(harvest.files(context))
    safe = context.inputs.safe
    if context.spec.replaces:
        safe = safe_instead([row for row in harvested if not row.label], safe)
        harvested = [row for row in harvested if row.label]
    looks = [_round(context, earlier) / "look" for earlier in range(1, number)]
    avoid = _rows([folder / "avoid.jsonl" for folder in looks])
    back = _rows([folder / "imitate.jsonl" for folder in looks])
    return context.inputs.imitate + safe + harvested + avoid + heavier(back, sum(row.retain for row in harvested))


def _round(context: Context, number: int) -> Path:
    return context.folder / "rounds" / str(number)


def _rows(paths: list[Path]) -> list[Example]:
    return [row for path in paths if path.stat().st_size for row in read_examples(path)]


def _train(context: Context, number: int, folder: Path) -> None:
    spec = context.spec.train.heeded()
    rows = rows_of(context, number)
    if ranks.is_first():
        provenance.write_jsonl(folder / "data.jsonl", (row.row() for row in rows))
    before = _round(context, number - 1) / "train" / "adapter" if number > 1 else None
    training.train(context, spec.of_round(number), rows, folder, before, number)


def _look(context: Context, number: int, reads: dict[str, Any]) -> Step:
    spec, drawn = context.spec.train.heeded().rounds, context.spec.harvest
    assert spec is not None
    assert drawn is not None
    judge = context.inputs.judge(drawn.judge)

    def work(folder: Path) -> None:
        seed = context.spec.seed + number
        sampling = Sampling(drawn.max_new_tokens, drawn.temperature, drawn.top_p, seed)
        own = _rows([context.folder / "harvest" / "imitate.jsonl"])
        benign = chosen(own, spec.benign, context.spec.seed, number)
        opened = context.models.opened(f"rounds/{number}/train")
        # The topic of a reply is not looked at: slipping away from it does no harm.
        usual = replace(harvest.usual(context), similarities=None)
        summary = look(
            opened, judge, context.inputs.toxic, benign, sampling, spec.max_new_tokens, folder, usual, number
        )
        toxic, refused = summary["toxic"], summary["benign"]
        context.tell(
            f"train: after round {number} {toxic['harmful']} of {toxic['asked']} toxic prompts are still answered "
            f"harmfully, {refused['refused']} of {refused['asked']} benign ones are refused"
        )

    return Step(_round(context, number) / "look", reads | {"judge": rules(judge)}, work)
