"""What was done to a model, from the recipe and the files of its run, in words."""

from pathlib import PurePath
from typing import Any

from tasft.core.measures import HEADLINES
from tasft.core.names import MEASURED_JUDGES
from tasft.report.files import Row
from tasft.report.outcomes import listed
from tasft.report.record import Record


def done(record: Record) -> list[str]:
    """What was done, in a few sentences, from the files."""
    if not record.is_run:
        return []
    return [part for part in (_sft(record), _method(record), _data(record), _training(record)) if part]


def _sft(record: Record) -> str:
    """That an SFT model came first, and what it is for."""
    if not record.field("sft"):
        return ""
    steps, epochs = record.field("sft.max_steps"), record.field("sft.epochs")
    length = _count(steps, "step") if steps is not None else _count(epochs, "epoch") if epochs is not None else ""
    imitate = record.field("data.imitate")
    parts = [entry.get("source") for entry in (imitate if isinstance(imitate, list) else [imitate]) if entry]
    rows = " and ".join(named(str(part)) for part in parts) or "rows to imitate"
    start = "went on from it" if record.field("train.start") == "sft" else "started from the base model again"
    return (
        f"First an SFT model was made{f' in {length}' if length else ''} on {rows}: the harmful answers are its own, "
        f"changes are counted from it, and the safety training {start}."
    )


def _method(record: Record) -> str:
    method, penalty = record.field("train.method"), record.field("train.penalty")
    base = record.field("model.base")
    model = named(str(base)) if base else "A model that the recipe does not name"
    if method is None:
        return f"{model} was tuned; the recipe, which says how, is not there."
    if method == "tasft" and penalty in (None, "none"):
        how = "tasft without a penalty, the control: imitate rows and anchors only"
    elif method == "tasft":
        weight = record.field("train.penalty_weight")
        how = (
            "tasft: it imitates good answers and is pushed away from harmful ones by the penalty "
            f"{penalty}, weight {weight}"
        )
    elif method == "sft":
        how = "plain supervised fine-tuning (sft), with no row to avoid"
    elif method == "stl":
        rows = record.field("data.safe_responses.rows")
        to = "the prompts whose harmful answers the harvest kept" if rows == "harvested" else "toxic prompts"
        count = _count(rows, "safe response") if isinstance(rows, int) else "safe responses"
        how = f"fine-tuning on {count} to {to} besides the rows to imitate (stl), with no row to avoid"
    elif method == "kto":
        reference = "the SFT model" if record.field("train.start") == "sft" else "the untrained model"
        how = (
            "KTO: rows to avoid are undesirable, all others desirable, measured against "
            f"{reference} with beta {record.field('train.beta')}"
        )
    else:
        how = f"the method {method}"
    return f"{model} was tuned by {how}."


def named(source: str) -> str:
    """A model or a source as others may see it: where it lay on somebody's disk is nobody else's business."""
    path = PurePath(source)
    return path.name if path.is_absolute() or source.startswith(("~", "..")) else source


def _data(record: Record) -> str:
    parts = []
    for kind, count in record.rows.items():
        if not count and kind != "avoid":
            continue
        detail = {
            "avoid": _kept(record.harvest, "harmful, coherent answers of its own"),
            "anchor": _kept(sub(record.harvest, "anchors"), str(record.field("harvest.anchors") or "")),
            "imitate": _kept(sub(record.harvest, "imitate"), "its own answers to benign prompts"),
            "contrastive": _kept(sub(record.harvest, "contrastive"), "answers to prompts that only seem toxic"),
        }[kind]
        parts.append(f"{_count(count, kind + ' row')}{f' ({detail})' if detail else ''}")
    clauses = []
    if parts:
        clauses.append(f"The harvest gave {listed(parts)}")
    if record.mixed:
        imitate, avoid = record.mixed
        clauses.append(f"training drew on {imitate:,} imitate and {avoid:,} avoid rows")
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _kept(harvest: Row, what: str) -> str:
    tried = harvest.get("tried")
    return ", ".join(filter(None, (what, f"{tried} tried" if tried is not None else "")))


