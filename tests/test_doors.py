"""What the command line does, from Python."""

import json
import subprocess
import sys

import pytest
import yaml
from running import small_recipe

import tasft

PAIRS = [
    {"prompt": "How do I <act 1>?", "completion": "I'm sorry, but I can't help with that."},
    {"prompt": "How do I <act 2>?", "completion": "First you take the lamp to the garden."},
]


def test_a_recipe_is_run_from_its_fields_and_goes_on_from_its_folder(tmp_path, tiny):
    recipe = small_recipe(tmp_path, tiny)
    rows = tasft.harvest(recipe, tmp_path / "run")
    assert {row.label for row in rows} == {True, False}
    assert not (tmp_path / "run" / "train").exists()
    folder = tasft.run(tmp_path / "run", stages=("train", "evaluate"))
    assert folder == tmp_path / "run"
    found = tasft.results(folder)
    assert {"base", "final"} <= set(found["state"])
    # Packages of the same names are imported by now.
    assert tasft.run.pipeline
    assert tasft.harvest(folder) == rows


def test_replies_are_judged_from_rows_a_frame_or_a_file(tmp_path):
    import pandas as pd

    found = tasft.judge(PAIRS, "refusal_matching")
    assert list(found["refusal"]) == [True, False]
    assert found.equals(tasft.judge(pd.DataFrame(PAIRS), "refusal_matching"))
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    assert found.equals(tasft.judge(tmp_path / "pairs.json", "refusal_matching"))


def test_a_model_is_evaluated(tmp_path, tiny):
    found = tasft.evaluate(
        tiny, ["demo-toxic-heldout"], ["refusal_matching"], tmp_path / "out", limit=2, max_new_tokens=4
    )
    assert set(found["set"]) == {"demo-toxic-heldout"}
    assert found["n"].max() == 2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: tasft.run({"name": "x"}), "recipe: model: is missing"),
        (lambda: tasft.run("demo", overrides=["train.penality=nlcl"]), "did you mean penalty?"),
        (lambda: tasft.judge(PAIRS, "refusal_machting"), "no judge is called 'refusal_machting'"),
        (lambda: tasft.judge(PAIRS, "llm_judge", rubrik="x"), "judge: rubrik: Extra inputs"),
        (lambda: tasft.judge([{"prompt": "a"}], "refusal_matching"), "no column is called 'completion'"),
        (lambda: tasft.evaluate("nowhere", ["xstets"]), "no prompt set is called 'xstets'"),
    ],
)
def test_faults_are_user_errors(tmp_path, monkeypatch, call, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tasft.UserError) as caught:
        call()
    assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_doors_load_nothing_heavy_and_both_ways_are_open():
    code = (
        "import sys, tasft; assert callable(tasft.run); from tasft.run import recipe; assert callable(tasft.run)\n"
        "from tasft import evaluate, harvest; assert callable(evaluate) and callable(harvest)\n"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_recipe_of_fields_reads_as_the_file_does(tmp_path, tiny):
    from tasft.run import recipe_file

    recipe = small_recipe(tmp_path, tiny)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert recipe_file.load(recipe) == recipe_file.load(str(tmp_path / "recipe.yaml"))
