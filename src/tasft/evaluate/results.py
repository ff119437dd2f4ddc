"""Results of evaluations, from their files: a table of one, and two beside each other."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from tasft.core.errors import UserError
from tasft.core.measures import MEASURES, NONE, TOLD, in_words, number_in_words
from tasft.core.paired import is_asked, paired
from tasft.core.provenance import read_json
from tasft.core.stats import Estimate, mcnemar, paired_difference, rate
from tasft.core.step import EARLIER, OUTLIVED, outlived
from tasft.core.text import visible
from tasft.data.files import read_rows
from tasft.judges import Verdict

Row = Mapping[str, Any]
_Said = dict[tuple[str, int], Verdict]  # By the text of the prompt, and which of several equal ones it is.

UNFINISHED = "is not finished, and is left out: run tasft evaluate again"
_FIRST, _LAST = ("base", "sft"), ("final",)


def summaries(folder: Path, wanted: Collection[Path] | None = None) -> list[dict[str, Any]]:
    """The summary of every set and judge below a folder, with `state`, `set` and `kind`; states in their order.

    What is of an earlier training of a run is left out, which is said.

    Args:
        folder: `evaluate` of a run, or what a model alone was evaluated in, whose state is empty.
        wanted: Folders of the summaries that are meant; None for all.
    """
    rows = []
    for path in folder.rglob("set.json"):
        if EARLIER in path.relative_to(folder).parts:
            continue
        found = [at for at in sorted(path.parent.glob("*/summary.json")) if wanted is None or at.parent in wanted]
        if found and outlived(path.parent):
            print(f"note: {path.parent} {OUTLIVED}", flush=True)
            continue
        state = path.parent.relative_to(folder).parent
        named = {"state": "" if state == Path() else str(state), "set": path.parent.name, "kind": _read(path)["kind"]}
        rows += [named | _read(summary) for summary in found]
    return sorted(rows, key=lambda row: (row["kind"] != "toxic", row["set"], row["judge"], _order(row["state"])))


def _order(state: str) -> tuple[int, int, str]:
    if state in _FIRST:
        return 0, _FIRST.index(state), state
    number = state.rpartition("-")[2]
    return (2, 0, state) if state in _LAST else (1, int(number) if number.isdigit() else 0, state)


def table(rows: Sequence[Row]) -> Table:
    """Rates with their 95% intervals, a row for each state, set and judge; no text of a prompt or a reply."""
    states = any(row["state"] for row in rows)
    # What is off its topic is a part of what is incoherent.
    shown = [name for name in TOLD if name != "off_topic" and any(row[name]["n"] for row in rows if name in row)]
    drawn = Table(caption="rates with 95% Wilson intervals; n where it is not that of the set")
    for head in ("set", "kind", "n", "judge", *(["state"] if states else [])):
        drawn.add_column(head, justify="right" if head == "n" else "left")
    for name in shown:
        drawn.add_column(MEASURES[name].label.lower())
    drawn.add_column("mean score")
    for row in rows:
        n = row["distinct"]["n"]
        names = (row["set"], row["kind"], str(n), row["judge"], *([row["state"]] if states else []))
        cells = [in_words(_estimate(row[name]), usual_n=n) if name in row else NONE for name in shown]
        drawn.add_row(*map(visible, names), *cells, number_in_words(_estimate(row["score"])))
    return drawn


def _estimate(figure: Row) -> Estimate:
    return Estimate(*(figure[part] for part in ("value", "low", "high", "n")))


# Two models on the same prompts ----------------------------------------------------------------------------------


def compare(first: Path, second: Path) -> dict[str, Any]:
    """What changes from one model to another, on prompts that both have answered.

    Args:
        first: A run, whose final model is meant; a state in it, such as `RUN/evaluate/base`; or the folder in which a
            model alone was evaluated.
        second: Likewise.

    Returns:
        `rows`: for each set and judge of both and each measure the two rates, their paired difference (second less
        first) with the interval of `paired_difference`, and McNemar's test; `unpaired` counts replies to prompts that
        only one has. Where there are several sets of a kind, also for all of their prompts together. Likewise, item by
        item, for tasks of lm-eval, likelihoods and win rates, and attacks, whose `set` is `capability/TASK` and so on;
        what is a mean and no rate has Student's interval and no test. `notes`: what stands in the way of a comparison.

    Raises:
        UserError: They have nothing in common.
    """
    folders = [_state(path) for path in (first, second)]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    recipes = [_recipe(path, folder) for path, folder in zip((first, second), folders, strict=True)]
    sets = [_answered(folder, recipe, notes) for folder, recipe in zip(folders, recipes, strict=True)]
    together: dict[tuple[str, str], dict[str, list[_Said]]] = {}
    for name in sorted(sets[0] & sets[1]):
        here = [folder / name for folder in folders]
        judges = [{path.parent.name for path in at.glob("*/summary.json")} for at in here]
        listed = [set(recipe["judges"]) for recipe in recipes if recipe is not None]
        for judge in sorted(set.intersection(*judges, *listed)):
            done = [read_json(at / judge / "done.json") for at in here]
            where = f"{name}, {judge}"
            if done[0] is None or done[1] is None:
                notes.append(f"{where}: not compared, not all replies are judged: run tasft evaluate again")
                continue
            reads = [done[0]["reads"], done[1]["reads"]]
            if reads[0]["judge"] != reads[1]["judge"]:
                notes.append(f"{where}: not compared, the judge is not the same: have one of them judged again")
                continue
            different = [field for field in ("sampling", "limits") if reads[0].get(field) != reads[1].get(field)]
            if different:
                notes.append(f"{where}: {' and '.join(different)} differ")
            kind = _read(here[0] / "set.json")["kind"]
            verdicts = [_by_prompt(folder, judge) for folder in here]
            rows += _compared({"set": name, "kind": kind, "judge": judge}, verdicts)
            together.setdefault((kind, judge), {})[name] = verdicts
    for (kind, judge), parts in together.items():
        if len(parts) > 1:
            merged = [_merged({name: verdicts[which] for name, verdicts in parts.items()}) for which in (0, 1)]
            rows += _compared({"set": f"{len(parts)} {kind} sets", "kind": kind, "judge": judge}, merged)
    rows += _items(folders, recipes, notes)
    if not rows:
        held = [f"{folder} has {', '.join(sorted(have)) or 'none'}" for folder, have in zip(folders, sets, strict=True)]
        raise UserError([f"no set that the same judge read in both: {'; '.join(held)}", *notes])
    return {"first": str(first), "second": str(second), "rows": rows, "notes": notes}


def _state(path: Path) -> Path:
    return path / "evaluate" / "final" if (path / "recipe.yaml").is_file() else path


def _recipe(path: Path, folder: Path) -> Row | None:
    """What a run is asked for now; None of what is no run, where all counts that is there."""
    return None if folder == path else yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))["evaluate"]


def _stands(folder: Path, name: str, recipe: Row | None, notes: list[str]) -> bool:
    """Whether a result of a state is finished and of the run's last training."""
    result = folder / name
    unfinished = recipe is not None and not (result / "done.json").is_file()
    if not unfinished and not outlived(result):
        return True
    notes.append(f"{folder}: {name} {UNFINISHED if unfinished else OUTLIVED}")
    return False


