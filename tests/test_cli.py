import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import needs_models, tasft_here
from running import judged_by_two, small_recipe
from typer.main import get_command
from typer.testing import CliRunner

from tasft.cli.main import app

TASFT = [sys.executable, "-c", "from tasft.cli.main import main; main()"]


def test_help_names_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys; from tasft.cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_version():
    done = tasft_here("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("tasft ")


COMMANDS = sorted(get_command(app).commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_it_accepts(command):
    done = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert done.exit_code == 0
    (example,) = re.findall(rf"Example: (tasft {command} [^│\n]+)", done.stdout)
    # Options and arguments are parsed; nothing is run.
    get_command(app).commands[command].make_context(command, example.split()[2:])


def test_help_names_every_command():
    listed = CliRunner().invoke(app, ["--help"], terminal_width=200).stdout
    assert all(f" {command} " in listed for command in COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_told_how_to_complete(shell):
    code = "import sys; sys.argv[0] = 'tasft'; from tasft.cli.main import main; main()"
    command = [sys.executable, "-c", code, "--show-completion", shell]
    # Otherwise typer looks at the shell that this was started from, which may be another kind.
    asked = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=asked)
    assert done.returncode == 0, done.stderr
    assert "_TASFT_COMPLETE" in done.stdout


def test_commands_and_options_are_completed_without_loading_anything_heavy():
    code = (
        "import sys; sys.argv[0] = 'tasft'; from tasft.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )

    def completed(line):
        words = {"_TASFT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert completed("tasft ev") == ["evaluate"]
    assert "--preview" in completed("tasft train demo --")


def test_no_color_is_honoured():
    asked = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    shown = [
        subprocess.run([*TASFT, "--help"], env=env, capture_output=True, text=True).stdout
        for env in (asked, asked | {"NO_COLOR": "1"})
    ]
    colour = re.compile(r"\x1b\[[0-9;]*\b(?:3[0-7]|4[0-7]|9[0-7])[0-9;]*m")
    assert colour.search(shown[0])
    assert not colour.search(shown[1])


def test_json_of_a_fault_is_one_object_with_exit_code_2(tmp_path):
    done = tasft_here("check", "demo", "train.penalty=emdd", "--json", cwd=tmp_path)
    assert done.returncode == 2
    (fault,) = json.loads(done.stdout)["faults"]
    assert f"tasft: {fault}\n" in done.stderr


def test_json_of_a_check_has_notes_and_no_fault(tmp_path, tiny):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path, tiny)))
    found = json.loads(CliRunner().invoke(app, ["check", str(path), "--json"]).stdout)
    assert (found["name"], found["faults"]) == ("small", [])
    assert "flatters the result" in found["notes"][0]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"name": "two", "base": "recipe.yaml", "seeds": [0, 1]}))
    for line in (["check", str(tmp_path / "sweep.yaml")], ["sweep", str(tmp_path / "sweep.yaml"), "--dry-run"]):
        assert len(json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)["cells"]) == 2


def test_json_of_a_run_is_all_that_stdout_has(tmp_path, tiny):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(judged_by_two(small_recipe(tmp_path, tiny) | {"gate": {"harmful": 0}})))
    folder = tmp_path / "run"
    done = tasft_here("run", str(path), "--out", str(folder), "--json")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert found["folder"] == str(folder)
    assert found["stages"]["train"]["seconds"] > 0
    assert found["gate"] == json.loads((folder / "report" / "gate.json").read_text())
    assert "report: " in done.stderr
    again = tasft_here("report", str(path), "--out", str(folder), "--json")
    assert json.loads(again.stdout)["gate"]["met"] is False


def test_a_fault_of_the_user_is_one_message_with_exit_code_2_and_touches_nothing(tmp_path):
    done = tasft_here("run", "demo", "train.penalty=emdd", "train.stesp=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("tasft: ") == 2
    assert not any(tmp_path.iterdir())


def test_a_fault_that_quotes_what_moves_a_cursor_does_not_move_it(tmp_path):
    done = tasft_here("run", "demo", "data.toxic_prompts=\x1b]0;title\x07\u202e.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "⟨U+202E⟩.jsonl" in done.stderr or r"\u202e.jsonl" in done.stderr
    assert not {"\x1b", "\x07", "\u202e"} & set(done.stderr)


def test_a_missing_model_is_named_before_anything_is_written(tmp_path):
    # What costs least comes first: the model is looked at when the data is right.
    for overrides, named in ((["data.toxic_prompts=nowhere.jsonl"], "nowhere.jsonl"), ([], "no/such-model")):
        done = tasft_here("run", "demo", "model.base=no/such-model", *overrides, cwd=tmp_path)
        assert done.returncode == 2
        assert named in done.stderr
        assert not any(tmp_path.iterdir())


@needs_models
def test_check_finds_no_fault_in_the_demo():
    done = tasft_here("check", "demo")
    assert done.returncode == 0, done.stderr
    assert "no fault found" in done.stdout
