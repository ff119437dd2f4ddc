"""What is said of a run before it is begun."""

import json

from conftest import rows
from running import PROMPTS, go
from typer.testing import CliRunner

from tasft.cli.main import app
from tasft.run import plan, recipe_file
from tasft.run.pipeline import Pipeline


def planned(path, folder, *overrides):
    return plan.plan(Pipeline(recipe_file.load(str(path), overrides), folder))


def work(found):
    return {row["stage"]: row["work"] for row in found["stages"]}


def test_a_dry_run_says_rows_replies_steps_and_memory_and_writes_nothing(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["run", str(small), "train.penalty=nlcl", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    assert sorted(tmp_path.rglob("*")) == before
    found = json.loads(done.stdout)
    assert found["recipe"]["train"]["penalty"] == "nlcl"
    assert found["rows"] == {
        "data.toxic_prompts": len(PROMPTS["toxic"]),
        "data.benign_prompts": len(PROMPTS["benign"]),
        "evaluate.sets.toxic": len(PROMPTS["heldout"]),
        "evaluate.sets.benign": len(PROMPTS["everyday"]),
    }
    said = work(found)
    assert "12 toxic, 24 benign, 12 refusing replies of at most 8 tokens" in said["harvest"]
    assert said["train"] == "4 steps of 4 rows"
    assert "2 states of the model, 30 replies each of at most 8 tokens; judged by refusal_matching" in said["evaluate"]
    assert {row["stage"]: row["state"] for row in found["stages"]}["harvest"] == "to do"
    assert found["model"]["training_gib"] is not None


def test_what_is_done_is_said_to_be(small, tmp_path):
    run = tmp_path / "run"
    go(small, run, stages=("harvest",))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    states = {row["stage"]: row["state"] for row in planned(small, run)["stages"]}
    assert states == {
        "sft": "not asked for", "harvest": "done", "train": "to do", "evaluate": "to do", "report": "to do"
    }  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_is_done_and_would_be_redone_is_said_with_the_field(small, tmp_path):
    run = tmp_path / "run"
    go(small, run, stages=("harvest",))
    states = {row["stage"]: row["state"] for row in planned(small, run, "harvest.samples=2")["stages"]}
    assert states["harvest"].startswith("done; would be redone: ")
    assert "harvest.samples" in states["harvest"]
    assert states["train"] == "to do"


def test_the_steps_of_epochs_are_those_that_training_takes(small, tmp_path):
    rows_file = tmp_path / "mine.jsonl"
    rows_file.write_text(
        "".join(json.dumps({"prompt": f"What {i}?", "completion": f"It {i}."}) + "\n" for i in range(7))
    )
    fields = [f"data.imitate={{source: {rows_file}}}", "sft={epochs: 2, batch_size: 3}"]
    run = tmp_path / "run"
    assert work(planned(small, run, *fields))["sft"] == "6 steps of 3 rows"
    go(small, run, *fields, stages=("sft",))
    logged = list((run / "sft").glob("checkpoint-*"))
    assert [path.name for path in logged] == ["checkpoint-6"]
    assert rows(run / "sft" / "metrics.jsonl")


def test_a_fault_is_said_instead_of_a_plan(small, tmp_path):
    done = CliRunner().invoke(app, ["train", str(small), "data.toxic_prompts=nowhere.jsonl", "--dry-run"])
    assert "nowhere.jsonl" in str(done.exception)


def test_rounds_and_instructions_are_counted(small):
    wanted = ["harvest.anchors=instructed", "train.rounds={count: 3, benign: 5}"]
    words = work(planned(small, small.parent / "run", *wanted))
    assert "60 instructed" in words["harvest"]  # 5 instructions on all of 12 prompts
    assert words["train"].endswith("in 3 rounds; 2 looks at 12 toxic and 5 benign replies")


def test_training_holds_what_is_trained_with_gradients_and_moments(small, tmp_path):
    whole = planned(small, tmp_path / "run", "model.lora=null")["model"]
    # In float32: weights, gradients and two moments of each.
    assert whole["training_gib"] == round(16 * whole["parameters"] / 2**30, 2)
    assert planned(small, tmp_path / "run")["model"]["training_gib"] <= whole["training_gib"]
