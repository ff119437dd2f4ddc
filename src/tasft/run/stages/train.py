"""The training that makes the model safe."""

from collections.abc import Iterator
from pathlib import Path

from tasft.core import provenance, ranks
from tasft.core.step import Step
from tasft.data.rows import Example, read_examples
from tasft.run import training
from tasft.run.context import Context
from tasft.run.stages import harvest
from tasft.train.baselines import safe_instead


def steps(context: Context) -> Iterator[Step]:
    """Harvested rows, data.imitate and data.safe_responses -> `train/adapter` or `train/model`."""
    spec = context.spec.train
    reads = context.training_reads | {
        "start": context.before_reads if spec.start == "sft" else None,
        "train": spec.model_dump(exclude={"save_steps"}),
        "rows": {path.name: provenance.file_hash(path) for path in harvest.files(context)},
    }
    if context.inputs.safe:
        reads["safe"] = provenance.content_hash([row.row() for row in context.inputs.safe])

    def work(folder: Path) -> None:
        rows = rows_of(context)
        if ranks.is_first():
            provenance.write_jsonl(folder / "data.jsonl", (row.row() for row in rows))
        training.train(context, spec, rows, folder)

    yield Step(context.folder / "train", reads, work)


def rows_of(context: Context) -> list[Example]:
    """All rows that it is trained on."""
    paths = [path for path in harvest.files(context) if path.stat().st_size]
    harvested = [row for path in paths for row in read_examples(str(path))]
    safe = context.inputs.safe
    if context.spec.replaces:
        safe = safe_instead([row for row in harvested if not row.label], safe)
        harvested = [row for row in harvested if row.label]
    return context.inputs.imitate + safe + harvested
