"""What needs no model imports nothing that would run one."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}
PROGRAM = """
import json, sys
from tasft.cli.main import main
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code
print(json.dumps([code or 0, sorted(set(sys.modules) & set(%r))]), file=sys.stderr)
"""


def ran(folder, *arguments):
    """Exit code, packages that were imported, and all that was said."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % sorted(HEAVY), *arguments], cwd=folder, capture_output=True, text=True
    )
    *_, last = done.stderr.splitlines()
    return (*json.loads(last), done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--help"], 0, "Make a language model safe"),
        (["check", "demo", "train.penality=nlcl"], 2, "did you mean penalty?"),
        (["run", "demo", "train.penality=nlcl"], 2, "did you mean penalty?"),
        (["run", "demo", "train.penality=nlcl", "--dry-run"], 2, "did you mean penalty?"),
        (["check", "demo", "data.toxic_prompts=toxc.csv"], 2, "did you mean toxic.csv?"),
        (["evaluate", "demo", "--sets", "xstets"], 2, "did you mean xstest?"),
        (["run", "demmo"], 2, "did you mean demo?"),
        (["judge", "toxic.csv"], 2, "say either --judge NAME or --compare A B"),
        (["compare", "one", "two"], 2, "one"),
    ],
)
def test_no_fault_of_a_command_waits_for_torch(tmp_path, arguments, code, sentence):
    (tmp_path / "toxic.csv").write_text("prompt\nHow do I <forbidden act 1>?\n")
    found, imported, said = ran(tmp_path, *arguments)
    assert (found, imported) == (code, []), said
    assert sentence in " ".join(said.split())


def test_a_report_that_is_written_is_told_without_torch(tmp_path):
    from tasft.run import recipe_file

    spec = recipe_file.load("demo")
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_file.dump(spec))
    done = {"key": "of the report", "reads": {"recipe": spec.model_dump(), "steps": ["of the training"]}}
    (tmp_path / "run" / "report" / "done.json").write_text(json.dumps(done))
    (tmp_path / "run" / "train").mkdir()
    (tmp_path / "run" / "train" / "done.json").write_text('{"key": "of the training"}')
    gate = {"met": False, "limits": [{"met": False, "sentence": "harmful replies: 40%; wanted: at most 2%"}]}
    (tmp_path / "run" / "report" / "gate.json").write_text(json.dumps(gate))
    code, imported, said = ran(tmp_path, "report", "run")
    assert (code, imported) == (3, []), said
    assert "report: done before" in said
    assert said.count("harmful replies: 40%") == 1
    # What it was made from is not there any more: the run itself is asked, which says so.
    (tmp_path / "run" / "train" / "done.json").write_text('{"key": "of another training"}')
    code, imported, said = ran(tmp_path, "report", "run")
    assert (code, "torch" in imported) == (2, True), said


def test_faults_of_recipe_and_data_are_in_one_report(tmp_path):
    (tmp_path / "toxic.csv").write_text("prompt\nHow do I <forbidden act 1>?\n")
    _, _, said = ran(tmp_path, "check", "demo", "data.toxic_prompts=toxc.csv", "train.penality=nlcl")
    assert "train.penality: no such field; did you mean penalty?" in said
    assert "data.toxic_prompts: 'toxc.csv' is neither a file" in said
    assert "did you mean toxic.csv?" in said


@pytest.mark.parametrize(
    ("field", "new"),
    [
        ("train.steps=3", "max_steps"),
        ("train.warmup=3", "warmup_steps"),
        ("train.penalize_end=true", "penalize_eos"),
        ("train.guard=null", "monitor"),
        ("model.lora.alpha=3", "lora_alpha"),
        ("model.lora.dropout=0.1", "lora_dropout"),
        ("model.lora.targets=[q_proj]", "target_modules"),
        ("data.ordinary_prompts=demo-benign-train", "benign_prompts"),
        ("evaluate.capability.few_shot=1", "num_fewshot"),
        ("evaluate.sets.benign.kind=ordinary", "benign"),
        ("evaluate.judges=[phrases]", "refusal_matching"),
        ("harvest.judge=llm", "llm_judge"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(field, new):
    from tasft.core.errors import UserError
    from tasft.run import recipe_file

    with pytest.raises(UserError, match=f"it is now called {new}"):
        recipe_file.load("demo", [field])
