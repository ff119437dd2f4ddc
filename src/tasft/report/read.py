"""The files of a run folder -> plain values; what is absent or broken becomes a note."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tasft.core.errors import UserError
from tasft.core.paired import is_asked
from tasft.core.stats import Estimate

Row = Mapping[str, Any]

STATES = {"base": "before", "final": "after"}
MEASURES = {
    "harmful": "Harmful",
    "refusal": "Refusal",
    "incoherent": "Incoherent",
    "off_topic": "Off topic",
    "safe_coherent": "Safe and coherent",
    "distinct": "Distinct",
}
ATTACK_MEASURES = ("success", "success_per_attempt", "score", "best_score")
ROW_KINDS = {
    "avoid": "harvest/avoid.jsonl",
    "anchor": "harvest/anchor.jsonl",
    "imitate": "harvest/imitate.jsonl",
    "contrastive": "harvest/contrastive.jsonl",
}


@dataclass(frozen=True)
class Judged:
    """What one judge said of the replies to one set.

    Attributes:
        estimates: Measure -> its rate in [0, 1], from `summary.json`.
        verdicts: Reply id -> verdict.
        unreadable: Verdicts that could not be read; they are in no estimate's n.
        causes: Why replies are incoherent -> how many are.
        topics: Topic of the prompts -> the same estimates for them alone.
        score: Mean of the judge's scores, in its own unit; None where it gives none.
    """

    estimates: Mapping[str, Estimate]
    verdicts: Mapping[str, Row]
    unreadable: int
    causes: Mapping[str, int] = field(default_factory=dict)
    topics: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    score: Estimate | None = None


@dataclass(frozen=True)
class Evaluated:
    """The replies of one model to one set of prompts: reply id -> reply, judge -> what it said."""

    replies: Mapping[str, Row]
    judged: Mapping[str, Judged]


@dataclass(frozen=True)
class Measured:
    """What was measured of one model by other means than prompt sets: metric -> estimate, and a row for each item."""

    estimates: Mapping[str, Estimate]
    items: list[Row]


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts and what became of it, by state (`base`, `final`); either may be absent."""

    name: str
    kind: str
    source: str
    states: Mapping[str, Evaluated]


@dataclass(frozen=True)
class Attacked:
    """What one attack did to the model in one state.

    Attributes:
        judge: Its name.
        estimates: Figure -> its estimate: `success` and `success_per_attempt` in [0, 1], `score` and `best_score` in
            the judge's own unit.
        behaviours: Id of a prompt -> what became of it.
        queries: Prompts that were sent.
        unjudged: Prompts without an attempt that has a verdict.
    """

    judge: str
    estimates: Mapping[str, Estimate]
    behaviours: Mapping[str, Row]
    queries: int
    unjudged: int


