"""An evaluation as logs of other tools, read by these tools; prompt sets as their tasks."""

import json
import sys
from importlib.metadata import EntryPoint

import pytest
from conftest import ROOT, rows, tasft_here

import tasft
from tasft.data.logs import read_log
from tasft.evaluate.logs_out import write_logs

SET = "demo-toxic-heldout"
JUDGES = ["refusal_matching", "python:ours:Short"]
OURS = (
    "class Short:\n    def __call__(self, pairs):\n        return [{'harmful': len(p.completion) < 40} for p in pairs]"
)


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "ours.py").write_text(OURS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        tasft.evaluate(tiny, [SET, "try-benign"], JUDGES, folder / "model", limit=4, max_new_tokens=12)
    return folder / "model"


def said(folder):
    """Texts and figures, as our files have them."""
    replies = {row["id"]: row for row in rows(folder / SET / "replies.jsonl")}
    figures = tasft.results(folder)
    rates = {(row.set, row.judge, row.measure): row.value for row in figures.itertuples() if row.n}
    return replies, rates


def inspect_logs(files):
    from inspect_ai.log import read_eval_log

    return {log.eval.task: log for log in map(read_eval_log, map(str, files))}


def test_inspect_reads_figures_and_no_text(evaluated, tmp_path):
    pytest.importorskip("inspect_ai", reason="pip install '.[inspect]'")
    files = write_logs(evaluated, tmp_path / "logs", "inspect")
    logs = inspect_logs(files)
    assert logs.keys() == {f"tasft/{SET}", "tasft/try-benign"}
    log = logs[f"tasft/{SET}"]
    assert (log.status, log.results.total_samples) == ("success", 4)
    assert not log.samples
    replies, rates = said(evaluated)
    scores = {
        (score.name, name): metric.value for score in log.results.scores for name, metric in score.metrics.items()
    }
    assert {judge for judge, _ in scores} == {"refusal_matching", "Short"}
    assert scores == {key[1:]: value for key, value in rates.items() if key[0] == SET and key[1:] in scores}
    assert {("Short", "harmful"), ("refusal_matching", "refusal"), ("Short", "incoherent")} <= scores.keys()
    assert files[0].stat().st_mode & 0o077 == 0
    for reply in replies.values():
        assert not any(reply["completion"].encode() in file.read_bytes() for file in files)


def test_inspect_reads_replies_where_they_are_asked_for_and_so_do_we(evaluated, tmp_path):
    pytest.importorskip("inspect_ai", reason="pip install '.[inspect]'")
    files = write_logs(evaluated, tmp_path / "logs", "inspect", replies=True)
    log = inspect_logs(files)[f"tasft/{SET}"]
    replies, _ = said(evaluated)
    assert {sample.id: (sample.input, sample.output.completion) for sample in log.samples} == {
        name: (row["prompt"], row["completion"]) for name, row in replies.items()
    }
    verdicts = {row["id"]: row for row in rows(evaluated / SET / "Short" / "verdicts.jsonl")}
    for sample in log.samples:
        assert sample.scores["Short"].value["harmful"] == verdicts[sample.id]["harmful"]
    (file,) = [file for file in files if SET in file.name]
    back = [row for _, row in read_log(file)]
    assert {row["id"]: row["completion"] for row in back} == {name: row["completion"] for name, row in replies.items()}
    assert {row["set"] for row in back} == {SET}


def test_lm_eval_reads_its_result_files(evaluated, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install '.[eval]'")
    from lm_eval.utils import get_results_filenames, get_sample_results_filenames, make_table

    figures = write_logs(evaluated, tmp_path / "figures", "lm-eval")
    assert [file.suffix for file in figures] == [".json"]
    files = write_logs(evaluated, tmp_path / "logs", "lm-eval", replies=True)
    names = [str(file) for file in files]
    assert len(get_results_filenames(names)) == 1
    assert len(get_sample_results_filenames(names)) == 2
    (whole,) = [json.loads(file.read_text()) for file in files if file.name.startswith("results_")]
    replies, rates = said(evaluated)
    for (name, judge, measure), value in rates.items():
        if f"{measure},{judge}" in whole["results"][name]:
            assert whole["results"][name][f"{measure},{judge}"] == value
    assert {"harmful,Short", "harmful_stderr,Short"} <= whole["results"][SET].keys()
    assert whole["n-samples"][SET] == {"original": 4, "effective": 4}
    assert "refusal_matching" in make_table(whole)
    better = whole["higher_is_better"]
    assert (better[SET]["harmful"], better[SET]["safe_coherent"], better["try-benign"]["refusal"]) == (
        False,
        True,
        False,
    )
    assert "refusal" not in better[SET]
    (samples,) = [file for file in files if file.name.startswith(f"samples_{SET}")]
    back = [row for _, row in read_log(samples)]
    assert [(row["prompt"], row["completion"]) for row in back] == [
        (row["prompt"], row["completion"]) for row in replies.values()
    ]


def test_a_reply_is_read_once_whatever_filters_looked_at_it(tmp_path):
    doc = {"doc_id": 0, "arguments": [["What?", {}]], "resps": [["That."]], "filtered_resps": ["That."]}
    lines = [json.dumps(doc | {"filter": name}) for name in ("strict-match", "flexible-extract")]
    (tmp_path / "samples_task.jsonl").write_text("\n".join(lines))
    assert [row["completion"] for _, row in read_log(tmp_path / "samples_task.jsonl")] == ["That."]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nowhere", "logs"), "nowhere: no evaluated prompt set"),
        (("model", "logs", "--form", "garak"), "no form of logs is called 'garak'; use one of inspect, lm-eval"),
        (("model", "."), ". is there and not empty"),
    ],
)
def test_what_cannot_be_written_is_said_in_a_sentence(evaluated, words, sentence):
    before = sorted(evaluated.parent.rglob("*"))
    done = tasft_here("logs", *words, cwd=evaluated.parent)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(evaluated.parent.rglob("*")) == before


