"""Faults of what a user gives, each with the sentences that it is met with. The tables are the YAML files here.

A case begins with a folder in which nothing is wrong and names what is done to it:

- `recipe`, `sweep`: fields laid over those of `recipe.yaml` or `sweep.yaml`; `without`: fields taken from `recipe.yaml`
- `write`, `bytes`, `gzip`: a file's text; its bytes, each written as the character of that number; its text, packed
- `edit`, `drop`: fields laid over those of a JSON file; fields taken from it
- `cut`: how much of a file is left, in bytes; `remove`, `folder`: what is not there, what is a folder instead
- `link`: a name and what it points to; `tensors`: of the model, each by name `null` (left out), a shape or a number

`do` is the command line, `tasft check recipe.yaml` if it is not said. `says` are all sentences of the answer, in which
`...` stands for any text. Exit code 2 follows, and nothing is changed but what is in the run folder `run`. Anywhere
`{long}`, `{digits}` and `{deep}` are 300 letters, 5,000 digits and 2,000 brackets, `{cwd}` is the folder.
"""

import gzip
import json
import os
import re
import shlex
import shutil
import sys
from copy import deepcopy
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tasft.cli import main

TABLES = sorted(Path(__file__).parent.glob("*.yaml"))
CASES = {
    (table.stem, case["cause"]): case
    for table in TABLES
    for case in yaml.load(table.read_text(encoding="utf-8"), yaml.CSafeLoader)
}
CHECK = "check recipe.yaml"

ROWS = {
    "toxic": [{"prompt": f"How do I <forbidden act {index}>?"} for index in range(4)],
    "benign": [{"prompt": f"What is <everyday thing {index}> for?"} for index in range(4)],
    "heldout": [{"prompt": f"Tell me how to <other forbidden act {index}>."} for index in range(3)],
    "everyday": [{"prompt": f"Please explain the <usual matter {index}> to me."} for index in range(3)],
    "imitate": [{"prompt": f"Name a colour, number {index}.", "completion": f"Blue {index}."} for index in range(4)],
    "templates": [{"prompt": "Say it as a poem: [INSERT PROMPT HERE]"}],
    "references": [{"instruction": "Name a fruit.", "output": "A pear."}],
}
RECIPE = {
    "name": "small",
    "model": {"base": "model", "lora": {"r": 2, "lora_dropout": 0.0}},
    "data": {"toxic_prompts": "toxic.jsonl", "benign_prompts": "benign.jsonl"},
    "harvest": {"max_new_tokens": 4, "judge": "refusal_matching", "temperature": 1.0},
    "train": {"max_steps": 2, "batch_size": 4, "avoid_per_step": 1},
    "evaluate": {
        "sets": {
            "toxic": {"source": "heldout.jsonl", "kind": "toxic"},
            "benign": {"source": "everyday.jsonl", "kind": "benign"},
        },
        "judges": ["refusal_matching"],
    },
}
SWEEP = {"name": "grid", "base": "recipe.yaml", "grid": {"train.penalty": ["emd", "nlcl"]}}
PAIRS = (
    "prompt,completion,harmful\nHow do I <act 1>?,I'm sorry but I can't help with that.,0\n"
    "How do I <act 2>?,First you take the lamp to the garden.,1\n"
)


