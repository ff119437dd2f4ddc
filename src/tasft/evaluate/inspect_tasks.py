"""The named prompt sets as tasks of Inspect, `tasft/xstest_safe` and so on; Inspect finds them by an entry point."""

import math
from collections.abc import Callable
from typing import Any

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

from tasft.core.measures import TOLD
from tasft.data.rows import read_prompts
from tasft.data.sets import NAMED
from tasft.judges import load_judge
from tasft.judges.judging import judge_reply


@metric
def rate() -> Metric:
    """The share of replies of which it holds, of those of which the judge tells it; NaN where it tells it of none."""

    def compute(scores: list[SampleScore]) -> float:
        values = _told(scores)
        return sum(values) / len(values) if values else math.nan

    return compute


@metric
def n() -> Metric:
    """Of how many replies the judge tells it."""

    def compute(scores: list[SampleScore]) -> float:
        return len(_told(scores))

    return compute


def _told(scores: list[SampleScore]) -> list[float]:
    return [value for sample in scores if not math.isnan(value := sample.score.as_float())]


def verdicts(judge: str) -> Scorer:
    """What a judge of ours says of each reply, coherence included: a rate for each measure.

    Args:
        judge: A name in `tasft.judges.JUDGES`, or `python:mypkg.judges:Mine`.

    Raises:
        UserError: There is no such judge.
    """
    by = load_judge(judge)
    alone = anyio.Lock()

    @scorer(metrics={name: [rate(), n()] for name in TOLD}, name=by.name)
    def made() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            async with alone:  # A judge has one model.
                verdict = await anyio.to_thread.run_sync(judge_reply, by, state.input_text, state.output.completion)
            outcomes = {name: told_of(vars(verdict)) for name, told_of in TOLD.items()}
            value = {name: math.nan if outcome is None else float(outcome) for name, outcome in outcomes.items()}
            return Score(value=value, answer=state.output.completion, explanation=verdict.reason or None)

        return score

    return made()


def _task(name: str) -> Callable[..., Any]:
    def made(judges: str = "classifier,refusal_matching", data_dir: str | None = None, max_tokens: int = 64) -> Task:
        prompts = read_prompts(name, data_dir)
        samples = [Sample(prompt.prompt, id=prompt.id, metadata={"topic": prompt.topic}) for prompt in prompts]
        return Task(
            dataset=MemoryDataset(samples, name=name),
            solver=generate(max_tokens=max_tokens),
            scorer=[verdicts(judge) for judge in judges.split(",") if judge],
        )

    made.__name__ = made.__qualname__ = name.replace("-", "_")
    made.__doc__ = f"{NAMED[name].about}: {NAMED[name].kind} prompts, judged by `judges`, read below `data_dir`."
    return task(made)


globals().update({name.replace("-", "_"): _task(name) for name in NAMED})
