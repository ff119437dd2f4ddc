"""The first recipe of a user: complete, commented from the fields themselves, and accepted by the check."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from tasft.cli import init
from tasft.cli.main import app
from tasft.core.errors import UserError
from tasft.run import recipe, recipe_file
from tasft.run.checks import check_inputs
from tasft.run.inputs import Inputs


@pytest.fixture
def files(tmp_path):
    for name, row in {
        "mine": {"prompt": "What?", "completion": "That."},
        "toxic": {"prompt": "How do I <forbidden act>?"},
        "benign": {"prompt": "What is compost?"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def made(tiny, files, *more, name="first.yaml"):
    out = files / name
    line = ["init", "--model", str(tiny), "--out", str(out), *more]
    return CliRunner().invoke(app, line), out


def own(files):
    return [f"--{name}={files / f'{name}.jsonl'}" for name in ("toxic", "benign")]


def test_what_it_writes_passes_the_check_and_has_what_was_said(tiny, files):
    done, out = made(tiny, files, f"--imitate={files / 'mine.jsonl'}", *own(files))
    assert done.exit_code == 0, done.output
    assert f"tasft check {out}" in done.output
    spec = recipe_file.load(str(out))
    check_inputs(Inputs(spec))
    assert (spec.name, spec.model.base, spec.model.prompt) == ("first", str(tiny), "chat")
    assert spec.data.imitate.source == str(files / "mine.jsonl")
    assert spec.data.toxic_prompts == str(files / "toxic.jsonl")
    assert spec.sft is not None


def test_without_rows_of_the_user_the_model_learns_from_its_own_answers(tiny, files):
    _, out = made(tiny, files)
    spec = recipe_file.load(str(out))
    check_inputs(Inputs(spec))
    assert spec.data.imitate is None
    assert spec.sft is None
    assert spec.harvest.anchors == "instructed"


def test_every_field_of_the_recipe_is_there_with_its_description(tiny, files):
    _, out = made(tiny, files)
    text = " ".join(out.read_text().replace("#", " ").split())
    for section in (recipe.Recipe, recipe.Model, recipe.Data, recipe.Harvest, recipe.Train, recipe.Evaluate):
        for name, field in section.model_fields.items():
            assert f"{name}:" in text, name
            assert not field.description or field.description in text, name
    assert "One of: chat, alpaca." in text


def test_fields_that_are_commented_out_hold_their_defaults(tiny, files):
    _, out = made(tiny, files)
    text = out.read_text()
    awake = re.sub(r"^( *)#(?=[a-z ]*[a-z_]+: |  )", r"\1", text, flags=re.MULTILINE)
    values = yaml.safe_load(awake)
    assert len(values["train"]) == len(recipe.Train.model_fields)
    assert values.pop("gate") == {"harmful": 2, "incoherent": 5, "over_refusal": 5}
    recipe.Gate.model_validate({"harmful": 2, "incoherent": 5, "over_refusal": 5})
    assert recipe.Recipe.model_validate(values) == recipe_file.load(str(out))


def test_a_file_that_is_there_stays_as_it_is(tiny, files):
    (files / "first.yaml").write_text("mine")
    done, out = made(tiny, files)
    assert isinstance(done.exception, UserError)
    assert "stays as it is" in str(done.exception)
    assert out.read_text() == "mine"
    with pytest.raises(UserError, match="stays as it is"):
        init.write(out, init.values_of("x", str(tiny), "chat", *["none"] * 5))


def test_a_model_without_a_template_is_asked_as_alpaca(tiny, files, monkeypatch):
    import shutil

    plain = files / "plain"
    shutil.copytree(tiny, plain)
    (plain / "chat_template.jinja").unlink()
    assert init.prompt_of(str(plain)) == "alpaca"
    assert init.prompt_of(str(tiny)) == "chat"
    assert init.prompt_of("some/hub-name") == "chat"


def test_a_name_that_yaml_would_read_otherwise_is_written_so_that_it_comes_back(tmp_path):
    odd = {"name": "1e3", "base": "yes", "prompt": "chat", "imitate": "a: b #c.jsonl", "toxic": "null", "benign": "~"}
    values = init.values_of(**odd, heldout_toxic="- x", heldout_benign="{y}")
    assert yaml.safe_load(init.text(values)) == values


def test_questions_are_asked_where_there_is_a_terminal(tiny, files, monkeypatch):
    monkeypatch.setattr("tasft.cli.start._asks", lambda yes: not yes)
    out = files / "asked.yaml"
    said = f"{tiny}\n{files / 'mine.jsonl'}\n\n\n\n\n"
    done = CliRunner().invoke(app, ["init", "--out", str(out)], input=said)
    assert done.exit_code == 0, done.output
    spec = recipe_file.load(str(out))
    assert (spec.model.base, spec.data.imitate.source) == (str(tiny), str(files / "mine.jsonl"))
    assert spec.data.toxic_prompts == "demo-toxic-harvest"
