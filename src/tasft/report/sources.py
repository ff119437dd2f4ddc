"""Where a model is from: how it was made, on what data, with which judges, as tables of its card."""

import re
from collections.abc import Mapping
from typing import Any

from tasft.report.blocks import Block, Table
from tasft.report.making import named, sub
from tasft.report.record import Record

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def settings(record: Record) -> list[Block]:
    """How it was made, field by field."""
    imitate, avoid = record.mixed or (None, None)
    fields = {
        "Base model": named(str(record.field("model.base"))),
        "Prompt format": record.field("model.prompt"),
        "LoRA": _lora(record.field("model.lora")),
        "Base weights while training": "4 bits (NF4)" if record.field("model.quantize") == "4bit" else None,
        "Method": record.field("train.method"),
        "Penalty": record.field("train.penalty"),
        "Weight of the penalty": record.field("train.penalty_weight"),
        "Normalisation": record.field("train.normalization"),
        "Sampling": record.field("train.sampling"),
        "Rows to avoid": avoid if avoid is not None else record.rows.get("avoid"),
        "Rows to imitate": imitate,
        "Anchors": record.field("harvest.anchors"),
        "Steps": record.steps or record.field("train.max_steps"),
        "Batch size": record.field("train.batch_size"),
        "Learning rate": record.field("train.learning_rate"),
        "Seed": record.manifest.get("seed", record.field("seed")),
        "Commit of tasft": record.manifest.get("commit"),
    }
    rows = [(name, str(value)) for name, value in fields.items() if value is not None]
    return [Table("How it was made", ("", ""), rows)]


def _lora(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return None
    targets = value.get("target_modules")
    where = f" on {', '.join(map(str, targets))}" if isinstance(targets, list) else ""
    if isinstance(layers := value.get("layers_to_transform"), list):
        where += f" of layers {', '.join(map(str, layers))}"
    return f"rank {value.get('r')}, alpha {value.get('lora_alpha')}, dropout {value.get('lora_dropout')}{where}"


def data(record: Record) -> list[Block]:
    """Each source with its licence and hash."""
    hashes, licences = sub(record.manifest, "hashes"), licences_of(record)
    rows = [
        (
            field,
            named(source),
            licences.get(field, "unknown: read it at the source"),
            hashes.get(field, "unknown"),
        )
        for field, source in sources(record).items()
    ]
    return [Table("Data", ("Field", "Source", "Licence", "Content hash"), rows)] if rows else []


def sources(record: Record) -> dict[str, str]:
    """Each source of the recipe, by its field; the base model too."""
    data, sets = sub(record.recipe, "data"), record.field("evaluate.sets")
    named = {"model.base": record.field("model.base")}
    named |= {f"data.{field}": value for field, value in data.items() if field != "data_dir"}
    named |= {f"evaluate.sets.{name}": value for name, value in (sets if isinstance(sets, Mapping) else {}).items()}
    # What other evaluations read is named by the hashes.
    others = [field for field in sub(record.manifest, "hashes") if field not in named]
    named |= {field: record.field(f"{field}.source") or record.field(field) for field in others}
    sources = {
        field: value.get("source") if isinstance(value, Mapping) else value for field, value in named.items() if value
    }
    return {field: source for field, source in sources.items() if isinstance(source, str)}


def licences_of(record: Record) -> dict[str, str]:
    """Field -> licence of its source, where it is known."""
    return {str(field): str(name) for field, name in sub(record.manifest, "licences").items() if name}


def on_hub(source: str) -> str | None:
    """The name of a source on the hub; None for another."""
    name = re.split(r"[?#]", source.removeprefix("hub:"))[0]
    return name if source.startswith("hub:") and HUB_NAME.fullmatch(name) else None


def judges(record: Record) -> list[Block]:
    """Who judged what."""
    versions, filtering = sub(record.manifest, "judges"), record.harvest.get("judge")
    names = [*record.judges, *([str(filtering)] if filtering and filtering not in record.judges else [])]
    rows = [
        (
            name,
            " and ".join(
                filter(None, ("chose the rows to avoid" * (name == filtering), "evaluates" * (name in record.judges)))
            ),
            str(versions.get(name, "unknown")),
        )
        for name in names
    ]
    head = ("Judge", "What for", "Hash of its model, prompt and threshold")
    return [Table("Judges", head, rows)] if rows else []