def test_without_the_package_the_command_that_brings_it_is_named(evaluated, tmp_path, monkeypatch):
    for form, package, extra in (("inspect", "inspect_ai", "inspect"), ("lm-eval", "lm_eval.loggers", "eval")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(tasft.UserError, match=rf"pip install '\.\[{extra}\]'"):
            write_logs(evaluated, tmp_path / form, form)


# --- Prompt sets as tasks of Inspect


def test_named_sets_are_tasks_of_inspect_with_our_judges(tmp_path, monkeypatch):
    inspect_ai = pytest.importorskip("inspect_ai", reason="pip install '.[inspect]'")
    import tomllib

    from inspect_ai._util.registry import registry_info
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    (entry,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"].values()
    tasks = EntryPoint("tasft", entry, "inspect_ai").load()
    assert registry_info(tasks.xstest_safe).type == "task"
    assert registry_info(tasks.xstest_safe).name.removeprefix("tasft/") == "xstest_safe"
    replies = [
        "I'm sorry, but I can't help with that.",
        "First you take the lamp to the garden, then you wait.",
        "a a a",
    ]
    outputs = [ModelOutput.from_content("mockllm/model", reply) for reply in replies]
    for output in outputs:
        output.usage = ModelUsage()  # Else it counts tokens with a vocabulary that it downloads.
    model = get_model("mockllm/model", custom_outputs=outputs)
    task = tasks.try_toxic(judges="refusal_matching")
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    found = {
        score.name: metric.value
        for score in log.results.scores
        for name, metric in score.metrics.items()
        if name.rpartition("/")[2] == "rate"
    }
    assert found["refusal"] == pytest.approx(1 / 3)
    assert found["incoherent"] == pytest.approx(1 / 3)
    assert sorted(sample.scores["refusal_matching"].value["refusal"] for sample in log.samples) == [0, 0, 1]
    from tasft.data.rows import read_prompts

    assert {sample.input for sample in log.samples} == {prompt.prompt for prompt in read_prompts("try-toxic")}
