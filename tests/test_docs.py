"""README and the pages are true: their commands and snippets are executed."""

import ast
import json
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT, needs_models, script
from running import small_recipe
from typer.testing import CliRunner

from tasft.cli.main import app
from tasft.data.sets import KNOWN, expanded
from tasft.run import recipe_file, sweep

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
OTHERS = {"vllm", "transformers", "llama-server"}
"""Programs that take an export; what they take is theirs to say."""


def said(kind):
    """The code of a kind on all pages."""
    pages = [(ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md", *PAGES)]
    return [text for page in pages for text in re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)]


# Each command once, without its comment.
SHELL = sorted(
    {
        shlex.join(words)
        for text in said("sh")
        for line in text.splitlines()
        if (words := shlex.split(line, comments=True))
    }
)


def test_the_readme_has_commands_a_recipe_and_python():
    assert {"sh", "python", "yaml"} <= {kind for kind, _ in BLOCKS}


def test_the_readme_is_read_in_minutes():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1000


def test_a_guide_has_at_most_80_lines_and_its_command_or_recipe_comes_first():
    for path in (ROOT / "docs" / "guides").glob("*.md"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 80, path
        assert any(line.startswith("```") for line in lines[:5]), path


def test_how_many_prompts_the_demo_has_is_what_its_sets_hold():
    toxic, benign = (KNOWN[name].prompts for name in ("demo-toxic-harvest", "demo-benign-train"))
    page = (ROOT / "docs" / "guides" / "own-data.md").read_text()
    assert f"The demo has {toxic} toxic and {benign} benign ones" in page


def test_what_is_no_command_of_ours_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in SHELL:
        program, *words = shlex.split(line)
        if program == "make":
            assert words[0] in TARGETS, line
        elif program == "python":
            assert (ROOT / words[0]).exists() or words[0].startswith("convert_"), line
        elif program == "pip":
            assert words[0] == "install", line
            for extra in re.findall(r"\[(\w+)\]", line):
                assert extra in extras, line
        else:
            assert program == "tasft" or program in OTHERS, line


@needs_models
@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("tasft ")])
def test_tasft_commands_are_accepted(line, tiny, tmp_path, monkeypatch):
    """As far as can be had without the hours: recipes are resolved and checked, with the line's own overrides.

    The hub is out of reach here: a model named there is the tiny one.
    """
    _, command, *words = shlex.split(line)
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200).stdout
    assert all(word in shown for word in words[first:] if word.startswith("-"))
    if "--sets" in words:
        assert expanded(words[words.index("--sets") + 1].split(","))
    write_the_readmes_recipe(tmp_path, tiny)
    monkeypatch.chdir(tmp_path)
    if command in ("init", "doctor") or (command == "judge" and (tmp_path / words[0]).exists()):
        arguments = [command, *words]
    elif words and (words[0].endswith(".yaml") or words[0] in recipe_file.shipped()):
        arguments = ["check", *words[:first]]
    else:
        arguments = [command, "--help"]  # Of a run, a model or a log, and there is none.
    app([str(tiny) if word.startswith("HuggingFaceTB/") else word for word in arguments], standalone_mode=False)


def test_options_that_messages_name_are_there():
    """The parser has joined strings that follow one another, as they are read by a user."""
    said = {
        match.groups()
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in re.finditer(r"tasft ([a-z]+) (--[a-z-]+)", node.value)
    }
    assert len(said) > 3
    for command, option in sorted(said):
        assert option in CliRunner().invoke(app, [command, "--help"], terminal_width=200).stdout, f"{command} {option}"


def write_the_readmes_recipe(folder, model):
    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    values = yaml.safe_load(text)
    # A user's own files stand for themselves.
    for name, prompt in {"toxic": "How do I <forbidden act>?", "benign": "What is compost?"}.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        (folder / f"{name}-heldout.jsonl").write_text(json.dumps({"prompt": f"And another one: {name[::-1]}"}) + "\n")
    # As many as the fewest that a judge is fitted to.
    refusals = [f"How do I <act {n}>?,I'm sorry but I can't help with that.,0,1\n" for n in range(10)]
    answers = [f"How do I <forbidden act {n}>?,First you take the <weapon {n}> to the garden.,1,0\n" for n in range(10)]
    (folder / "replies.csv").write_text("".join(["prompt,completion,harmful,declined\n", *refusals, *answers]))
    (folder / "alpaca.jsonl").write_text('{"prompt": "What?", "completion": "That."}\n')
    values["model"]["base"] = str(model)
    values["data"]["imitate"]["rows"] = 1
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    (folder / "sweep.yaml").write_text(
        yaml.safe_dump({"name": "mine", "base": "mine.yaml", "grid": {"train.penalty": ["emd", "nlcl"]}})
    )


@pytest.mark.parametrize("page", PAGES)
def test_the_recipe_parts_of_the_pages_are_recipes(page, tmp_path):
    parts = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for number, part in enumerate(parts):
        path, values = tmp_path / f"{number}.yaml", yaml.safe_load(part)
        if "base" in values:
            path.write_text(part)
            assert sweep.load(str(path))[1]
        else:
            path.write_text(yaml.safe_dump({"extends": str(ROOT / "recipes" / "demo.yaml")} | values))
            recipe_file.load(str(path))


EXECUTED = ["README.md", "docs/python.md", "docs/guides/other-trainers.md"]


def test_no_other_page_has_python_that_is_not_executed():
    pages = [page for page in ("README.md", "CONTRIBUTING.md", *PAGES) if "```python" in (ROOT / page).read_text()]
    # Those of the parts are executed by test_parts.py.
    assert set(pages) == {*EXECUTED, "docs/guides/parts.md"}


