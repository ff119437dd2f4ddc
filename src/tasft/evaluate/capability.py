"""General ability: tasks of the LM Evaluation Harness (Gao et al. 2021, `lm_eval`) on a model that is in memory.

Prompt, answer choices and metric of a task are lm-eval's own. Only the place of its data may be another: a folder
instead of the hub.
"""

import difflib
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasft.core import ranks
from tasft.core.errors import UserError
from tasft.core.provenance import file_hash, write_json, write_jsonl
from tasft.core.stats import Estimate, rate
from tasft.data.files import read_rows
from tasft.models.generation import sampling_alone

Z = 1.959964  # 97.5% of the normal distribution lie below.
SEED = 1234  # lm-eval's own.
SPLITS = ("train", "validation", "test")
Row = dict[str, Any]


def _boolq(row: Row) -> Row:
    # SuperGLUE's passages begin with the title of the article; BoolQ's own file has it beside them.
    return {
        "question": row["question"],
        "passage": f"{row['title']} -- {row['passage']}",
        "label": ["false", "true"].index(str(row["answer"]).lower()),
    }


def _openbookqa(row: Row) -> Row:
    # Options are lines such as "A. a marsh"; the answer is one of them.
    lines = row["options"].split("\n")
    options = {letter: text for letter, _, text in (line.partition(". ") for line in lines)}
    # Without the space that some copies end a question with: lm-eval puts one before the choice.
    return {
        "question_stem": row["question"].rstrip(),
        "choices": {"text": list(options.values()), "label": list(options)},
        "answerKey": list(options)[lines.index(row["answer"])],
    }


# Fields that lm-eval's prompt reads, and what makes them of the fields of other published copies.
_FORMS: dict[str, tuple[tuple[str, ...], Callable[[Row], Row] | None]] = {
    "boolq": (("question", "passage", "label"), _boolq),
    "openbookqa": (("question_stem", "choices", "answerKey"), _openbookqa),
    "piqa": (("goal", "sol1", "sol2", "label"), None),
}


def local_files(task: str, folder: str | None) -> dict[str, Path]:
    """Files of a task below a folder, TASK_SPLIT.jsonl, by split; empty when there are none."""
    if folder is None:
        return {}
    candidates = {split: sorted(Path(folder).rglob(f"{task}_{split}.jsonl")) for split in SPLITS}
    return {split: paths[0] for split, paths in candidates.items() if paths}


def read_local(task: str, path: Path) -> list[Row]:
    """Rows of a file with the fields that the hub's copy has.

    Raises:
        UserError: Names every bad row.
    """
    fields, form = _FORMS.get(task, ((), None))
    rows, faults = [], []
    for number, row in read_rows(path):
        try:
            made = form(row) if form and not set(fields) <= row.keys() else row
        except (KeyError, ValueError, AttributeError, TypeError):
            made = {}
        if missing := [name for name in fields if name not in made]:
            has = ", ".join(map(repr, row))
            faults.append(f"{path}:{number}: no {', '.join(missing)} for task {task} can be made of {has}")
        rows.append(made)
    if faults:
        raise UserError(faults)
    return rows


