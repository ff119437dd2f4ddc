"""A run as a model card: what the hub shows of a model, with nothing of what it said."""

from collections.abc import Sequence

from tasft.core.text import visible
from tasft.report.blocks import CARD, Document
from tasft.report.markdown import opening, section_lines
from tasft.report.outcomes import headlines
from tasft.report.record import Record
from tasft.report.sources import HUB_NAME, licences_of, on_hub, sources
from tasft.report.text import inline_markdown as text


def model_card(record: Record, report: Document, usage: Sequence[str] = ()) -> str:
    """Markdown with the hub's metadata block: `README.md` of a model, `report/model_card.md` of a run.

    Holds no prompt, reply or avoid row, and of a path only its last part. A licence that the run does not know is
    said to be unknown.

    Args:
        record: Of the run.
        report: Of the same.
        usage: Lines that say how the model is loaded, for a model that needs no adapter; none for the adapter.
    """
    lines = [*opening(report), *usage]
    for section in report.shown(CARD):
        lines += section_lines(section)
    metadata = _metadata(record, is_merged=bool(usage))
    return f"---\n{metadata}\n---\n\n# {text(record.name)}\n\n" + "\n".join(lines)


def plain_card(base: str, usage: Sequence[str]) -> str:
    """The card of an adapter that was merged into a model and that no run knows: nothing was measured."""
    from huggingface_hub import ModelCardData

    named = base if HUB_NAME.fullmatch(base) else None
    data = ModelCardData(base_model=named, library_name="transformers", pipeline_tag="text-generation", tags=["tasft"])
    sentence = f"An adapter, merged into {text(named or base.rpartition('/')[2])}. It was not measured."
    return f"---\n{data.to_yaml()}\n---\n\n# A merged model\n\n{sentence}\n\n" + "\n".join(usage)


def _metadata(record: Record, *, is_merged: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # takes half a second

    base = str(record.field("model.base") or "")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=visible(prompts.name),
            dataset_name=visible(prompts.title),
            metric_type=row.measure,
            metric_name=f"{row.label}, judged by {visible(row.judges[0])}",
            metric_value=row.value("final"),
        )
        for prompts, row in headlines(record)
        if row.value("final") is not None
    ]
    data = ModelCardData(
        base_model=base if HUB_NAME.fullmatch(base) else None,
        datasets=sorted({name for name in map(on_hub, sources(record).values()) if name}) or None,
        eval_results=results or None,
        library_name="peft" if record.field("model.lora") and not is_merged else "transformers",
        license=licences_of(record).get("model.base", "").lower() or None,
        model_name=visible(record.name),
        pipeline_tag="text-generation",
        tags=["tasft", "safety"],
    )
    return str(data.to_yaml())
