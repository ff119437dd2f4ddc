"""The files of a run, of a model alone, or of several of these -> a record of what was measured."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tasft.core.errors import UserError
from tasft.core.measures import MEASURES
from tasft.core.paired import is_asked
from tasft.core.stats import Estimate
from tasft.core.step import OUTLIVED, outlived
from tasft.report.files import Files, Row, by_id, estimate_of, mapping, number
from tasft.report.record import TITLES, Attacked, Evaluated, Judged, Measured, Record, SetRecord

ATTACK_MEASURES = ("success", "success_per_attempt", "score", "best_score")
ROW_KINDS = {
    "avoid": "harvest/avoid.jsonl",
    "anchor": "harvest/anchor.jsonl",
    "imitate": "harvest/imitate.jsonl",
    "contrastive": "harvest/contrastive.jsonl",
}
NOT_SETS = {"capability", "quality", "jailbreak", "report"}
"""Folders beside those of sets in the folder of a state."""


def read_run(folder: Path) -> Record:
    """Reads a run folder.

    Raises:
        UserError: There is no evaluation in it, neither of the model before training nor after.
    """
    files = Files(folder)
    recipe_text = files.text("recipe.yaml")
    recipe = files.parsed("recipe.yaml", yaml.safe_load, recipe_text)
    # Safety training is compared with the model that answered the toxic prompts.
    before = "sft" if recipe.get("sft") else "base"
    places = {state: f"evaluate/{state}" for state in TITLES if state != "sft" or before == "sft"}
    evaluate = mapping(recipe.get("evaluate"))
    names = _names_of_sets(files, folder, places, mapping(evaluate.get("sets")))
    manifest_text = files.text("manifest.json")
    manifest = files.parsed("manifest.json", json.loads, manifest_text)
    for state, at in places.items():
        if not (folder / at).is_dir() and state in (before, "final"):
            files.notes.append(f"{at} is not there: the {TITLES[state]} was not evaluated")
    listed = evaluate.get("judges")
    order = [str(judge) for judge in listed] if isinstance(listed, list) else []
    where = {state: (files, at) for state, at in places.items()}
    sets = _read_sets(where, names, order)
    judges = _judges(sets, order)
    harvested = _is_harvested(recipe)
    attacks, measured = _read_others(where, lambda _, kind, name: not recipe or is_asked(evaluate, kind, name))
    metrics = files.rows("train/metrics.jsonl")
    logged = [value for row in metrics for value in row.values() if isinstance(value, float)]
    if lost := sum(not math.isfinite(value) for value in logged):
        files.notes.append(f"train/metrics.jsonl: {lost} values are not finite, and not drawn")
    labels = [bool(row.get("label")) for row in files.rows("train/data.jsonl", optional=True)]
    present = [state for state, at in places.items() if (folder / at).is_dir()]
    return Record(
        name=str(recipe.get("name") or folder.resolve().name),
        states={state: TITLES[state] for state in present},
        before=before if before in present else None,
        changed=["final"] if before in present and "final" in present else [],
        sets=sets,
        judges=judges,
        attacks=attacks,
        measured=measured,
        notes=files.notes,
        recipe=recipe,
        recipe_text=recipe_text,
        manifest=manifest,
        manifest_text=manifest_text,
        calibration=files.document("calibration/summary.json", optional=True),
        harvest=files.document("harvest/summary.json") if harvested else {},
        rows={kind: len(files.rows(path)) for kind, path in ROW_KINDS.items() if (folder / path).exists()}
        if harvested
        else {},
        mixed=(sum(labels), len(labels) - sum(labels)) if (folder / "train/data.jsonl").exists() else None,
        steps=_steps(files, metrics),
        metrics=metrics,
        monitor=files.rows("train/monitor.jsonl", optional=True),
        start=_read_rates(files, _start(recipe), sorted(names), judges),
        checkpoints=_read_checkpoints(files, sorted(names), judges),
        unmeasured=_unmeasured(measured, attacks, ["final"]),
        gate=files.document("report/gate.json", optional=True) if recipe.get("gate") else {},
    )


def _names_of_sets(files: Files, folder: Path, places: Mapping[str, str], asked: Row) -> set[str]:
    """Prompt sets with replies; what an earlier form of the recipe left behind is not part of this run.

    Raises:
        UserError: There are none.
    """
    names = {
        name
        for at in places.values()
        for name in files.folders(at)
        if any((folder / at / name / file).exists() for file in ("set.json", "replies.jsonl"))
        if not asked or name in asked
    }
    if not names:
        raise UserError(
            f"{folder / 'evaluate'}: there are no replies in {', '.join(places)}, so there is nothing to report; run "
            f"`tasft evaluate {folder}` first"
        )
    return names


def _unmeasured(
    measured: Mapping[str, Mapping[str, Any]], attacks: Mapping[str, Mapping[str, Any]], states: Sequence[str]
) -> list[str]:
    """Kinds of measurement that one of these states lacks."""
    done = {name for name, by_state in measured.items() if by_state.keys() >= set(states)}
    complete = {
        "capability": any(name.startswith("capability/") for name in done),
        # Likelihoods, which quality/reference has, do not say how good answers are.
        "quality": "quality/annotator" in done,
        "jailbreak": any(by_state.keys() >= set(states) for by_state in attacks.values()),
    }
    return [kind for kind, is_complete in complete.items() if not is_complete]


def read_model(folder: Path) -> Record:
    """Reads the folder in which a model alone was evaluated.

    Raises:
        UserError: There is no evaluation in it.
    """
    return read_models({folder.resolve().name: folder})


def read_models(
    folders: Mapping[str, Path], comparable: Mapping[str, Collection[tuple[str, str]]] | None = None
) -> Record:
    """Reads models that answered the same prompts, the first being the one that the others are compared with.

    Replies are paired by their prompts, not by ids.

    Args:
        folders: How a model is called -> its folder: a run, whose final model is meant; a state in a run, such as
            `RUN/evaluate/base`; or that in which a model alone was evaluated.
        comparable: Of each model but the first, what may be compared, as `tasft.evaluate.results.compare` names it: set
            (or `capability/TASK` and so on) and judge; None for all that both have.

    Raises:
        UserError: One of them holds no evaluation.
    """
    places: dict[str, tuple[Files, str]] = {}
    recipes: list[Row] = []
    for title, folder in folders.items():
        is_run = (folder / "evaluate" / "final").is_dir()
        files = Files(folder)
        places[title] = files, "evaluate/final" if is_run else "."
        whole = folder.absolute()
        root = whole.parents[1] if whole.parent.name == "evaluate" and not is_run else whole
        recipe = root / "recipe.yaml"
        recipes.append(mapping(yaml.safe_load(recipe.read_text(encoding="utf-8"))) if recipe.is_file() else {})
    names = [
        {name for name in files.folders(at) if (files.root / at / name / "set.json").exists()} - NOT_SETS
        for files, at in places.values()
    ]
    for (title, folder), set_names in zip(folders.items(), names, strict=True):
        if not set_names:
            raise UserError(f"{folder}: there are no replies of {title}: run tasft evaluate first")
    # What an earlier form of a recipe left behind is not meant.
    orders = [mapping(recipe.get("evaluate")).get("judges") for recipe in recipes]
    order = next(([str(judge) for judge in judges] for judges in orders if isinstance(judges, list)), [])
    sets = _read_sets(places, set.union(*names), order, by_prompt=True)
    if comparable is not None:
        sets = [_only_comparable(prompts, comparable) for prompts in sets]
    evaluates = {title: mapping(recipe.get("evaluate")) for title, recipe in zip(folders, recipes, strict=True)}
    others_of = {title: {name for name, _ in pairs} for title, pairs in (comparable or {}).items()}

    def is_meant(title: str, kind: str, name: str) -> bool:
        if evaluates[title] and not is_asked(evaluates[title], kind, name):
            return False
        return title not in others_of or f"{kind}/{name}" in others_of[title]

    attacks, measured = _read_others(places, is_meant)
    first, *others = places
    manifest = places[first][0].document("manifest.json", optional=True)
    return Record(
        name=", ".join(folders),
        states={title: title for title in places},
        before=first if others else None,
        changed=others,
        sets=sets,
        judges=_judges(sets, order),
        attacks=attacks,
        measured=measured,
        notes=[f"{title}: {note}" for title, (files, _) in places.items() for note in files.notes],
        manifest=manifest if not others else {},
        unmeasured=_unmeasured(measured, attacks, list(places)),
    )


def _only_comparable(prompts: SetRecord, comparable: Mapping[str, Collection[tuple[str, str]]]) -> SetRecord:
    """Without verdicts that say nothing beside those of the first model."""
    states = {
        title: Evaluated(
            evaluated.replies,
            {
                judge: judged
                for judge, judged in evaluated.judged.items()
                if title not in comparable or (prompts.name, judge) in comparable[title]
            },
        )
        for title, evaluated in prompts.states.items()
    }
    return SetRecord(prompts.name, prompts.kind, prompts.source, states)


def _judges(sets: Sequence[SetRecord], order: list[str]) -> list[str]:
    names = {judge for prompts in sets for evaluated in prompts.states.values() for judge in evaluated.judged}
    return sorted(names, key=lambda judge: (order.index(judge) if judge in order else len(order), judge))


def _is_harvested(recipe: Row) -> bool:
    """Whether a run has a harvest; without a recipe it is looked for."""
    method = mapping(recipe.get("train")).get("method")
    safe = mapping(mapping(recipe.get("data")).get("safe_responses"))
    return method not in ("sft", "stl") or (method == "stl" and safe.get("rows") == "harvested")


def _read_sets(
    places: Mapping[str, tuple[Files, str]], names: Collection[str], listed: list[str], by_prompt: bool = False
) -> list[SetRecord]:
    sets = [_read_set(name, places, listed, by_prompt) for name in names]
    return sorted(sets, key=lambda prompts: (prompts.kind != "toxic", prompts.name))


def _read_set(name: str, places: Mapping[str, tuple[Files, str]], listed: list[str], by_prompt: bool) -> SetRecord:
    description: Row = {}
    states = {}
    for state, (files, folder) in places.items():
        at = name if folder == "." else f"{folder}/{name}"
        if not (files.root / at).is_dir():
            if (files.root / folder).is_dir():
                files.notes.append(f"{at} is not there")
            continue
        if outlived(files.root / at):
            files.notes.append(f"{at} {OUTLIVED}")
            continue
        described: Row = files.document(f"{at}/set.json")
        description = description or described
        meant = described.get("ids")
        judges = [
            judge
            for judge in files.folders(at)
            if any((files.root / at / judge / file).exists() for file in ("summary.json", "verdicts.jsonl"))
            if not listed or judge in listed
        ]
        if not judges:
            files.notes.append(f"{at} holds no verdicts: no judge has read these replies")
        replies = by_id(files.rows(f"{at}/replies.jsonl"), meant)
        judged = {judge: _read_judged(files, f"{at}/{judge}", meant) for judge in judges}
        states[state] = _by_prompt(replies, judged) if by_prompt else Evaluated(replies, judged)
    # Without set.json the name decides; the note on the missing file is there already.
    kind = description.get("kind") or ("benign" if name == "benign" else "toxic")
    return SetRecord(name, str(kind), str(description.get("source") or ""), states)


def _by_prompt(replies: Mapping[str, Row], judged: Mapping[str, Judged]) -> Evaluated:
    """Known by the text of the prompt, and which of several equal ones it is."""
    times: dict[str, int] = {}
    keys = {}
    for key, reply in replies.items():
        prompt = str(reply.get("prompt", ""))
        times[prompt] = times.get(prompt, 0) + 1
        keys[key] = f"{prompt}\n{times[prompt]}"
    return Evaluated(
        {keys[key]: reply for key, reply in replies.items()},
        {
            judge: Judged(
                judgement.estimates,
                {keys[key]: verdict for key, verdict in judgement.verdicts.items() if key in keys},
                judgement.unreadable,
                judgement.causes,
                judgement.topics,
                judgement.score,
            )
            for judge, judgement in judged.items()
        },
    )


def _start(recipe: Row) -> str:
    """Folder of the state that safety training starts from."""
    return "sft" if recipe.get("sft") and mapping(recipe.get("train")).get("start") == "sft" else "base"


def _steps(files: Files, metrics: list[Row]) -> int | None:
    if (files.root / "train/summary.json").exists():
        steps = number(files.document("train/summary.json").get("steps"))
    else:
        # Before the training's end: the last that was logged.
        steps = number(metrics[-1].get("step")) if metrics else None
    return None if steps is None else int(steps)


def _read_checkpoints(files: Files, sets: list[str], judges: list[str]) -> dict[int, dict[str, Evaluated]]:
    by_step: dict[int, dict[str, Evaluated]] = {}
    for state in files.folders("evaluate"):
        step = state.removeprefix("checkpoint-")
        if step == state or not step.isdecimal():
            continue
        if rates := _read_rates(files, state, sets, judges):
            by_step[int(step)] = rates
    return dict(sorted(by_step.items()))


def _read_rates(files: Files, state: str, sets: list[str], judges: list[str]) -> dict[str, Evaluated]:
    by_set = {}
    for name in sets:
        if outlived(files.root / f"evaluate/{state}/{name}"):
            continue
        at = {judge: f"evaluate/{state}/{name}/{judge}" for judge in judges}
        judged = {
            judge: Judged(_estimates(files.document(f"{folder}/summary.json")), {})
            for judge, folder in at.items()
            if (files.root / folder / "summary.json").exists()
        }
        if judged:
            by_set[name] = Evaluated({}, judged)
    return by_set


def _estimates(summary: Row) -> dict[str, Estimate]:
    return {name: estimate_of(summary[name]) for name in MEASURES if name in summary}


def _read_judged(files: Files, at: str, meant: Any) -> Judged:
    summary = files.document(f"{at}/summary.json")
    unreadable = summary.get("unreadable")
    return Judged(
        estimates=_estimates(summary),
        verdicts=by_id(files.rows(f"{at}/verdicts.jsonl"), meant),
        unreadable=unreadable if isinstance(unreadable, int) else 0,
        causes={str(name): n for name, n in mapping(summary.get("causes")).items() if isinstance(n, int)},
        score=score if (score := estimate_of(summary.get("score"))).n else None,
        topics={str(name): _estimates(mapping(rates)) for name, rates in mapping(summary.get("by_topic")).items()},
    )


def _read_others(
    places: Mapping[str, tuple[Files, str]], is_meant: Callable[[str, str, str], bool]
) -> tuple[dict[str, dict[str, Attacked]], dict[str, dict[str, Measured]]]:
    """Attacks, and what was measured by other means than prompt sets, by state.

    Args:
        places: As `_read_sets` takes them.
        is_meant: Of a state, a kind and a name, whether that result counts.
    """
    attacks: dict[str, dict[str, Attacked]] = {}
    measured: dict[str, dict[str, Measured]] = {}
    for kind in ("jailbreak", "capability", "quality"):
        for state, (files, folder) in places.items():
            for name in files.folders(f"{folder}/{kind}"):
                at = f"{folder}/{kind}/{name}"
                if not (files.root / at / "summary.json").exists() or not is_meant(state, kind, name):
                    continue
                if outlived(files.root / at):
                    files.notes.append(f"{at} {OUTLIVED}")
                elif kind == "jailbreak":
                    attacks.setdefault(name, {})[state] = _read_attack(files, at)
                else:
                    measured.setdefault(f"{kind}/{name}", {})[state] = _read_task(files, at)
    return attacks, measured


def _read_attack(files: Files, at: str) -> Attacked:
    summary = files.document(f"{at}/summary.json")
    judge = str(summary.get("judge") or "")
    return Attacked(
        judge=judge,
        estimates={figure: estimate_of(summary[figure]) for figure in ATTACK_MEASURES if figure in summary},
        behaviours=by_id(files.rows(f"{at}/behaviours.jsonl")),
        queries=int(number(summary.get("queries")) or 0),
        unjudged=int(number(summary.get("unjudged")) or 0),
        evaluated=Evaluated(
            by_id(files.rows(f"{at}/replies.jsonl", optional=True)),
            {judge: Judged({}, by_id(files.rows(f"{at}/verdicts.jsonl", optional=True)))},
        ),
    )


def _read_task(files: Files, at: str) -> Measured:
    estimates = {
        metric: estimate_of(value)
        for metric, value in files.document(f"{at}/summary.json").items()
        if isinstance(value, Mapping) and {"value", "n"} <= value.keys()
    }
    return Measured(estimates, files.rows(f"{at}/items.jsonl"))