def _answered(folder: Path, recipe: Row | None, notes: list[str]) -> set[str]:
    """Names of the sets that a state has answered; of a run without what an earlier form of it has left behind."""
    names = {path.parent.name for path in folder.glob("*/set.json")}
    if recipe is not None:
        names &= recipe["sets"].keys()
    return {name for name in sorted(names) if _stands(folder, name, recipe, notes)}


# Evaluations besides prompt sets, with what they hold of each item.
_KINDS = {"capability": "items.jsonl", "quality": "items.jsonl", "jailbreak": "behaviours.jsonl"}
# What makes figures of the same name incomparable.
_SAME = ("threshold", "task", "version", "num_fewshot", "data", "annotator_model", "reference")
_READ = ("rows", "prompts", "judge", "limits", "max_new_tokens", "annotator", "files", "server")


def _items(folders: Sequence[Path], recipes: Sequence[Row | None], notes: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind, file in _KINDS.items():
        names = [{path.parent.name for path in (folder / kind).glob("*/summary.json")} for folder in folders]
        for part in sorted(names[0] & names[1]):
            if not all(recipe is None or is_asked(recipe, kind, part) for recipe in recipes):
                continue
            name = f"{kind}/{part}"
            if not all(_stands(folder, name, recipe, notes) for folder, recipe in zip(folders, recipes, strict=True)):
                continue
            summaries = [_read(folder / name / "summary.json") for folder in folders]
            different = [field for field in _SAME if summaries[0].get(field) != summaries[1].get(field)]
            how = [(read_json(folder / name / "done.json") or {}).get("reads", {}) for folder in folders]
            different += [field for field in (*_READ, part) if how[0].get(field) != how[1].get(field)]
            if different:
                notes.append(f"{name}: not compared, {' and '.join(different)} differ")
                continue
            items = [[row for _, row in read_rows(folder / name / file)] for folder in folders]
            named = {"set": name, "kind": kind, "judge": summaries[0].get("judge", "")}
            rows += [named | row for metric in summaries[0] if (row := _paired(metric, summaries, items))]
    return rows


def _paired(metric: str, summaries: Sequence[Row], items: Sequence[Sequence[Row]]) -> dict[str, Any] | None:
    first, second = (summary.get(metric) for summary in summaries)
    if not all(isinstance(figure, Mapping) and figure.get("n") for figure in (first, second)):
        return None
    assert first is not None
    assert second is not None
    change = paired(metric, items[0], items[1], (first["value"], second["value"]))
    if change is None:
        return None
    return {
        "measure": metric,
        "first": first,
        "second": second,
        "difference": asdict(change.difference),
        "mcnemar": change.flips and asdict(change.flips),
        "unpaired": change.unpaired,
    }


def _compared(named: dict[str, Any], verdicts: Sequence[_Said]) -> list[dict[str, Any]]:
    both = [key for key in verdicts[0] if key in verdicts[1]]
    unpaired = len(verdicts[0]) + len(verdicts[1]) - 2 * len(both)
    rows = []
    for measure, told_of in TOLD.items():
        outcomes = [(told_of(vars(verdicts[0][key])), told_of(vars(verdicts[1][key]))) for key in both]
        known = [(one, other) for one, other in outcomes if one is not None and other is not None]
        if not known:
            continue
        before, after = [one for one, _ in known], [other for _, other in known]
        figures: dict[str, Estimate] = {
            "first": rate(before),
            "second": rate(after),
            "difference": paired_difference(before, after),
        }
        estimates = {name: asdict(figure) for name, figure in figures.items()}
        tested = {"mcnemar": asdict(mcnemar(before, after)), "unpaired": unpaired}
        rows.append({**named, "measure": measure, **estimates, **tested})
    return rows


def _merged(sets: Mapping[str, _Said]) -> _Said:
    """One of several; a prompt that two sets have counts in both."""
    return {
        (f"{name}: {prompt}", n): verdict
        for name, verdicts in sets.items()
        for (prompt, n), verdict in verdicts.items()
    }


def _by_prompt(folder: Path, judge: str) -> _Said:
    """Verdicts by prompt; the number tells equal prompts of a set apart."""
    # A larger limit may have left more behind.
    described = _read(folder / "set.json")
    meant = frozenset(described["ids"]) if "ids" in described else None
    asked = {row["id"]: row["prompt"] for _, row in read_rows(folder / "replies.jsonl")}
    verdicts: _Said = {}
    times: dict[str, int] = {}
    for _, row in read_rows(folder / judge / "verdicts.jsonl"):
        if meant is not None and row["id"] not in meant:
            continue
        prompt = asked[row["id"]]
        times[prompt] = times.get(prompt, 0) + 1
        verdicts[prompt, times[prompt]] = Verdict(**row)
    return verdicts


def comparison(found: Row) -> Table:
    """What `compare` found, for a terminal."""
    drawn = Table(
        caption="rates, and means in their own unit where there is no test; 95% intervals: Wilson, Newcombe and exact "
        "for paired differences, Student for means; exact McNemar test"
    )
    for head in ("set", "judge", "measure", "n", "first", "second", "second - first", "gained", "lost", "p"):
        drawn.add_column(head, justify="right" if head in ("n", "gained", "lost", "p") else "left")
    for row in found["rows"]:
        n, split = row["difference"]["n"], row["mcnemar"]
        first, second, difference = (_estimate(row[side]) for side in ("first", "second", "difference"))
        if split:
            shown = [in_words(first, usual_n=n), in_words(second, usual_n=n), in_words(difference, True, n)]
            tested = [str(split["gained"]), str(split["lost"]), f"{split['p']:.2g}"]
        else:
            shown = [number_in_words(first), number_in_words(second), number_in_words(difference, "+")]
            tested = [""] * 3
        measure = MEASURES.get(row["measure"])
        named = (row["set"], row["judge"], measure.label.lower() if measure else row["measure"])
        drawn.add_row(*map(visible, named), str(n), *shown, *tested)
    return drawn


def _read(path: Path) -> Any:
    content = read_json(path)
    if content is None:
        raise UserError(f"{path}: no such file: run tasft evaluate again")
    return content
