"""What is said of a run before it is begun."""

import json

import pytest
import torch
import yaml
from conftest import rows
from test_pipeline import PROMPTS, go, small_recipe
from typer.testing import CliRunner

from tasft.cli.main import app
from tasft.run import estimate, recipe_file
from tasft.run.pipeline import Pipeline


@pytest.fixture
def small(tmp_path, tiny):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path, tiny)))
    return path


def planned(path, folder, *overrides):
    return estimate.plan(Pipeline(recipe_file.load(str(path), overrides), folder))


def work(found):
    return {row["stage"]: row["work"] for row in found["stages"]}


def test_a_dry_run_says_rows_replies_steps_time_and_memory_and_writes_nothing(small, tmp_path, monkeypatch):
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
    assert all(row["seconds"] > 0 for row in found["stages"] if row["stage"] in ("harvest", "train", "evaluate"))
    assert found["memory_gib"] is not None
    assert "Estimates" in found["rule"]


def test_what_is_done_takes_no_time(small, tmp_path):
    run = tmp_path / "run"
    go(small, run, stages=("harvest",))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    states = {row["stage"]: (row["state"], row["seconds"]) for row in planned(small, run)["stages"]}
    assert states["harvest"] == ("done", 0.0)
    assert states["train"][0] == "to do"
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


def test_a_model_too_large_to_be_tried_here_is_not_estimated(small, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "LARGEST_ON_CPU", 1000)
    found = planned(small, tmp_path / "run")
    assert "not estimated" in found["not_estimated"]
    assert found["memory_gib"] is None
    assert {row["seconds"] for row in found["stages"] if row["stage"] in ("harvest", "train", "evaluate")} == {None}
    assert work(found)["train"] == "4 steps of 4 rows"


def test_a_fault_is_said_instead_of_a_plan(small, tmp_path):
    done = CliRunner().invoke(app, ["train", str(small), "data.toxic_prompts=nowhere.jsonl", "--dry-run"])
    assert "nowhere.jsonl" in str(done.exception)


def test_layers_cost_as_much_as_the_layers_that_were_timed():
    assert estimate._whole(5.0, 9.0, 11) == 5 + 10 * 2


def test_what_autograd_keeps_is_counted_once_and_without_parameters():
    x = torch.ones(1000, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(1000))
    # exp keeps its result, the product both its factors.
    assert estimate._saved(lambda: (x.exp() * weight).sum().backward()) == 4000


@pytest.mark.parametrize(("seconds", "said"), [(7.4, "7 s"), (89, "89 s"), (600, "10.0 minutes"), (9000, "2.5 hours")])
def test_a_time_has_no_more_digits_than_an_estimate_has(seconds, said):
    assert estimate.spoken(seconds) == said


def test_cells_of_a_sweep_take_what_they_share_once(small, tmp_path):
    cells = [
        Pipeline(recipe_file.load(str(small), [f"train.penalty_weight={weight}"]), tmp_path / weight)
        for weight in "123"
    ]
    found = estimate.plan_sweep([cells])
    (group,) = found["groups"]
    alone = sum(row["seconds"] for row in group["stages"])
    assert group["cells"] == 3
    # Once harvest and base model for all, but a training each.
    assert alone < found["seconds"] < 3 * alone
    assert found["memory_gib"] == group["memory_gib"]
    assert estimate.plan_sweep([]) == {"groups": [], "seconds": 0, "memory_gib": None}


def test_rounds_and_instructions_are_counted(small, monkeypatch):
    def takes_a_tenth_of_a_second(work):
        work()
        return 0.1

    monkeypatch.setattr(estimate, "_timed", takes_a_tenth_of_a_second)
    plain = estimate.plan(Pipeline(recipe_file.load(str(small), ["harvest.anchors=none"]), small.parent / "run"))
    wanted = ["harvest.anchors=instructed", "train.rounds={count: 3, benign: 5}"]
    more = estimate.plan(Pipeline(recipe_file.load(str(small), wanted), small.parent / "run"))
    words = {row["stage"]: row["work"] for row in more["stages"]}
    assert "60 instructed" in words["harvest"]  # 5 instructions on all of 12 prompts
    assert words["train"].endswith("in 3 rounds; 2 looks at 12 toxic and 5 benign replies")
    seconds = [{row["stage"]: row["seconds"] for row in each["stages"]} for each in (plain, more)]
    assert all(seconds[1][stage] > seconds[0][stage] for stage in ("harvest", "train"))
