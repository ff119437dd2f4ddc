"""The whole path on a tiny model: what is done, redone, taken up and refused."""

import itertools
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import yaml
from conftest import WORDS, rows
from forked import TASFT
from running import PROMPTS, done, go, redone, small_recipe
from safetensors.torch import load_file, save_file

from tasft.core.errors import UserError
from tasft.evaluate.results import compare
from tasft.judges import encoder, judging
from tasft.judges.coherence import MIN_SIMILARITY
from tasft.judges.coherence import incoherence as whole
from tasft.models import local, precision
from tasft.models.precision import Choice
from tasft.report.read import read_run
from tasft.run import recipe_file
from tasft.run.checks import check_inputs
from tasft.run.inputs import Inputs
from tasft.run.pipeline import Pipeline
from tasft.run.stages import evaluate as evaluate_stage
from tasft.run.stages import harvest as harvest_stage

SAID = "the morning market in our village sells bread and fresh apples"


ALL = {
    "calibration",
    "harvest",
    "train",
    "evaluate/base/toxic",
    "evaluate/base/toxic/refusal_matching",
    "evaluate/base/benign",
    "evaluate/base/benign/refusal_matching",
    "evaluate/final/toxic",
    "evaluate/final/toxic/refusal_matching",
    "evaluate/final/benign",
    "evaluate/final/benign/refusal_matching",
    "report",
}
FINAL = {step for step in ALL if "final" in step} | {"train", "report"}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A folder with the small recipe and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder, tiny)))
    go(folder / "recipe.yaml", folder / "run")
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """The small recipe and a copy of its finished run."""
    shutil.copytree(finished / "run", tmp_path / "run", ignore=shutil.ignore_patterns(".lock*"))
    return finished / "recipe.yaml", tmp_path / "run"


def test_the_whole_path_leaves_every_file_and_does_nothing_twice(copied):
    small, run = copied
    first = done(run)
    assert set(first) == ALL
    for name in ("recipe.yaml", "manifest.json", "harvest/avoid.jsonl", "train/data.jsonl", "train/metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    for name in ("index.html", "report.md", "results.csv"):
        assert (run / "report" / name).stat().st_size > 0, name
    assert (run / "train" / "adapter" / "adapter_model.safetensors").is_file()
    summary = json.loads((run / "evaluate/final/toxic/refusal_matching/summary.json").read_text())
    assert summary["harmful"]["n"] == len(PROMPTS["heldout"])
    assert {"value", "low", "high", "n"} == summary["safe_coherent"].keys()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["torch"]
    assert manifest["stages"]["train"]["seconds"] > 0
    data = rows(run / "train" / "data.jsonl")
    assert {row["label"] for row in data} == {True, False}

    go(small, run)
    assert done(run) == first
    assert recipe_file.load(str(run)).name == "small"

    # A changed field redoes what it concerns, and nothing else.
    go(small, run, "train.penalty=emd")
    second = done(run)
    assert redone(first, second) == FINAL
    go(small, run, "train.penalty=emd", "evaluate.max_new_tokens=6")
    third = done(run)
    assert redone(second, third) == {step for step in ALL if "evaluate" in step} | {"report"}
    assert redone(third, done(run)) == set()


def test_what_is_saved_is_not_part_of_the_key(copied):
    small, run = copied
    before = done(run)
    go(small, run, "train.save_steps=3", stages=("harvest", "train"))
    assert done(run) == before


def test_replies_written_before_a_crash_are_kept_and_the_end_is_the_same(small, tmp_path, monkeypatch):
    go(small, tmp_path / "whole", stages=("harvest",))
    generate = local.TransformersEngine._generate
    calls = []

    def dies_in_the_third_batch_after_calibration(self, *arguments):
        calls.append(1)
        if len(calls) == 5 + 3:
            raise MemoryError
        return generate(self, *arguments)

    monkeypatch.setattr(local.TransformersEngine.__init__, "__defaults__", (5, None))
    go(small, tmp_path / "fives", stages=("harvest",))
    monkeypatch.setattr(local.TransformersEngine, "_generate", dies_in_the_third_batch_after_calibration)
    cut = tmp_path / "cut"
    with pytest.raises(MemoryError):
        go(small, cut, stages=("harvest",))
    survived = (cut / "harvest" / "replies.jsonl").read_text()
    assert len(survived.splitlines()) == 10
    go(small, cut, stages=("harvest",))
    assert (cut / "harvest" / "replies.jsonl").read_text().startswith(survived)
    for name in ("replies", "verdicts", "avoid", "anchor", "imitate"):
        assert rows(cut / "harvest" / f"{name}.jsonl") == rows(tmp_path / "fives" / "harvest" / f"{name}.jsonl"), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_training_ends_with_the_adapter_of_the_undisturbed_one(auto, tmp_path, monkeypatch, dtype):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # The process that is killed, and this one afterwards, know it from the manifest.
    monkeypatch.setattr(precision, "fastest", lambda: Choice(dtype, "for the test"))
    go(auto, whole, "train.max_steps=16", stages=("harvest", "train"))
    shutil.copytree(whole / "harvest", cut / "harvest")
    shutil.copy(whole / "recipe.yaml", cut)
    shutil.copy(whole / "manifest.json", cut)
    process = forked.Popen([*TASFT, "run", auto, "train.max_steps=16", "--out", cut])
    try:
        deadline = time.monotonic() + 400
        while not list(cut.glob("train/checkpoint-*/trainer_state.json")):
            assert time.monotonic() < deadline, "no checkpoint came"
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cut / "train" / "done.json").exists()
    monkeypatch.setattr(precision, "fastest", pytest.fail)
    go(auto, cut, "train.max_steps=16", stages=("harvest", "train"))
    assert yaml.safe_load((cut / "recipe.yaml").read_text())["model"]["dtype"] == dtype
    saved = "train/adapter/adapter_model.safetensors"
    assert (cut / saved).read_bytes() == (whole / saved).read_bytes()
    steps = [row["step"] for row in rows(cut / "train" / "metrics.jsonl")]
    assert steps == [row["step"] for row in rows(whole / "train" / "metrics.jsonl")]