@cache
def _index() -> Any:
    """The index of lm-eval's tasks; made once, since it reads thousands of files.

    Raises:
        UserError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"evaluate.capability needs {error.name}, which is missing: pip install '.[eval]'") from None
    # It warns of what is meant here: a model that is loaded already, a number of examples that is given.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def check(tasks: Sequence[str], num_fewshot: int, folder: str | None) -> None:
    """Refuse what cannot be measured.

    Args:
        tasks: Names of lm-eval.
        num_fewshot: Solved examples before each item.
        folder: Where files of the tasks are looked for, see `local_files`.

    Raises:
        UserError: Names every fault.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"data.data_dir: {folder} is not a folder")
    index = _index()
    faults: list[str] = []
    for task in tasks:
        files = local_files(task, folder)
        if task not in index.all_tasks:
            near = difflib.get_close_matches(task, index.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            faults.append(f"evaluate.capability: lm-eval has no task {task!r}{hint}")
        elif task in index.all_tags:
            faults.append(
                f"evaluate.capability: {task} is a tag of lm-eval, for which it gives no figure: name its tasks, see "
                "`lm-eval ls tasks`"
            )
        elif files:
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    index.load(_local(task, files, Path(scratch)))
            except UserError as error:
                faults += error.faults
            except KeyError as error:
                faults.append(f"evaluate.capability: {task} is evaluated on {task}_{error.args[0]}.jsonl: not there")
            if num_fewshot and "train" not in files:
                faults.append(f"evaluate.capability: num_fewshot {num_fewshot} needs {task}_train.jsonl: not there")
    if faults:
        raise UserError(faults)


def reads(task: str, folder: str | None) -> dict[str, str]:
    """What a task depends on besides the model: lm-eval's version, the hash of each local file by split."""
    files = {split: file_hash(path) for split, path in local_files(task, folder).items()}
    return {"lm_eval": metadata.version("lm_eval"), **files}


def _local(task: str, files: dict[str, Path], folder: Path) -> str:
    """A task file of lm-eval in `folder`: its own, included, with rows from files in place of the hub's."""
    for split, path in files.items():
        write_jsonl(folder / f"{split}.jsonl", read_local(task, path))
    config = {
        "include": str(_index().task_index[task].yaml_path),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in files},
            "cache_dir": str(folder),
        },
    }
    if "train" not in files:
        # It wants a pool of examples even when none is shown.
        config |= {"training_split": None, "fewshot_split": next(iter(files))}
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    folder: Path,
    about: Row,
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 16,
) -> Row:
    """One task, or a group of them, in `items.jsonl` and `summary.json`.

    lm-eval's prompt is used as it stands, without the model's chat template, as in figures that others publish.

    Args:
        model: In evaluation mode; an adapter on it is used.
        tokenizer: Its tokenizer.
        task: lm-eval's name.
        folder: For the two files.
        about: What else the summary says: recipe, commit.
        data_dir: Folder with a file of the task, see `local_files`; without one the hub is asked.
        limit: Items of each task, from the first; None for all.
        num_fewshot: Solved examples before each item.
        batch_size: Items in a forward pass: moves figures by rounding at most.

    Returns:
        The summary: each metric with its 95% interval, n and lm-eval's standard error (`stderr`).

    Raises:
        UserError: The hub does not give the data.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    files = local_files(task, data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            loaded = _index().load(_local(task, files, Path(scratch)) if files else task)
        except (OSError, DatasetsError) as error:  # what the hub's client raises
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"evaluate.capability: the data of {task} cannot be loaded ({type(error).__name__}: {reason:.200}): "
                f"put {task}_test.jsonl or {task}_validation.jsonl into a folder and name that by data.data_dir"
            ) from error
        for lm_task in loaded["tasks"].values():
            if lm_task.get_config("num_fewshot") != 0:  # Of some tasks the examples are a part of the prompt.
                lm_task.set_config("num_fewshot", num_fewshot)
            lm_task.set_fewshot_seed(SEED)
        torch.manual_seed(SEED)
        # Not `simple_evaluate`: it does the same, but also asks the hub for the model, and pip and git for versions.
        # What the model's generation_config.json says of drawing is not the task's.
        with sampling_alone(model):
            output = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), loaded, limit=limit)
    items = [_item(name, sample) for name, samples in output["samples"].items() for sample in samples]
    summary = {
        **_estimates(output["results"][task], items),
        "task": task,
        "higher_is_better": output["higher_is_better"].get(task, {}),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "version": output["versions"].get(task),
        "data": reads(task, data_dir),
        **about,
    }
    if ranks.is_first():
        write_jsonl(folder / "items.jsonl", items)
        write_json(folder / "summary.json", summary)
    return summary


def _item(task: str, sample: Row) -> Row:
    """What is kept of one item: enough to pair it with another model's, and to see how close the call was."""
    scores = {name: float(sample[name]) for name in sample["metrics"] if isinstance(sample[name], int | float)}
    return {
        "id": f"{task}/{sample['doc_id']}",
        "filter": sample["filter"],
        "doc_hash": sample["doc_hash"],
        "target": sample["target"],
        "replies": sample["filtered_resps"],
        **scores,
    }


def _estimates(results: Row, items: Sequence[Row]) -> dict[str, Row]:
    """Each metric of a task; its name has the filter of lm-eval in it where there is one.

    Shares have Wilson's interval, other means the normal one of lm-eval's standard error.
    """
    estimates = {}
    for key, value in results.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        stderr = results.get(f"{metric}_stderr,{chosen}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        outcomes = [item[metric] for item in items if item["filter"] == chosen and metric in item]
        if set(outcomes) <= {0.0, 1.0} and outcomes and math.isclose(sum(outcomes) / len(outcomes), value):
            estimate = rate([outcome == 1.0 for outcome in outcomes])
        else:
            low, high = (None, None) if stderr is None else (value - Z * stderr, value + Z * stderr)
            estimate = Estimate(float(value), low, high, len(outcomes) or len(items))
        estimates[metric if chosen == "none" else key] = asdict(estimate) | {"stderr": stderr}
    return estimates