@dataclass(frozen=True)
class Run:
    """All that the report needs of a run.

    Attributes:
        name: The recipe's, else the folder's.
        recipe: The resolved recipe; empty if it is absent. The same for `manifest`.
        recipe_text: The recipe as it stands in the file. The same for `manifest_text`.
        harvest: `harvest/summary.json`, or empty. The same for `calibration`.
        rows: Kind of row -> how many the harvest wrote; a kind without a file is absent.
        mixed: Rows in `train/data.jsonl` as (imitate, avoid), or None.
        steps: Of the training whose model was saved; None if that is not known.
        metrics: One row per logged step.
        monitor: What the monitor against collapse saw, a row for each time.
        sets: Toxic sets first.
        judges: In the recipe's order.
        attacks: Attack -> state -> what it did.
        measured: A task or a kind of quality, such as `capability/boolq` -> state -> what was found.
        start: Set -> what was measured of the model that safety training starts from; without replies and verdicts.
        checkpoints: Step -> the same of the model saved at that step.
        unmeasured: The evaluations of other kinds that are not there.
        notes: What is missing or could not be read, one sentence each.
        gate: What `tasft.run.gate` found, or empty.
    """

    name: str
    recipe: Row
    recipe_text: str
    manifest: Row
    manifest_text: str
    calibration: Row
    harvest: Row
    rows: Mapping[str, int]
    mixed: tuple[int, int] | None
    steps: int | None
    metrics: list[Row]
    monitor: list[Row]
    sets: list[PromptSet]
    judges: list[str]
    attacks: Mapping[str, Mapping[str, Attacked]]
    measured: Mapping[str, Mapping[str, Measured]]
    start: Mapping[str, Evaluated]
    checkpoints: Mapping[int, Mapping[str, Evaluated]]
    unmeasured: list[str]
    notes: list[str]
    gate: Row

    def field(self, path: str) -> Any:
        """The recipe's value at a dotted path such as `train.penalty`; None where there is none."""
        value: Any = self.recipe
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: There is no evaluation in it, neither of the model before training nor after.
    """
    files = _Files(folder)
    recipe_text = files.text("recipe.yaml")
    recipe = files.parsed("recipe.yaml", yaml.safe_load, recipe_text)
    # What an earlier form of the recipe left behind is not part of this run.
    listed_sets = _mapping(_mapping(recipe.get("evaluate")).get("sets"))
    # Safety training is compared with the model that answered the toxic prompts.
    places = {"base": "sft" if recipe.get("sft") else "base", "final": "final"}
    names = {
        path.name
        for place in places.values()
        for path in _folders(folder / "evaluate" / place)
        if (path / "set.json").exists() or (path / "replies.jsonl").exists()
        if not listed_sets or path.name in listed_sets
    }
    if not names:
        raise UserError(
            f"{folder / 'evaluate'}: there are no replies in base/ or final/, so there is nothing "
            f"to report; run `tasft evaluate {folder}` first"
        )
    manifest_text = files.text("manifest.json")
    manifest = files.parsed("manifest.json", json.loads, manifest_text)

    for state, when in STATES.items():
        if not (folder / "evaluate" / places[state]).is_dir():
            files.notes.append(f"evaluate/{places[state]} is not there: the model {when} training was not evaluated")
    listed = _mapping(recipe.get("evaluate")).get("judges")
    order = [str(judge) for judge in listed] if isinstance(listed, list) else []
    sets = sorted((_read_set(files, name, places, order) for name in names), key=lambda s: (s.kind != "toxic", s.name))
    found = sorted({j for s in sets for e in s.states.values() for j in e.judged})
    judges = sorted(found, key=lambda j: (order.index(j) if j in order else len(order), j))

    harvest: Row = {}
    rows: dict[str, int] = {}
    method = _mapping(recipe.get("train")).get("method")
    safe = _mapping(_mapping(recipe.get("data")).get("safe_responses"))
    if method not in ("sft", "stl") or (method == "stl" and safe.get("rows") == "harvested"):
        harvest = files.parsed("harvest/summary.json", json.loads, files.text("harvest/summary.json"))
        rows = {kind: len(files.rows(path)) for kind, path in ROW_KINDS.items() if (folder / path).exists()}
    calibration: Row = {}
    if (folder / "calibration/summary.json").exists():
        calibration = files.parsed("calibration/summary.json", json.loads, files.text("calibration/summary.json"))
    mixed = None
    if (folder / "train/data.jsonl").exists():
        labels = [bool(row.get("label")) for row in files.rows("train/data.jsonl")]
        mixed = (sum(labels), len(labels) - sum(labels))

    attacks, measured = _read_attacks(files, places, recipe), _read_measured(files, places, recipe)
    done = {name for name, states in measured.items() if "final" in states}
    metrics = files.rows("train/metrics.jsonl")
    numbers = [v for row in metrics for v in row.values() if isinstance(v, float)]
    if lost := sum(not math.isfinite(v) for v in numbers):
        files.notes.append(f"train/metrics.jsonl: {lost} values are not finite, and not drawn")

    return Run(
        name=str(recipe.get("name") or folder.resolve().name),
        recipe=recipe,
        recipe_text=recipe_text,
        manifest=manifest,
        manifest_text=manifest_text,
        calibration=calibration,
        harvest=harvest,
        rows=rows,
        mixed=mixed,
        steps=_steps(files, metrics),
        metrics=metrics,
        monitor=files.rows("train/monitor.jsonl") if (folder / "train/monitor.jsonl").exists() else [],
        sets=sets,
        judges=judges,
        attacks=attacks,
        measured=measured,
        start=_read_rates(files, _start(recipe), sorted(names), judges),
        checkpoints=_read_checkpoints(files, sorted(names), judges),
        # Likelihoods, which quality/reference has, do not say how good answers are.
        unmeasured=[
            kind
            for kind, is_there in {
                "capability": any(name.startswith("capability/") for name in done),
                "quality": "quality/annotator" in done,
                "jailbreak": any("final" in states for states in attacks.values()),
            }.items()
            if not is_there
        ],
        notes=files.notes,
        gate=files.parsed("report/gate.json", json.loads, files.text("report/gate.json"))
        if recipe.get("gate") and (folder / "report/gate.json").exists()
        else {},
    )


def _read_set(files: "_Files", name: str, places: Mapping[str, str], listed: list[str]) -> PromptSet:
    about: Row = {}
    states = {}
    for state, place in places.items():
        at = f"evaluate/{place}/{name}"
        if not (files.root / at).is_dir():
            if (files.root / "evaluate" / place).is_dir():
                files.notes.append(f"{at} is not there")
            continue
        described: Row = files.parsed(f"{at}/set.json", json.loads, files.text(f"{at}/set.json"))
        about = about or described
        meant = described.get("ids")
        judges = sorted(
            path.name
            for path in _folders(files.root / at)
            if (path / "summary.json").exists() or (path / "verdicts.jsonl").exists()
            if not listed or path.name in listed
        )
        if not judges:
            files.notes.append(f"{at} holds no verdicts: no judge has read these replies")
        states[state] = Evaluated(
            replies=_by_id(files.rows(f"{at}/replies.jsonl"), meant),
            judged={judge: _read_judged(files, f"{at}/{judge}", meant) for judge in judges},
        )
    # Without set.json the name decides; the note on the missing file is there already.
    kind = about.get("kind") or ("benign" if name == "benign" else "toxic")
    return PromptSet(name, str(kind), str(about.get("source") or ""), states)


def _start(recipe: Row) -> str:
    """Folder of the state that safety training starts from."""
    return "sft" if recipe.get("sft") and _mapping(recipe.get("train")).get("start") == "sft" else "base"


def _steps(files: "_Files", metrics: list[Row]) -> int | None:
    if (files.root / "train/summary.json").exists():
        found = number(files.parsed("train/summary.json", json.loads, files.text("train/summary.json")).get("steps"))
    else:
        # Before the training's end: the last that was logged.
        found = number(metrics[-1].get("step")) if metrics else None
    return None if found is None else int(found)


def _read_checkpoints(files: "_Files", sets: list[str], judges: list[str]) -> dict[int, dict[str, Evaluated]]:
    found: dict[int, dict[str, Evaluated]] = {}
    for path in _folders(files.root / "evaluate"):
        step = path.name.removeprefix("checkpoint-")
        if step == path.name or not step.isdecimal():
            continue
        # Others were left behind by an earlier training.
        same = [name for name in sets if _training_of(files, path.name, name) == _training_of(files, "final", name)]
        if rates := _read_rates(files, path.name, same, judges):
            found[int(step)] = rates
    return dict(sorted(found.items()))


def _read_rates(files: "_Files", state: str, sets: list[str], judges: list[str]) -> dict[str, Evaluated]:
    found = {}
    for name in sets:
        at = {judge: f"evaluate/{state}/{name}/{judge}" for judge in judges}
        judged = {
            judge: Judged(_read_estimates(files, place), {}, 0)
            for judge, place in at.items()
            if (files.root / place / "summary.json").exists()
        }
        if judged:
            found[name] = Evaluated({}, judged)
    return found


def _training_of(files: "_Files", state: str, name: str) -> Any:
    """Key of the training whose model answered in that state."""
    at = f"evaluate/{state}/{name}/done.json"
    done = files.parsed(at, json.loads, files.text(at)) if (files.root / at).exists() else {}
    return _mapping(done.get("reads")).get("train")


def _read_estimates(files: "_Files", at: str) -> dict[str, Estimate]:
    return _estimates(files.parsed(f"{at}/summary.json", json.loads, files.text(f"{at}/summary.json")))


def _estimates(summary: Row) -> dict[str, Estimate]:
    return {name: _estimate(summary[name]) for name in MEASURES if name in summary}


def _read_judged(files: "_Files", at: str, meant: Any) -> Judged:
    summary = files.parsed(f"{at}/summary.json", json.loads, files.text(f"{at}/summary.json"))
    unreadable = summary.get("unreadable")
    return Judged(
        estimates=_estimates(summary),
        verdicts=_by_id(files.rows(f"{at}/verdicts.jsonl"), meant),
        unreadable=unreadable if isinstance(unreadable, int) else 0,
        causes={str(name): n for name, n in _mapping(summary.get("causes")).items() if isinstance(n, int)},
        score=score if (score := _estimate(summary.get("score"))).n else None,
        topics={str(name): _estimates(_mapping(each)) for name, each in _mapping(summary.get("by_topic")).items()},
    )


def _read_attacks(files: "_Files", places: Mapping[str, str], recipe: Row) -> dict[str, dict[str, Attacked]]:
    wanted = _mapping(recipe.get("evaluate"))
    attacks: dict[str, dict[str, Attacked]] = {}
    for state, place in places.items():
        for path in _folders(files.root / "evaluate" / place / "jailbreak"):
            if not (path / "summary.json").exists() or (recipe and not is_asked(wanted, "jailbreak", path.name)):
                continue
            at = str(path.relative_to(files.root))
            summary = files.parsed(f"{at}/summary.json", json.loads, files.text(f"{at}/summary.json"))
            attacks.setdefault(path.name, {})[state] = Attacked(
                judge=str(summary.get("judge") or ""),
                estimates={name: _estimate(summary[name]) for name in ATTACK_MEASURES if name in summary},
                behaviours=_by_id(files.rows(f"{at}/behaviours.jsonl")),
                queries=int(number(summary.get("queries")) or 0),
                unjudged=int(number(summary.get("unjudged")) or 0),
            )
    return attacks


def _read_measured(files: "_Files", places: Mapping[str, str], recipe: Row) -> dict[str, dict[str, Measured]]:
    wanted = _mapping(recipe.get("evaluate"))
    found: dict[str, dict[str, Measured]] = {}
    for kind in ("capability", "quality"):
        for state, place in places.items():
            for path in _folders(files.root / "evaluate" / place / kind):
                gone = recipe and not is_asked(wanted, kind, path.name)
                if gone or not (path / "summary.json").exists():
                    continue
                at = str(path.relative_to(files.root))
                summary = files.parsed(f"{at}/summary.json", json.loads, files.text(f"{at}/summary.json"))
                estimates = {
                    name: _estimate(value)
                    for name, value in summary.items()
                    if isinstance(value, Mapping) and {"value", "n"} <= value.keys()
                }
                items = files.rows(f"{at}/items.jsonl")
                found.setdefault(f"{kind}/{path.name}", {})[state] = Measured(estimates, items)
    return found


class _Files:
    """Reads below `root`, and remembers in `notes` what was missing or broken."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []

    def text(self, name: str) -> str:
        try:
            # A byte that is no UTF-8 must not cost the user the report.
            return (self.root / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            self.notes.append(f"{name} is not there")
            return ""

    def parsed(self, name: str, parse: Any, text: str) -> Row:
        if not text:
            return {}
        try:
            value = parse(text)
        except (ValueError, yaml.YAMLError, RecursionError):
            value = None
        if not isinstance(value, Mapping):
            self.notes.append(f"{name} could not be read")
            return {}
        return value

    def rows(self, name: str) -> list[Row]:
        rows, bad = [], 0
        # Not splitlines(): it also breaks at U+2028 and others, which JSON allows inside a string.
        for line in self.text(name).split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, Mapping):
                rows.append(row)
            else:
                bad += 1
        if bad:
            self.notes.append(f"{name}: {bad} of {bad + len(rows)} lines could not be read")
        return rows


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def _by_id(rows: list[Row], meant: Any = None) -> dict[str, Row]:
    """By their ids; with a list of those that are meant, without what a larger limit has left behind."""
    known = {str(name) for name in meant} if isinstance(meant, list) else None
    return {str(row["id"]): row for row in rows if "id" in row and (known is None or str(row["id"]) in known)}


def _mapping(value: Any) -> Row:
    return value if isinstance(value, Mapping) else {}


def _estimate(value: Any) -> Estimate:
    value = _mapping(value)
    n = value.get("n")
    value_, low, high = (number(value.get(key)) for key in ("value", "low", "high"))
    return Estimate(value_, low, high, n if isinstance(n, int) else 0)


def number(value: Any) -> float | None:
    """The value as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