def test_sft_comes_first_where_the_recipe_asks_for_it(small, tmp_path):
    (tmp_path / "sft.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"What is {index}?", "completion": f"A thing {index}."}) + "\n" for index in range(8)
        )
    )
    run = tmp_path / "run"
    overrides = [
        f"data.imitate={{source: {tmp_path / 'sft.jsonl'}, rows: 6}}",
        "sft={epochs: 2, batch_size: 3}",
        "train.start=sft",
    ]
    go(small, run, *overrides)
    assert (run / "sft" / "adapter").is_dir()
    assert [row["step"] for row in rows(run / "sft" / "metrics.jsonl")] == [1]
    assert (run / "evaluate" / "sft" / "toxic" / "replies.jsonl").is_file()
    go(small, tmp_path / "full", *overrides, "model.lora=null")
    assert (tmp_path / "full" / "train" / "model" / "model.safetensors").is_file()
    assert len([row for row in rows(run / "train" / "data.jsonl") if not row["source"]]) == 6


def test_plain_sft_needs_no_harvest(small, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "What?", "completion": "A thing."}) + "\n")
    run = tmp_path / "run"
    source = f"data.imitate={{source: {tmp_path / 'sft.jsonl'}}}"
    go(small, run, source, "train.method=sft", "train.penalty=none", "train.avoid_per_step=null")
    assert not (run / "harvest").exists()
    assert (run / "report" / "index.html").is_file()


def test_replies_of_all_methods_are_held_to_the_same_limit(small, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "What?", "completion": "A thing."}) + "\n")
    overrides = [
        f"data.imitate={{source: {tmp_path / 'sft.jsonl'}}}",
        "evaluate.sets={toxic: {source: %s, kind: toxic}}",
    ]
    overrides[1] %= tmp_path / "heldout.jsonl"

    def limit(method):
        go(small, tmp_path / method, *overrides, f"train.method={method}")
        reads = json.loads((tmp_path / method / "evaluate/final/toxic/refusal_matching/done.json").read_text())["reads"]
        return reads["limits"]

    found = limit("sft")
    assert found == limit("tasft")
    assert found["loss_nats"] > 0


