"""A run's facts as a model card: what the hub shows of a model, with nothing of what it said."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasft.core.text import visible
from tasft.report import facts, tasks
from tasft.report.facts import Headlines, Tables
from tasft.report.read import Run
from tasft.report.text import inline_markdown as text
from tasft.report.text import markdown_table

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_INTENDED = (
    "Meant for research on safety in fine-tuning, and as a starting point for what you will evaluate yourself, on your "
    "own prompts and with your own judge. The base model's licence and terms hold for this model too.",
    "Not meant as the only safeguard of anything that people use. It was trained away from some harmful answers of its "
    "own: it can still give others, and what it refuses it may refuse for the wrong reason.",
)


def model_card(run: Run, tables: Tables, heads: Headlines, usage: Sequence[str] = ()) -> str:
    """Markdown with the hub's metadata block: `README.md` of a model, `report/model_card.md` of a run.

    Holds no prompt, reply or avoid row, and of a path only its last part. A licence that the run does not know is
    said to be unknown.

    Args:
        run: The run.
        tables: Of it.
        heads: Of it.
        usage: Lines that say how the model is loaded, for a model that needs no adapter; none for the adapter.
    """
    parts = (
        _outcome(run, tables, heads),
        usage,
        _making(run),
        _data(run),
        _evaluation(run, heads),
        _attacks(run),
        _measured(run),
        _judges(run),
        _gaps(run),
        _use(),
    )
    lines = [line for part in parts for line in part]
    metadata = _metadata(run, heads, is_merged=bool(usage))
    return f"---\n{metadata}\n---\n\n# {text(run.name)}\n\n" + "\n".join(lines)


def _metadata(run: Run, heads: Headlines, *, is_merged: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # takes half a second

    base = str(run.field("model.base") or "")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=visible(prompts.name),
            dataset_name=visible(facts.title_of(prompts)),
            metric_type=row.measure,
            metric_name=f"{row.label}, judged by {visible(row.judges[0])}",
            metric_value=row.after.value,
        )
        for prompts, row in heads
        if row.after and row.after.value is not None
    ]
    found = ModelCardData(
        base_model=base if _HUB_NAME.fullmatch(base) else None,
        datasets=sorted({name for name in map(_on_hub, _sources(run).values()) if name}) or None,
        eval_results=results or None,
        library_name="peft" if run.field("model.lora") and not is_merged else "transformers",
        license=_licences(run).get("model.base", "").lower() or None,
        model_name=visible(run.name),
        pipeline_tag="text-generation",
        tags=["tasft", "safety"],
    )
    return str(found.to_yaml())


def _outcome(run: Run, tables: Tables, heads: Headlines) -> list[str]:
    return [text(facts.verdict(run, heads)), "", *(f"> {text(said)}\n" for said in facts.warnings(run, tables))]


def _making(run: Run) -> list[str]:
    imitate, avoid = run.mixed or (None, None)
    settings = {
        "Base model": facts.named(str(run.field("model.base"))),
        "Prompt format": run.field("model.prompt"),
        "LoRA": _lora(run.field("model.lora")),
        "Base weights while training": "4 bits (NF4)" if run.field("model.quantize") == "4bit" else None,
        "Method": run.field("train.method"),
        "Penalty": run.field("train.penalty"),
        "Weight of the penalty": run.field("train.penalty_weight"),
        "Normalisation": run.field("train.normalization"),
        "Sampling": run.field("train.sampling"),
        "Rows to avoid": avoid if avoid is not None else run.rows.get("avoid"),
        "Rows to imitate": imitate,
        "Anchors": run.field("harvest.anchors"),
        "Steps": run.steps or run.field("train.max_steps"),
        "Batch size": run.field("train.batch_size"),
        "Learning rate": run.field("train.learning_rate"),
        "Seed": run.manifest.get("seed", run.field("seed")),
        "Commit of tasft": run.manifest.get("commit"),
    }
    rows = [(name, str(value)) for name, value in settings.items() if value is not None]
    return ["## How it was made", "", *map(text, facts.done(run)), "", *markdown_table(("", ""), rows)]


def _lora(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return None
    targets = value.get("target_modules")
    where = f" on {', '.join(map(str, targets))}" if isinstance(targets, list) else ""
    return f"rank {value.get('r')}, alpha {value.get('lora_alpha')}, dropout {value.get('lora_dropout')}{where}"


def _data(run: Run) -> list[str]:
    hashes, licences = facts.sub(run.manifest, "hashes"), _licences(run)
    rows = [
        (
            field,
            facts.named(source),
            licences.get(field, "unknown: read it at the source"),
            hashes.get(field, "unknown"),
        )
        for field, source in _sources(run).items()
    ]
    return ["## Data", "", *markdown_table(("field", "source", "licence", "content hash"), rows)] if rows else []


def _sources(run: Run) -> dict[str, str]:
    """Each source of the recipe, by its field; the base model too."""
    data, sets = facts.sub(run.recipe, "data"), run.field("evaluate.sets")
    named = {"model.base": run.field("model.base")}
    named |= {f"data.{field}": value for field, value in data.items() if field != "data_dir"}
    named |= {f"evaluate.sets.{name}": value for name, value in (sets if isinstance(sets, Mapping) else {}).items()}
    # What other evaluations read is named by the hashes.
    others = [field for field in facts.sub(run.manifest, "hashes") if field not in named]
    named |= {field: run.field(f"{field}.source") or run.field(field) for field in others}
    sources = {
        field: value.get("source") if isinstance(value, Mapping) else value for field, value in named.items() if value
    }
    return {field: source for field, source in sources.items() if isinstance(source, str)}


def _licences(run: Run) -> dict[str, str]:
    return {str(field): str(name) for field, name in facts.sub(run.manifest, "licences").items() if name}


def _on_hub(source: str) -> str | None:
    name = re.split(r"[?#]", source.removeprefix("hub:"))[0]
    return name if source.startswith("hub:") and _HUB_NAME.fullmatch(name) else None


def _evaluation(run: Run, heads: Headlines) -> list[str]:
    head = ("measure", "on", "before", "after", "change", "")
    rows = [
        (
            row.label,
            facts.title_of(prompts),
            facts.in_words(row.before) if row.before else "—",
            facts.in_words(row.after) if row.after else "—",
            facts.in_words(row.change, signed=True) if row.change else "—",
            row.verdict,
        )
        for prompts, row in heads
    ]
    said = (
        "In brackets: 95% intervals, Wilson's for a rate, paired bootstrap on the same prompts for a change. Replies "
        f"are greedy, of at most {run.field('evaluate.max_new_tokens')} tokens."
    )
    return ["## Evaluation", "", *markdown_table(head, rows), said, ""] if rows else []


def _attacks(run: Run) -> list[str]:
    rows = facts.attack_rows(run)
    return ["## Jailbreak attacks", "", *markdown_table(facts.ATTACK_COLUMNS, rows)] if rows else []


def _measured(run: Run) -> list[str]:
    rows = tasks.task_rows(run)
    return ["## Capability and quality", "", *markdown_table(tasks.TASK_COLUMNS, rows), tasks.NOTE, ""] if rows else []


def _judges(run: Run) -> list[str]:
    versions, filtering = facts.sub(run.manifest, "judges"), run.harvest.get("judge")
    names = [*run.judges, *([str(filtering)] if filtering and filtering not in run.judges else [])]
    rows = [
        (
            name,
            " and ".join(
                filter(None, ("chose the rows to avoid" * (name == filtering), "evaluates" * (name in run.judges)))
            ),
            str(versions.get(name, "unknown")),
        )
        for name in names
    ]
    head = ("judge", "what for", "hash of its model, prompt and threshold")
    return ["## Judges", "", *markdown_table(head, rows)] if rows else []


def _gaps(run: Run) -> list[str]:
    return ["## What was not measured", "", *(f"- {text(gap)}" for gap in facts.unmeasured(run)), ""]


def _use() -> list[str]:
    return ["## Intended use", "", *(f"{sentence}\n" for sentence in _INTENDED)]
