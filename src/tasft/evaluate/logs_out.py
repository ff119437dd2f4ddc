"""An evaluation as logs of other tools: those of Inspect, and the result files of lm-eval."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.core.measures import EITHER, HIGHER, MEASURES, TOLD
from tasft.data.files import read_rows
from tasft.evaluate.results import summaries

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Set:
    """How one state of a model answered one set.

    Attributes:
        judged: Summary of each judge.
        replies: Rows of `replies.jsonl` that are meant; none where texts stay behind.
        verdicts: Of each judge by the id of the reply.
    """

    model: str
    state: str
    name: str
    judged: dict[str, Row]
    replies: list[dict[str, Any]]
    verdicts: dict[str, dict[str, dict[str, Any]]]

    @property
    def n(self) -> int:
        return max(summary["distinct"]["n"] for summary in self.judged.values())


def write_logs(folder: Path, out: Path, form: str, replies: bool = False) -> list[Path]:
    """Write what was evaluated as logs of another tool.

    Args:
        folder: A run, or what a model alone was evaluated in.
        out: A folder that is not there or empty; only you can read what is written.
        form: In `FORMS`. `inspect`: a `.eval` for each state and set. `lm-eval`: for each state `results_*.json` and,
            with replies, `samples_*.jsonl`.
        replies: Prompts, replies and single verdicts too; without, figures alone.

    Returns:
        The files.

    Raises:
        UserError: Nothing was evaluated there, a reply is gone, `out` holds something, or the tool is not installed.
    """
    if form not in FORMS:
        raise UserError(f"no form of logs is called {form!r:.40}; use one of {', '.join(FORMS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and not empty: choose another folder")
    sets = list(_sets(folder, replies))
    if not sets:
        raise UserError(f"{folder}: no evaluated prompt set: give a run that was evaluated, or --out of tasft evaluate")
    with provenance.private():
        return FORMS[form](sets, out)


def _sets(folder: Path, replies: bool) -> Iterator[_Set]:
    root = folder / "evaluate" if (folder / "evaluate").is_dir() else folder
    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in summaries(root) if root.is_dir() else ():
        grouped.setdefault((row["state"], row["set"]), {})[row["judge"]] = row
    for (state, name), judged in grouped.items():
        here = root / state / name
        texts, verdicts = [], {}
        if replies:
            asked = (provenance.read_json(here / "set.json") or {}).get("ids")
            texts = [row for _, row in read_rows(here / "replies.jsonl") if asked is None or row["id"] in asked]
            verdicts = {
                judge: {row["id"]: row for _, row in read_rows(here / judge / "verdicts.jsonl")} for judge in judged
            }
            if missing := [row["id"] for row in texts if any(row["id"] not in by_id for by_id in verdicts.values())]:
                raise UserError(f"{here}: {missing[0]!r:.40} has no verdict: run tasft evaluate again")
        model = f"{folder.resolve().name}-{state}" if state else folder.resolve().name
        yield _Set(model.replace("/", "-"), state, name, judged, texts, verdicts)


def _figures(summary: Row) -> dict[str, Row]:
    return {name: summary[name] for name in TOLD if summary.get(name, {}).get("value") is not None}


def _told(verdict: Row) -> dict[str, bool]:
    return {name: value for name, told_of in TOLD.items() if (value := told_of(verdict)) is not None}


def _inspect(sets: Sequence[_Set], out: Path) -> list[Path]:
    try:
        from inspect_ai import log as logs
    except ImportError:
        raise UserError("logs of Inspect need the package inspect_ai: pip install '.[inspect]'") from None
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for answered in sets:
        scores = [
            logs.EvalScore(
                name=judge,
                scorer=judge,
                metrics={
                    name: logs.EvalMetric(name=name, value=figure["value"], metadata=dict(figure))
                    for name, figure in _figures(summary).items()
                },
            )
            for judge, summary in answered.judged.items()
        ]
        ids = [row["id"] for row in answered.replies]
        samples = [_sample(answered, row) for row in answered.replies]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        commit = next(iter(answered.judged.values())).get("commit")
        log = logs.EvalLog(
            status="success",
            eval=logs.EvalSpec(
                created=now,
                task=f"tasft/{answered.name}",
                model=f"tasft/{answered.model}",
                dataset=logs.EvalDataset(name=answered.name, samples=answered.n, sample_ids=ids),
                config=logs.EvalConfig(),
                metadata={"commit": commit, "replies": bool(samples)},
            ),
            results=logs.EvalResults(total_samples=answered.n, completed_samples=answered.n, scores=scores),
            stats=logs.EvalStats(started_at=now, completed_at=now),
            samples=samples or None,
        )
        files.append(out / f"{answered.model}_{answered.name}.eval")
        logs.write_eval_log(log, str(files[-1]))
    return files


def _sample(answered: _Set, row: Row) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    by_judge = {judge: verdicts[row["id"]] for judge, verdicts in answered.verdicts.items()}
    return EvalSample(
        id=row["id"],
        epoch=1,
        input=row["prompt"],
        target="",
        messages=[ChatMessageUser(content=row["prompt"]), ChatMessageAssistant(content=row["completion"])],
        output=ModelOutput.from_content(f"tasft/{answered.model}", row["completion"]),
        scores={
            judge: Score(value=_told(verdict), answer=row["completion"], explanation=verdict["reason"])
            for judge, verdict in by_judge.items()
        },
    )


def _lm_eval(sets: Sequence[_Set], out: Path) -> list[Path]:
    try:
        from lm_eval.loggers import EvaluationTracker
    except ImportError:
        raise UserError("result files of lm-eval need the package lm_eval: pip install '.[eval]'") from None
    out.mkdir(parents=True, exist_ok=True)
    for model in dict.fromkeys(answered.model for answered in sets):
        mine = [answered for answered in sets if answered.model == model]
        tracker = EvaluationTracker(output_path=str(out))
        tracker.general_config_tracker.log_experiment_args("tasft", {"pretrained": model}, None, None, False)
        samples = {answered.name: list(_docs(answered)) for answered in mine if answered.replies}
        tracker.save_results_aggregated(_aggregated(mine), samples)
        for name, rows in samples.items():
            tracker.save_results_samples(name, rows)
    # It says by a warning that it could not write, and goes on.
    files = sorted(path for path in out.rglob("*") if path.is_file())
    if len(files) != len({answered.model for answered in sets}) + sum(bool(answered.replies) for answered in sets):
        raise UserError(f"{out}: lm-eval could not write all files: is there room, and may you write there?")
    return files


def _aggregated(sets: Sequence[_Set]) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` would have given; a judge stands where a filter does."""
    results: dict[str, dict[str, Any]] = {}
    for answered in sets:
        results[answered.name] = {"alias": answered.name}
        for judge, summary in answered.judged.items():
            for name, figure in _figures(summary).items():
                value, n = figure["value"], figure["n"]
                results[answered.name][f"{name},{judge}"] = value
                spread = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else "N/A"
                results[answered.name][f"{name}_stderr,{judge}"] = spread
    kinds = {answered.name: next(iter(answered.judged.values()))["kind"] for answered in sets}
    # Nothing of a measure where neither way is good.
    better = {
        name: {
            measure: way == HIGHER for measure in TOLD if (way := MEASURES[measure].better.get(kind, EITHER)) != EITHER
        }
        for name, kind in kinds.items()
    }
    return {
        "results": results,
        "versions": {answered.name: 1 for answered in sets},
        "n-shot": {answered.name: 0 for answered in sets},
        "higher_is_better": better,
        "n-samples": {answered.name: {"original": answered.n, "effective": answered.n} for answered in sets},
        "git_hash": next(iter(sets[0].judged.values())).get("commit"),
        "date": datetime.now(UTC).timestamp(),
    }


def _docs(answered: _Set) -> Iterator[dict[str, Any]]:
    from lm_eval.utils import hash_string

    for number, row in enumerate(answered.replies):
        for judge, verdicts in answered.verdicts.items():
            outcomes = _told(verdicts[row["id"]])
            yield {
                "doc_id": number,
                "doc": {"id": row["id"], "prompt": row["prompt"]},
                "target": "",
                "arguments": [(row["prompt"], {"until": []})],
                "resps": [[row["completion"]]],
                "filtered_resps": [row["completion"]],
                "filter": judge,
                "metrics": list(outcomes),
                "doc_hash": hash_string(row["id"]),
                "prompt_hash": hash_string(row["prompt"]),
                "target_hash": hash_string(""),
                **{name: float(value) for name, value in outcomes.items()},
            }


FORMS: dict[str, Callable[[Sequence[_Set], Path], list[Path]]] = {"inspect": _inspect, "lm-eval": _lm_eval}
"""Name of a form -> what writes it."""
