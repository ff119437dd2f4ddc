"""The command `tasft judge`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tasft.cli.common import JsonOption, alone, print_json, resumable
from tasft.core.errors import UserError


def judge_file(
    file: Annotated[Path, typer.Argument(help="Pairs: JSONL, a JSON list or CSV, each also as .gz.")],
    judge: Annotated[str | None, typer.Option("--judge", help="Who judges, such as refusal_matching.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The judge's model: a hub name or folder.")] = None,
    server: Annotated[list[str] | None, typer.Option("--server", help="Address of a server that runs it.")] = None,
    server_model: Annotated[str | None, typer.Option("--server-model", help="What the server calls it.")] = None,
    rubric: Annotated[str | None, typer.Option("--rubric", help="For llm_judge: a name or a text file.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Two judges, or files of their verdicts, instead of --judge."),
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Column of human labels to compare with.")] = None,
    label_of: Annotated[Literal["harm", "refusal"], typer.Option("--label-of", help="What they are about.")] = "harm",
    prompt_column: Annotated[str, typer.Option("--prompt-column", help="What was asked.")] = "prompt",
    reply_column: Annotated[str, typer.Option("--reply-column", help="What was answered.")] = "completion",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Verdicts; default FILE.JUDGE.jsonl. Run again to go on.", show_default=False),
    ] = None,
    table: Annotated[Path | None, typer.Option("--table", help="Also write a CSV of pairs and verdicts.")] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="With --labels: an HTML page of curves and mistakes.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", help="With --labels: a file of thresholds that recipes name.")
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print the texts of so many worst differences.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Score a file of prompts and replies with a judge, and the judge by human labels or by another one.

    Example: tasft judge replies.csv --judge classifier --labels harmful
    """
    one_judge = {"--model": model, "--server": server, "--rubric": rubric, "--labels": labels, "--out": out}
    one_judge |= {"--table": table, "--page": page, "--calibrate": calibrate}
    faults = []
    if (judge is None) == (compare is None):
        faults.append("say either --judge NAME or --compare A B")
    if compare and (needless := [option for option, value in one_judge.items() if value]):
        faults.append(f"{', '.join(needless)}: not for --compare, which takes judges with their usual settings")
    if show and not (labels or compare):
        faults.append("--show: there are differences to show only with --labels or --compare")
    if judge and not labels:
        by_labels = {"--page": page, "--calibrate": calibrate}
        faults += [f"{option}: needs --labels" for option, value in by_labels.items() if value]
    if calibrate and label_of != "harm":
        faults.append("--calibrate: fits harm, not refusal")
    if bool(server) != bool(server_model):
        faults.append("--server and --server-model go together")
    from pydantic import ValidationError

    from tasft.cli.judge_page import MISTAKES, write_page
    from tasft.evaluate import judge_quality, judge_text
    from tasft.judges import JudgeSettings

    def read() -> judge_quality.Pairs:
        return judge_quality.read_pairs(file, prompt_column, reply_column, labels, label_of)

    with resumable(), alone(as_json):
        if faults:
            raise UserError(faults)
        if judge is None:
            assert compare is not None
            result = judge_quality.compare(file, read, compare, show)
        else:
            asked = {"model": model, "rubric": rubric, "server": server and {"urls": server, "model": server_model}}
            try:
                settings = JudgeSettings.of_name(judge, **{key: value for key, value in asked.items() if value})
            except ValidationError as error:
                raise UserError(
                    [f"--server: {fault['msg'].removeprefix('Value error, ')}" for fault in error.errors()]
                ) from None
            outputs = judge_quality.Outputs(out, table, calibrate)
            result = judge_quality.score(file, read, settings, label_of, outputs, max(show, MISTAKES) if page else show)
            if page:
                write_page(page, result)
                for row in result["differences"][show:MISTAKES]:
                    del row["prompt"], row["completion"]  # Only the page was to have them.
    if as_json:
        print_json(result)
    else:
        print(judge_text.rendered(result))