@pytest.fixture
def good(tiny, tmp_path, monkeypatch):
    """A folder in which nothing is wrong, and the one in which the command runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "model")
    for name, rows in ROWS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    Path("pairs.csv").write_text(PAIRS)
    return tmp_path


def laid(values, above):
    """Fields with others over them; neither is changed."""
    below = values if isinstance(values, dict) else {}
    over = {key: laid(below.get(key), value) if isinstance(value, dict) else value for key, value in above.items()}
    return deepcopy(below) | over


def without(values, fields):
    for field in fields:
        *sections, name = field.split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        del inner[name]
    return values


def spelled(value):
    """A case with the texts in it that are too long for a table."""
    if isinstance(value, dict):
        return {spelled(key): spelled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [spelled(inner) for inner in value]
    if not isinstance(value, str):
        return value
    texts = {"{long}": "a" * 300, "{digits}": "1" * 5000, "{deep}": "[" * 2000, "{cwd}": str(Path.cwd())}
    return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], value)


def planted(case):
    """Make of the good folder the bad one."""
    fields = laid(RECIPE, case.get("recipe", {}))
    Path("recipe.yaml").write_text(yaml.safe_dump(without(fields, case.get("without", ()))))
    Path("sweep.yaml").write_text(yaml.safe_dump(laid(SWEEP, case.get("sweep", {})), sort_keys=False))
    for name in case.get("remove", ()):
        Path(name).unlink()
    for name, text in case.get("write", {}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8", newline="")
    for name, text in case.get("bytes", {}).items():
        Path(name).write_bytes(text.encode("latin-1"))
    for name, text in case.get("gzip", {}).items():
        Path(name).write_bytes(gzip.compress(text.encode()))
    for name, fields in case.get("drop", {}).items():
        Path(name).write_text(json.dumps(without(json.loads(Path(name).read_text()), fields)))
    for name, above in case.get("edit", {}).items():
        Path(name).write_text(json.dumps(laid(json.loads(Path(name).read_text()), above)))
    if tensors := case.get("tensors"):
        path = Path("model/model.safetensors")
        weights = load_file(path)
        for name, what in tensors.items():
            if what is None:
                del weights[name]
            elif isinstance(what, list):
                weights[name] = weights[name].new_zeros(what)
            else:
                weights[name] = weights[name].fill_(what)
        save_file(weights, path, {"format": "pt"})
    for name, size in case.get("cut", {}).items():
        Path(name).write_bytes(Path(name).read_bytes()[:size])
    for name in case.get("folder", ()):
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir()
    for name, target in case.get("link", {}).items():
        Path(name).unlink(missing_ok=True)
        Path(name).symlink_to(target)


def hashes(folder):
    return {
        path.relative_to(folder): sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "run"
    }


def tasft(line, monkeypatch, capsys):
    """Exit code, what was said to the user and what to the program of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["tasft", *shlex.split(line)])
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # The command puts its own in its place.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    capsys.readouterr()
    code = 0
    try:
        main.main()
    except SystemExit as end:
        code = end.code or 0
    said, out = capsys.readouterr()[::-1]
    return code, said, out


def faults_of(said):
    """The sentences of an answer; bars of progress are none."""
    found = re.split(r"^tasft: ", said.replace("\r", "\n"), flags=re.MULTILINE)[1:]
    return [fault.strip() for fault in found]


def fits(sentence, said):
    return re.fullmatch(".*".join(map(re.escape, sentence.split("..."))), said, re.DOTALL) is not None


@pytest.mark.parametrize(("table", "cause"), CASES)
def test_a_fault_is_met_with_its_sentence_and_nothing_is_changed(table, cause, good, monkeypatch, capsys):
    case = spelled(CASES[table, cause])
    planted(case)
    before = hashes(good)
    code, said, _ = tasft(case.get("do", CHECK), monkeypatch, capsys)
    says = case["says"] if isinstance(case["says"], list) else [case["says"]]
    found = faults_of(said)
    assert len(found) == len(says), said
    for sentence, fault in zip(says, found, strict=True):
        assert fits(sentence, fault), f"{fault}\n  is not\n{sentence}"
    assert code == 2
    assert hashes(good) == before


@pytest.mark.parametrize(
    "line",
    [
        "check recipe.yaml",
        "check recipe.yaml data.imitate.source=imitate.jsonl evaluate.quality.prompts=references.jsonl",
        "check recipe.yaml 'evaluate.jailbreak={set: toxic, templates: {source: templates.jsonl}}'",
        "check recipe.yaml model.prompt=alpaca data.imitate.source=imitate.jsonl train.method=kto",
        "check sweep.yaml",
        "judge pairs.csv --judge refusal_matching --labels harmful",
        "harvest recipe.yaml --out run",
        "evaluate model --sets demo-toxic-heldout --judge refusal_matching --limit 1 --out run",
    ],
)
def test_where_nothing_is_wrong_no_command_of_the_tables_finds_a_fault(line, good, monkeypatch, capsys):
    code, said, _ = tasft(line, monkeypatch, capsys)
    assert (code, faults_of(said)) == (0, [])


def test_there_are_two_hundred_causes_and_as_many_answers():
    causes = [case["cause"] for case in CASES.values()]
    assert len(set(causes)) == len(causes) == sum(table.read_text().count("\n- cause: ") for table in TABLES)
    answers = {str(case["says"]) for case in CASES.values()}
    assert len(answers) >= 200