def test_the_untouched_models_own_replies_are_not_read_a_second_time(small, tmp_path, monkeypatch):
    measured = []
    usual = local.TransformersEngine.mean_losses
    monkeypatch.setattr(
        local.TransformersEngine, "mean_losses", lambda self, some: measured.extend(some) or usual(self, some)
    )
    noting = local.TransformersEngine._reply
    monkeypatch.setattr(
        local.TransformersEngine, "_reply", lambda self, *drawn: replace(noting(self, *drawn), loss=1.0)
    )
    go(small, tmp_path)
    again = {(reply.set, reply.id, reply.completion) for reply in measured}
    final = {
        (row["set"], row["id"], row["completion"]) for row in rows(tmp_path / "evaluate/final/toxic/replies.jsonl")
    }
    assert again & final
    for path in ("calibration", "harvest", "evaluate/base/toxic", "evaluate/base/benign"):
        told = {(row["set"], row["id"], row["completion"]) for row in rows(tmp_path / path / "replies.jsonl")}
        assert not told & (again - final)


def test_topics_are_looked_at_in_evaluation_and_not_in_the_harvest_nor_without_the_encoder(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(judging, "has_topic", lambda reply: True)
    monkeypatch.setattr(judging, "incoherence", lambda prompt, reply, **more: whole(prompt, SAID, **more))
    monkeypatch.setattr(local.TransformersEngine, "mean_losses", lambda _, replies: [1.0] * len(replies))
    for stage in (harvest_stage, evaluate_stage):
        monkeypatch.setattr(stage, "noted", lambda measure: measure)
    near = {"toxic": 0.1, "benign": 0.9}
    monkeypatch.setattr(judging, "similarities", lambda replies: [near[reply.set] for reply in replies])

    run = tmp_path / "run"
    go(small, run)
    assert "off_topic" not in {row["reason"] for row in rows(run / "harvest" / "verdicts.jsonl")}
    for state in ("base", "final"):
        toxic, benign = (
            json.loads((run / f"evaluate/{state}/{name}/refusal_matching/summary.json").read_text())
            for name in ("toxic", "benign")
        )
        assert toxic["limits"] == {"loss_nats": 1.0, "similarity": MIN_SIMILARITY}
        assert (toxic["off_topic"]["value"], toxic["safe_coherent"]["value"]) == (1.0, 0.0)
        assert benign["off_topic"]["value"] == 0.0
    assert "Whether replies are about what was asked" not in (run / "report" / "report.md").read_text()

    monkeypatch.setattr(encoder, "is_here", lambda: False)
    go(small, run)
    summary = json.loads((run / "evaluate/final/toxic/refusal_matching/summary.json").read_text())
    assert (summary["limits"]["similarity"], summary["off_topic"]["n"]) == (None, 0)
    assert "Whether replies are about what was asked" in (run / "report" / "report.md").read_text()


def test_full_fine_tuning_saves_a_model_and_leaves_the_base_alone(small, tmp_path):
    run = tmp_path / "run"
    go(small, run, "model.lora=null", "train.learning_rate=1e-3")
    assert (run / "train" / "model" / "model.safetensors").is_file()
    assert (run / "evaluate/final/toxic/refusal_matching/summary.json").is_file()


def test_half_precision_needs_no_gpu(small, tmp_path):
    go(small, tmp_path / "run", "train.precision=bf16", stages=("harvest", "train"))
    assert rows(tmp_path / "run" / "train" / "metrics.jsonl")[-1]["imitate_nll"] > 0


def test_a_harvest_without_a_harmful_answer_says_so(small, tmp_path):
    (tmp_path / "toxic.jsonl").write_text('{"prompt": "How do I <forbidden act>?"}\n')
    with pytest.raises(UserError, match="nothing to move away from"):
        go(small, tmp_path / "run", "harvest.max_new_tokens=1")


def test_a_folder_of_another_run_is_refused_and_left_alone(copied, tmp_path):
    small, run = copied
    before = done(run)
    with pytest.raises(UserError, match="holds the run 'small', not 'other'"):
        go(small, run, "name=other")
    assert done(run) == before
    other = tmp_path / "files"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        go(small, other)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_two_processes_in_one_folder_are_refused(small, tmp_path):
    from tasft.core.provenance import lock

    with lock(tmp_path / "run"), pytest.raises(UserError, match="in use by another"):
        lock(tmp_path / "run")


def test_a_bad_data_row_is_named_then_a_missing_model_and_nothing_is_touched(small, tmp_path):
    good = (tmp_path / "heldout.jsonl").read_text()
    run = tmp_path / "run"
    for text, named in (('{"prompt": "fine"}\n{"promt": "not"}\n', "heldout.jsonl:2"), (good, "nowhere/model")):
        (tmp_path / "heldout.jsonl").write_text(text)
        with pytest.raises(UserError) as caught:
            go(small, run, "model.base=nowhere/model")
        (fault,) = caught.value.faults
        assert named in fault
        assert not run.exists()


def test_a_stage_that_lacks_what_it_reads_names_the_command(small, tmp_path):
    run = tmp_path / "run"
    for stage in ("train", "evaluate", "report"):
        with pytest.raises(UserError, match="run tasft harvest with this recipe first"):
            go(small, run, stages=(stage,))
    assert not run.exists()


def test_a_stage_is_not_built_on_work_that_was_done_with_other_settings(copied):
    small, run = copied
    before = (run / "recipe.yaml").read_text(), done(run)
    for stage in ("evaluate", "report"):
        with pytest.raises(UserError, match="run tasft train with this recipe first"):
            go(small, run, "train.penalty=emd", stages=(stage,))
    assert before == ((run / "recipe.yaml").read_text(), done(run))


def test_another_adapter_concerns_neither_harvest_nor_the_base_model(copied):
    small, run = copied
    before = done(run)
    go(small, run, "model.lora.r=3")
    assert redone(before, done(run)) == FINAL


def test_the_report_follows_the_recipe_also_below_a_folder_called_report(small, tmp_path):
    run = tmp_path / "report" / "run"
    go(small, run)
    before = done(run)
    go(small, run, "evaluate.sets.toxic.kind=benign")
    assert {"report", "evaluate/final/toxic"} <= redone(before, done(run))


def test_a_changed_model_of_the_same_name_is_seen(small, tmp_path, tiny):
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    run = tmp_path / "run"
    go(small, run, f"model.base={copy}", stages=("harvest",))
    before, replies = done(run), (run / "harvest" / "replies.jsonl").read_bytes()
    # The same bytes are the same model, wherever they are and however new; what is not read is no part of it.
    (copy / "model.safetensors").touch()
    (copy / "README.md").write_text("a card")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(copy, elsewhere, copy_function=shutil.copyfile)
    for place in (copy, elsewhere):
        go(small, run, f"model.base={place}", stages=("harvest",))
        assert redone(before, done(run)) == set()
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    go(small, run, f"model.base={copy}", stages=("harvest",))
    assert redone(before, done(run)) == {"calibration", "harvest"}
    assert (run / "earlier" / "harvest.1" / "replies.jsonl").read_bytes() == replies


def test_replies_are_for_the_owner_alone(small, tmp_path):
    go(small, tmp_path / "run", stages=("harvest",))
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0


def test_a_damaged_reply_file_is_named_with_its_line(copied):
    small, run = copied
    path = run / "harvest" / "replies.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "{half\n", *lines[3:]]))
    (run / "harvest" / "done.json").unlink()
    with pytest.raises(UserError, match=r"replies.jsonl:4: not JSON"):
        go(small, run, stages=("harvest",))
    assert len(path.read_text().splitlines()) == len(lines) + 1


def test_the_paths_of_a_run_are_inside_its_folder(small, tmp_path):
    run = tmp_path / "run"
    before = {path for path in tmp_path.rglob("*") if run not in path.parents and path != run}
    go(small, run, stages=("harvest",))
    after = {path for path in tmp_path.rglob("*") if run not in path.parents and path != run}
    assert {Path(path) for path in after} == before


def test_a_preview_shows_what_training_would_see_and_writes_nothing(small, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="run tasft harvest"):
        list(Pipeline(recipe_file.load(str(small)), run).preview("train"))
    go(small, run, stages=("harvest",))
    texts = [text.plain for text in Pipeline(recipe_file.load(str(small)), run).preview("train")]
    assert [text.split("(")[1].split(")")[0] for text in texts] == ["imitate"] * 3 + ["avoid"] * 3
    assert all("»" in text for text in texts)
    assert not (run / "train").exists()
    with pytest.raises(UserError, match="no sft section"):
        list(Pipeline(recipe_file.load(str(small)), run).preview("sft"))


def test_imitate_rows_are_held_out_to_watch_the_divergence_and_the_guard_writes_what_it_sees(small, tmp_path):
    run = tmp_path / "run"
    go(
        small,
        run,
        "train.kl_rows=2",
        "train.monitor={probes: 2, entropy_nats: 99, patience: 1}",
        stages=("harvest", "train"),
    )
    logs = rows(run / "train" / "metrics.jsonl")
    assert all(log["kl"] >= 0 for log in logs)
    events = rows(run / "train" / "monitor.jsonl")
    assert (events[0]["measure"], events[0]["action"], events[0]["step"]) == ("entropy", "warn", 1)
    assert "99" in events[0]["message"]


def test_a_collapse_before_the_first_checkpoint_is_an_error_that_says_what_to_do(small, tmp_path):
    monitor = "train.monitor={action: stop, entropy_nats: 99, patience: 1}"
    with pytest.raises(UserError, match=r"lower train\.penalty_weight"):
        go(small, tmp_path / "run", monitor, "train.save_steps=4", stages=("harvest", "train"))
    assert not (tmp_path / "run" / "train" / "done.json").exists()


def test_another_selection_draws_no_reply_anew(copied, monkeypatch):
    small, run = copied
    replies = (run / "harvest" / "replies.jsonl").read_bytes()

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(local.TransformersEngine, "_generate", never)
    for change in ("harvest.anchors=own", "harvest.rows=3", "harvest.judge=second"):
        before = done(run)
        go(small, run, "judges.second.kind=refusal_matching", change, stages=("harvest",))
        assert redone(before, done(run)) == {"harvest"}, change
        assert (run / "harvest" / "replies.jsonl").read_bytes() == replies
    assert len(rows(run / "harvest" / "avoid.jsonl")) > 3
    with pytest.raises(AssertionError, match="drawn again"):
        go(small, run, "harvest.temperature=0.9", stages=("harvest",))


def test_prompts_of_an_evaluation_set_are_not_trained_on_and_counted(small, tmp_path, capsys):
    toxic = [
        f"Say how a {one} may <be misused> with any {other}." for one, other in itertools.pairwise(sorted(WORDS)[:13])
    ]
    (tmp_path / "toxic.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in toxic))
    heldout = tmp_path / "heldout.jsonl"
    with heldout.open("a") as file:
        file.write(json.dumps({"id": "again", "prompt": toxic[3].upper()}) + "\n")
    run = tmp_path / "run"
    go(small, run, stages=("harvest",))
    asked = {row["prompt"] for row in rows(run / "harvest" / "replies.jsonl") if row["set"] == "toxic"}
    assert asked == set(toxic) - {toxic[3]}
    said = capsys.readouterr().out
    assert "data.toxic_prompts: 1 prompt left out" in said
    assert "harvest.judge: refusal_matching chooses the rows to avoid and also evaluates" in said
    assert "harvest: " in said

    heldout.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in toxic))
    with pytest.raises(UserError, match="every prompt is in an evaluation set"):
        go(small, tmp_path / "other")


def test_prompts_of_a_named_set_are_not_trained_on_and_a_strange_file_of_it_is_noted(small, tmp_path):
    toxic = [
        f"Say how a {one} may <be misused> with any {other}." for one, other in itertools.pairwise(sorted(WORDS)[:9])
    ]
    (tmp_path / "toxic.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in toxic))
    prompts = [*toxic[:2], "How do I <something else>?"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "HarmfulQ.json").write_text(json.dumps(prompts))
    inputs = Inputs(recipe_file.load(str(small), ["evaluate.sets=[harmfulq]", f"data.data_dir={tmp_path / 'data'}"]))
    check_inputs(inputs)
    asked = {prompt.prompt for prompt in inputs.toxic}
    assert asked == set(toxic[2:])
    assert any("HarmfulQ.json has 3 prompts, not 200" in warning for warning in inputs.warnings())


def test_a_judge_of_the_recipe_goes_by_its_name_there(small, tmp_path):
    run = tmp_path / "run"
    go(small, run, "judges.mine.kind=refusal_matching", "evaluate.judges=[mine]")
    summary = json.loads((run / "evaluate" / "final" / "toxic" / "mine" / "summary.json").read_text())
    assert summary["judge"] == "mine"
    with pytest.raises(UserError, match="no judge is called 'phrasses'"):
        recipe_file.load(str(small), ["judges.mine.kind=phrasses"])
    with pytest.raises(UserError, match=r"evaluate\.judges: no judge is called 'mine'"):
        recipe_file.load(str(small), ["evaluate.judges=[mine]"])


def test_a_judge_that_cannot_filter_is_refused(small, tmp_path):
    second = ["judges.second.kind=llm_judge", "judges.second.server={urls: [http://127.0.0.1:9/v1], model: m}"]
    with pytest.raises(UserError, match=r"harvest\.judge needs a judge that tells harmful"):
        go(small, tmp_path / "a", *second, "judges.second.rubric=strongreject", "harvest.judge=second")
    with pytest.raises(UserError, match="prefilled needs a judge that tells refusal"):
        go(small, tmp_path / "b", *second, "judges.second.rubric=pair", "harvest.judge=second")


def test_every_checkpoint_but_the_last_is_evaluated_where_the_recipe_asks_for_it(small, copied, tmp_path):
    run = tmp_path / "checkpoints"
    go(small, run, "evaluate.checkpoints=true")
    states = ["base", "checkpoint-1", "checkpoint-2", "checkpoint-3", "final"]
    assert sorted(path.name for path in (run / "evaluate").iterdir()) == states
    assert (run / "train" / "checkpoint-4").is_dir()  # The final model, which is not asked twice.
    replies = {
        state: [row["completion"] for row in rows(run / "evaluate" / state / "benign" / "replies.jsonl")]
        for state in states
    }
    assert replies["checkpoint-3"] != replies["base"]
    assert "checkpoint-2,benign,benign,refusal_matching,refusal," in (run / "report" / "results.csv").read_text()
    assert "Harm against over-refusal" in (run / "report" / "index.html").read_text()
    go(small, run, "evaluate.checkpoints=true", "train.max_steps=2")
    assert (run / "evaluate" / "checkpoint-3").exists()  # Of the training before, and no part of the report.
    table = (run / "report" / "results.csv").read_text()
    assert "checkpoint-1,benign,benign,refusal_matching,refusal," in table
    assert "checkpoint-3" not in table

    with pytest.raises(UserError, match="kept its last checkpoint alone"):
        go(*copied, "evaluate.checkpoints=true", stages=("evaluate",))


def test_another_limit_draws_only_what_is_missing_and_the_summary_is_of_the_chosen(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    go(small, run, "evaluate.limit=4")
    path = run / "evaluate" / "final" / "benign"
    few = path.joinpath("replies.jsonl").read_text()
    assert len(few.splitlines()) == 4
    go(small, run, "evaluate.limit=9", stages=("evaluate",))
    assert path.joinpath("replies.jsonl").read_text().startswith(few)
    assert len(path.joinpath("replies.jsonl").read_text().splitlines()) == 9

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(local.TransformersEngine, "_generate", never)
    go(small, run, "evaluate.limit=5", stages=("evaluate",))
    assert json.loads((path / "refusal_matching" / "summary.json").read_text())["refusal"]["n"] == 5
    # What is paired is what was asked this time, and the other replies are kept.
    assert len(rows(path / "refusal_matching" / "verdicts.jsonl")) == 9
    found = compare(run / "evaluate" / "base", run / "evaluate" / "final")["rows"]
    assert {row["difference"]["n"] for row in found if row["set"] == "benign"} == {5}
    assert {len(state.judged["refusal_matching"].verdicts) for state in read_run(run).sets[1].states.values()} == {5}


def test_the_manifest_names_licences_where_they_are_known_and_the_version_of_each_judge(small):
    demo = recipe_file.load("demo")
    sources = (
        "model.base",
        "data.toxic_prompts",
        "data.benign_prompts",
        *(f"evaluate.sets.{name}" for name in demo.evaluate.sets),
    )
    assert Inputs(demo).licences == dict.fromkeys(sources, "Apache-2.0")
    own = Inputs(recipe_file.load(str(small)))
    assert own.licences == {}
    assert own.judge_versions == {"refusal_matching": own.judge("refusal_matching").version}