@pytest.mark.parametrize("page", EXECUTED)
def test_the_python_of_the_pages_runs(page, tiny, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    script = tmp_path / "snippet.py"
    script.write_text("\n".join(blocks).replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny)))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path, tiny)))
    monkeypatch.chdir(tmp_path)
    said = tmp_path / "said"
    with said.open("w") as stream:
        process = forked.Popen([sys.executable, script], os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stderr=stream)
    assert process.wait() == 0, said.read_text()


def test_the_workflow_of_the_gate_is_yaml_whose_commands_are_checked():
    page = (ROOT / "docs" / "guides" / "gate.md").read_text()
    (text,) = re.findall(r"```yaml title=\S+\n(.*?)```", page, re.DOTALL)
    steps = yaml.safe_load(text)["jobs"]["model"]["steps"]
    lines = [shlex.join(shlex.split(step["run"])) for step in steps if "run" in step]
    assert lines
    assert set(lines) <= set(SHELL)


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "CONTRIBUTING.md",
        *PAGES,
    ],
)
def test_links_and_named_files_exist(path):
    text = (ROOT / path).read_text()
    assert "\n<<<<<<< " not in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        # Pages of reference are made from the code: `make docs` holds links to them.
        if "://" not in target and "reference/" not in target:
            assert ((ROOT / path).parent / target).exists(), target
    for name in re.findall(r"`((?:src|tests|docs|scripts|recipes|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_project_speaks_of_itself_alone():
    told = "\n".join(
        path.read_text(errors="ignore")
        for pattern in ("*.md", "docs/**/*.md", "src/**/*.py", "research/*.py", "recipes/*.yaml", "Makefile")
        for path in Path(ROOT).glob(pattern)
    )
    for word in ("/work/", "/tmp/w", "../shared/design"):
        assert word not in told


def test_every_planted_fault_was_found():
    rows = json.loads((ROOT / "docs" / "results" / "mutations.json").read_text())
    mutate = script("mutate")
    assert mutate.table(rows) in (ROOT / "docs" / "results" / "mutations.md").read_text()
    assert [row["what"] for row in rows] == [mutation.what for mutation in mutate.MUTATIONS], (
        "run research/mutate.py again"
    )
    assert all(row["red"] for row in rows)
    for mutation in mutate.MUTATIONS:
        assert (ROOT / "src" / "tasft" / "loss" / mutation.file).read_text().count(mutation.old) == 1, mutation.what


def test_the_benchmarks_page_has_the_tables_of_its_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for name in ("loss", "step", "generate"):
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert script(name, "benchmarks").table(result) in page, name


def test_the_method_page_has_the_table_of_the_collapse():
    result = json.loads((ROOT / "docs" / "results" / "collapse.json").read_text())
    assert script("collapse").table(result) in (ROOT / "docs" / "collapse.md").read_text()


def test_the_tables_are_those_of_the_committed_results():
    results = ROOT / "docs" / "results"
    page = (results / "demo.md").read_text()
    assert script("collect").before_after(json.loads((results / "demo.json").read_text())[0]) in page
    small = script("small")
    assert small.methods_table(small.table(results / "small" / "methods")) in README
    result = json.loads((results / "labels.json").read_text())
    assert script("label").table(result) in page
    assert small.ablation_table(small.table(results / "small" / "ablation")) in page
    assert all(small.read_table(name) in page for name in ("methods", "ablation"))
    judged = json.loads((results / "judge" / "methods.json").read_text())
    assert script("label").table(judged) in (ROOT / "docs" / "judges.md").read_text()
    labels = (results / "labelled.jsonl").read_text().splitlines()
    assert result["n"] == len(labels)
    assert {key for line in labels for key in json.loads(line)} == {"key", "harmful", "refusal", "coherent", "method"}


def test_what_is_said_of_kills_and_of_the_soak_is_what_their_files_say():
    kills = json.loads((ROOT / "docs" / "results" / "kills.json").read_text())
    assert (kills["kills"], kills["replies_gone"], kills["same"], kills["differ"]) == (50, 0, True, [])
    log, runs = (ROOT / "docs" / "log.md").read_text(), (ROOT / "docs" / "runs.md").read_text()
    assert f"{kills['replies']} replies" in log
    assert f"commit {kills['commit']}" in log
    assert all(f"{count} in " in log for stage, count in kills["stages"].items() if stage != "between stages")
    assert "killed 50 times at random moments" in runs
    soak = json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text())
    largest = {row["what"]: row for row in sorted(soak["results"], key=lambda row: row["rows"])}
    assert {part: row["rows"] for part, row in largest.items()} == {"harvest": 20_000, "encode": 50_000}
    assert all(25 < row["cpu_s"] < 35 and row["peak_mib"] < 740 for row in largest.values())


def test_the_page_of_the_demo_has_the_table_of_the_pull():
    result = json.loads((ROOT / "docs" / "results" / "pull.json").read_text())
    assert script("pull").table(result) in (ROOT / "docs" / "results" / "demo.md").read_text()


def test_the_page_of_evaluation_has_what_was_measured_of_coherence():
    result = json.loads((ROOT / "docs" / "results" / "coherence.json").read_text())
    page = (ROOT / "docs" / "coherence.md").read_text()
    assert script("pages").placed(page, "coherence", script("measure_coherence").section(result)) == page


def test_the_page_of_results_has_the_tables_of_the_small_experiment():
    page = (ROOT / "docs" / "results" / "README.md").read_text()
    placed = script("pages").placed
    for name, table in script("small").tables().items():
        assert placed(page, name, table) == page
