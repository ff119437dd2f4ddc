"""A path is a path, whatever letters are in it."""

import json
import os
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import small_recipe

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.data.rows import read_examples, read_prompts
from tasft.data.sources import parts_of
from tasft.evaluate import judge_quality
from tasft.evaluate.alone import Alone, asked_of
from tasft.judges import JudgeSettings, load_judge
from tasft.run import recipe_file
from tasft.run.export import export
from tasft.run.pipeline import Pipeline
from tasft.run.recipe import Recipe

AWKWARD = "try#2 ?a=b&c:%20'\"\n[x]* {y} $HOME ~ ü🙂 \\ !important #"
ROW = {"prompt": "What?", "completion": "That.", "label": True}

# Every letter that a file may have in its name, those that mean something elsewhere most of all.
NAMES = (
    st.text(st.sampled_from("#?:%*[]{}()'\"\\ \n\t&;|$`~!,=+-.@é🙂a") | st.characters(codec="utf-8"), min_size=1)
    .filter(lambda name: name not in (".", "..") and "/" not in name and "\0" not in name)
    .filter(lambda name: len(f"{name}.jsonl".encode()) <= 255)
)
LONG = int(os.environ.get("HYPOTHESIS_PROFILE") == "long")
fuzz = settings(
    max_examples=3000 if LONG else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(name=NAMES, column=NAMES.filter(lambda name: "#" not in name), absolute=st.booleans(), linked=st.booleans())
def test_a_file_of_rows_is_read_whatever_its_name(tmp_path_factory, monkeypatch, name, column, absolute, linked):
    folder = tmp_path_factory.mktemp("rows")
    monkeypatch.chdir(folder)
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps({**ROW, column: "Who?"}) + "\n")
    if linked:
        path.rename(folder / "target")
        path.symlink_to("target")
    place = str(path) if absolute else path.name
    for source in (place, path):
        assert [row.completion for row in read_examples(source)] == ["Who?" if column == "completion" else "That."]
    assert parts_of(f"{place}#{column}") == (place, column)
    assert [prompt.prompt for prompt in read_prompts(f"{place}#{column}")] == ["Who?"]
    spec = recipe(folder, toxic_prompts=place)
    provenance.atomic_write_text(folder / "again.yaml", recipe_file.dump(spec))
    assert recipe_file.load("again.yaml").data.toxic_prompts == place
    shutil.rmtree(folder)


@pytest.mark.parametrize("letter", ["\x85", "\u2028", "\u2029", "\x07", "\ufeff", "é"])
def test_a_recipe_reads_back_as_it_was_written(tmp_path, letter):
    spec = recipe(tmp_path, toxic_prompts=f"a{letter}b")
    (tmp_path / "again.yaml").write_text(recipe_file.dump(spec), encoding="utf-8")
    assert recipe_file.load(str(tmp_path / "again.yaml")).data.toxic_prompts == f"a{letter}b"
    assert letter != "é" or "é" in recipe_file.dump(spec)


def recipe(folder, **data):
    values = small_recipe(folder, folder)
    values["data"] |= data
    return Recipe.model_validate(values)


def test_of_two_places_the_file_that_is_there_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a#b"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "b": f"{name}, b", "c": f"{name}, c"}) + "\n")
    assert [read_prompts(source)[0].prompt for source in ("a", "a#b", "a#c", "a#b#c")] == ["a", "a#b", "a, c", "a#b, c"]
    assert parts_of("hub:a/b?split=train#c") == ("hub:a/b?split=train", "c")
    with pytest.raises(UserError, match="'x' is neither a file nor"):
        read_prompts("x#y")


@pytest.mark.parametrize("absolute", [True, False])
def test_a_whole_run_goes_through_folders_of_any_name(tiny, tmp_path, monkeypatch, absolute):
    folder = tmp_path / AWKWARD
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(tiny, folder / f"model {AWKWARD}")
    values = small_recipe(folder, folder / f"model {AWKWARD}")
    values["train"] |= {"max_steps": 2}
    for field in ("toxic_prompts", "benign_prompts"):
        (folder / values["data"][field]).rename(folder / f"{field} {AWKWARD}.jsonl")
        values["data"][field] = str(folder / f"{field} {AWKWARD}.jsonl")
    (folder / f"{AWKWARD}.yaml").write_text(yaml.safe_dump(values))
    place = folder / "runs" / AWKWARD if absolute else type(folder)("runs") / AWKWARD
    spec = recipe_file.load(f"{AWKWARD}.yaml")
    Pipeline(spec, place).go()
    again = Pipeline(recipe_file.load(str(place)), place)
    assert again.is_done
    export(place, place.with_name(f"model {AWKWARD}"))
    asked, _ = asked_of(["demo-toxic-heldout"], None, 2)
    judge = load_judge("refusal_matching")
    Alone(str(place.with_name(f"model {AWKWARD}"))).evaluate(asked, [judge], 4, folder / f"alone {AWKWARD}")
    assert list((folder / f"alone {AWKWARD}").rglob("summary.json"))


def test_a_file_is_judged_whatever_its_name_and_however_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = JudgeSettings(kind="refusal_matching")
    for stem in (AWKWARD, "x" * (255 - len(".jsonl.refusal_matching.jsonl")), "ü" * 100):
        path = tmp_path / f"{stem}.jsonl"
        path.write_text(json.dumps(ROW) + "\n")
        judge_quality.score(
            path, lambda path=path: judge_quality.read_pairs(path), kind, "harm", judge_quality.Outputs(), 0
        )
        assert (tmp_path / f"{stem}.jsonl.refusal_matching.jsonl").is_file()
    path = tmp_path / ("x" * 249 + ".jsonl")
    path.write_text(json.dumps(ROW) + "\n")
    with pytest.raises(UserError, match="File name too long"), provenance.writing(tmp_path):
        judge_quality.score(path, lambda: judge_quality.read_pairs(path), kind, "harm", judge_quality.Outputs(), 0)
