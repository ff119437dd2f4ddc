"""What the command line does, called from Python: each a thin door to the same work."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tasft.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from tasft.data.rows import Example
    from tasft.data.settings import PromptFormat
    from tasft.run.pipeline import Pipeline


def run(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    stages: Sequence[str] | None = None,
) -> Path:
    """Run the stages of a recipe, as `tasft run` does; what is done already is not done again.

    Args:
        recipe: A file, a run folder, the name of a shipped recipe, or the fields themselves.
        out: The run folder; None is `runs/NAME`, or the run itself.
        overrides: Fields to override, `train.penalty=nlcl`.
        stages: Of sft, harvest, train, evaluate, report; None is all of them.

    Returns:
        The run folder, for `tasft.results`.

    Raises:
        UserError: Recipe or data are wrong, or a stage finds something that you can put right; names all faults.
    """
    opened = opened_run(recipe, out, overrides)
    opened.go(*([] if stages is None else [tuple(stages)]))
    return opened.folder


def harvest(
    recipe: str | Path | Mapping[str, Any], out: str | Path | None = None, overrides: Sequence[str] = ()
) -> "list[Example]":
    """The rows that a recipe's model gives of itself, to avoid and to imitate, as `tasft harvest` makes them.

    Args:
        recipe: As that of `run`, and the others too.
        out: As there.
        overrides: As there.

    Raises:
        UserError: As `run`; the recipe harvests nothing; or no answer was harmful.
    """
    from tasft.data.rows import read_examples
    from tasft.run.stages.harvest import files

    opened = opened_run(recipe, out, overrides)
    paths = files(opened.context)
    if not paths:
        raise UserError(f"{opened.context.spec.name}: its method {opened.context.spec.train.method} harvests nothing")
    opened.go(("harvest",))
    return [row for path in paths if path.stat().st_size for row in read_examples(path)]


def judge(
    rows: "str | Path | pd.DataFrame | Sequence[Mapping[str, Any]]", judge: str = "classifier", **settings: Any
) -> "pd.DataFrame":
    """What a judge says of prompts and replies, as `tasft judge` has it.

    Args:
        rows: `prompt`, `completion` and perhaps `id` of each; or a file of them.
        judge: A kind of judge, or `python:mypkg.judges:Mine`.
        **settings: Those of `tasft.judges.JudgeSettings`: model, server, rubric and so on.

    Returns:
        The fields of `tasft.judges.Verdict`, a row for each in the same order.

    Raises:
        UserError: Rows or judge are wrong; names all faults.
    """
    import pandas as pd
    from pydantic import ValidationError

    from tasft.core.provenance import write_jsonl
    from tasft.evaluate.judge_quality import judged, read_pairs
    from tasft.judges import JudgeSettings, load_judge

    try:
        asked = JudgeSettings.of_name(judge, **settings)
    except ValidationError as error:
        raise UserError(
            [f"judge: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        ) from None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        if isinstance(rows, str | Path):
            path = Path(rows)
        else:
            write_jsonl(path, rows.to_dict("records") if isinstance(rows, pd.DataFrame) else map(dict, rows))
        verdicts = judged(
            load_judge(asked.kind, {asked.kind: asked}), read_pairs(path), Path(folder) / "verdicts.jsonl"
        )
    return pd.DataFrame([vars(verdict) for verdict in verdicts])


def evaluate(
    model: str | Path,
    sets: Sequence[str],
    judges: Sequence[str] = ("classifier", "refusal_matching"),
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    prompt: "PromptFormat" = "chat",
    base: str | None = None,
) -> "pd.DataFrame":
    """How a model answers prompt sets, as `tasft evaluate MODEL` measures it.

    Args:
        model: A hub name, a folder, the folder of an adapter, or a .gguf file.
        sets: Named prompt sets.
        judges: Who reads the replies.
        out: Gets replies and verdicts; None is `runs/evaluate-NAME`.
        data_dir: Folder with the files of the sets; None downloads them.
        limit: Most prompts of each set.
        max_new_tokens: Longest reply; replies are greedy.
        prompt: How it is asked: `chat` or `alpaca`.
        base: The model that an adapter is for; None is the one that it names.

    Returns:
        As `tasft.results`.

    Raises:
        UserError: Model, sets or judges are wrong; names all faults.
    """
    from tasft.report.results import results

    return results(evaluated(model, sets, judges, out, data_dir, limit, max_new_tokens, prompt, base))


def evaluated(
    model: str | Path,
    sets: Sequence[str],
    judges: Sequence[str],
    out: str | Path | None,
    data_dir: str | Path | None,
    limit: int | None,
    max_new_tokens: int,
    prompt: "PromptFormat",
    base: str | None = None,
) -> Path:
    """As `evaluate`; says what tells the files of sets from the published ones, and gives the folder."""
    if (least := min(max_new_tokens, 1 if limit is None else limit)) < 1:
        raise UserError(f"limit and max_new_tokens must be at least 1, and one is {least}")
    from tasft.evaluate.alone import Alone, asked_of
    from tasft.evaluate.settings import Evaluate
    from tasft.judges import load_judge

    asked, notes = asked_of(sets, str(data_dir) if data_dir else None, limit)
    for note in notes if os.environ.get("RANK", "0") == "0" else ():
        print(f"note: {note}", flush=True)
    by = [load_judge(judge) for judge in judges or Evaluate.model_fields["judges"].default]
    folder = Path(out or Path("runs") / f"evaluate-{Path(model).name}")
    Alone(str(model), prompt, base=base).evaluate(asked, by, max_new_tokens, folder)
    return folder


def opened_run(
    recipe: str | Path | Mapping[str, Any], out: str | Path | None = None, overrides: Sequence[str] = ()
) -> "Pipeline":
    """The run of a recipe, in its folder."""
    from tasft.run import recipe_file

    source = recipe if isinstance(recipe, Mapping) else str(recipe)
    # Its faults are said before torch is imported, which takes seconds.
    spec = recipe_file.load(source, overrides)
    from tasft.run.pipeline import Pipeline

    return Pipeline(spec, folder_of(source, spec.name, out))


def folder_of(source: str | Mapping[str, Any], name: str, out: str | Path | None) -> Path:
    """The run folder of a recipe: `out`, else the recipe itself where it is a run, else `runs/` and its name."""
    is_run = isinstance(source, str) and (Path(source) / "recipe.yaml").is_file()
    return Path(out or (str(source) if is_run else Path("runs") / name))