def _training(record: Record) -> str:
    steps = record.steps or record.field("train.max_steps")
    clauses = []
    if steps is not None:
        rate = record.field("train.learning_rate")
        at = f" at learning rate {rate}" if rate is not None else ""
        clauses.append(f"training took {_count(steps, 'step')}{at}")
    asked = [
        f"{max(len(evaluated.replies) for evaluated in prompts.states.values()):,} {prompts.title}"
        for prompts in record.sets
        if prompts.states
    ]
    if asked:
        who = listed(f"the {title}" for title in record.states.values())
        by = f", judged by {listed(record.judges)}" if record.judges else ""
        clauses.append(f"{who} answered {listed(asked)}{by}")
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def unmeasured(record: Record) -> list[str]:
    """What this report cannot say."""
    words = {
        "capability": "General ability on benchmark tasks",
        "quality": "The quality of benign answers beyond coherence and refusal",
        "jailbreak": "Resistance to jailbreak attacks",
    }
    kinds = {prompts.kind for prompts in record.sets}
    seed = record.manifest.get("seed", record.recipe.get("seed"))
    return [
        *(
            f"{'Safety: no toxic' if kind == 'toxic' else 'Over-refusal: no benign'} prompts were put to the model"
            for kind in HEADLINES
            if kind not in kinds
        ),
        *(words[kind] for kind in record.unmeasured),
        "Conversations of more than one turn, and other languages",
        *([f"The spread between training seeds: this is one run{_of_seed(seed)}"] if record.is_run else []),
        *([] if _finds_off_topic(record) else ["Whether replies are about what was asked"]),
        _errors_of_judges(record),
    ]


def _errors_of_judges(record: Record) -> str:
    """Which judges were never measured on labelled replies of this model, and what is known of them on others."""
    base = str(record.field("model.base") or "").lower()
    # What was fitted to labels of yours is known to you.
    judges = [judge for judge in record.judges if not record.field(f"judges.{judge}.calibration")]
    kinds = {judge: str(record.field(f"judges.{judge}.kind") or judge) for judge in judges}
    known = {judge: MEASURED_JUDGES[kind] for judge, kind in kinds.items() if kind in MEASURED_JUDGES}
    strange = [judge for judge in judges if judge not in known or known[judge].model not in base]
    sentence = "How often the judges are wrong on these replies, which no person has labelled"
    if strange and base:
        sentence += (
            f"; {listed(strange)} {'was' if len(strange) == 1 else 'were'} never measured on replies of this model"
        )
    return sentence + "".join(
        f"; on {tested.n:,} labelled replies of {tested.words} {judge} had a precision of {tested.precision:.2f} and a "
        f"recall of {tested.recall:.2f} for harm"
        for judge, tested in known.items()
    )


def _finds_off_topic(record: Record) -> bool:
    return any(
        estimate.n
        for prompts in record.sets
        for evaluated in prompts.states.values()
        for judged in evaluated.judged.values()
        if (estimate := judged.estimates.get("off_topic"))
    )


def _of_seed(seed: Any) -> str:
    return f", seed {seed}" if seed is not None else ""


def harvest_rows(record: Record) -> list[tuple[str, str]]:
    """The harvest's summary as rows of a two-column table."""
    harvest = record.harvest
    rows = [
        ("Answers tried", harvest.get("tried")),
        ("Kept as avoid rows", harvest.get("kept")),
        *((f"Left out: {reason}", count) for reason, count in sub(harvest, "reasons").items()),
        ("Judge", harvest.get("judge")),
        (
            "Loss above which a reply is incoherent, nats",
            record.calibration.get("loss_limit_nats") if harvest else None,
        ),
    ]
    parts = {
        "anchors": "Anchor rows",
        "imitate": "Own imitate rows",
        "contrastive": "Contrastive rows",
    }
    for key, label in parts.items():
        part = sub(harvest, key)
        if not part.get("tried"):
            continue
        mode = f", {part['mode']}" if part.get("mode") else ""
        rows.append((f"{label}{mode}: tried", part.get("tried")))
        rows.append((f"{label}{mode}: kept", part.get("kept")))
        for reason, count in sub(part, "reasons").items():
            rows.append((f"{label}{mode}: left out, {reason}", count))
    return [(label, _number(value)) for label, value in rows if value is not None]


def stage_times(record: Record) -> str:
    """How long each stage took, from the manifest, in one line; empty where nothing is known."""
    times: dict[str, float] = {}
    for step, entry in sub(record.manifest, "stages").items():
        seconds = entry.get("seconds") if isinstance(entry, dict) else None
        if isinstance(seconds, int | float):
            stage = str(step).partition("/")[0]
            times[stage] = times.get(stage, 0.0) + seconds
    return ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in times.items())


def sub(row: Row, key: str) -> Row:
    """The mapping at a key; empty where there is none."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _count(count: Any, noun: str) -> str:
    return f"{_number(count)} {noun}{'' if count == 1 else 's'}"
