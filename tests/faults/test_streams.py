"""Neither a terminal nor the lack of one, nor a locale, nor a full disk ends a command after its work is done."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import tasft_here
from running import small_recipe
from test_cli import TASFT
from test_world import mounted

ROW = {"prompt": "What?", "completion": "That is ü.", "label": True}


@pytest.fixture
def disk(tmp_path):
    yield from mounted(tmp_path)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pärs ✓.jsonl"
    path.write_text((json.dumps(ROW, ensure_ascii=False) + "\n") * 3, encoding="utf-8")
    return path


def judge(pairs, *more):
    return [*TASFT, "judge", str(pairs), "--judge", "refusal_matching", *more]


def verdicts(pairs):
    return pairs.with_name(f"{pairs.name}.refusal_matching.jsonl").read_text().splitlines()


SEVERAL = """
import sys
from tasft.cli.main import main

for words in (["--help"], ["judge", "--help"], ["check", "demo", "train.penality=nlcl"]):
    sys.argv = ["tasft", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code in (None, 0, 2), words
"""
SURROUNDINGS = {
    "no locale": {"LANG": "C", "LC_ALL": "C"},
    "an old locale": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "one column": {"COLUMNS": "1", "LINES": "1"},
    "none": {"COLUMNS": "0", "TERM": "dumb", "NO_COLOR": "1"},
    "no terminal at all": {"TERM": ""},
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_in_any_surroundings_the_work_is_done_and_shown(pairs, name):
    environment = os.environ | SURROUNDINGS[name]
    if name == "an old locale":
        done = subprocess.run(judge(pairs), capture_output=True, env=environment)
        assert done.returncode == 2
        assert b"cannot be read in this locale: set PYTHONUTF8=1" in done.stderr
        pairs = pairs.rename(pairs.with_name("pairs.jsonl"))
    done = subprocess.run(judge(pairs), capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(verdicts(pairs)) == 3
    assert b"Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-c", SEVERAL], capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-", "| true", "2>&1 | true"])
def test_streams_that_are_closed_end_nothing(pairs, closed):
    script = f'set -o pipefail; "$@" {closed}'
    done = subprocess.run(["bash", "-c", script, "-", *judge(pairs, "--json")], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(verdicts(pairs)) == 3
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_what_could_not_be_printed_is_said_after_the_work_is_done(pairs):
    with open("/dev/full", "w") as full:
        done = subprocess.run(judge(pairs, "--json"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert len(verdicts(pairs)) == 3
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "tasft: what was printed is lost (No space left on device); files are whole"
    )


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_done(tmp_path):
    for words in (["check", b"r\xff.yaml"], ["run", "demo", "--out", b"r\xff"], ["evaluate", b"m\xff"]):
        done = subprocess.run([*TASFT, *words], capture_output=True, cwd=tmp_path)
        assert done.returncode == 2
        assert b"is not UTF-8: rename the file or folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run, its recipe, and the model alone evaluated."""
    folder = tmp_path_factory.mktemp("whole")
    values = small_recipe(folder, tiny)
    values["train"] |= {"max_steps": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for words in (
        ["run", "recipe.yaml", "--out", "run"],
        ["evaluate", str(tiny), "--sets", "demo-toxic-heldout", "--judge", "refusal_matching", "--limit", "2"],
    ):
        out = ["--out", "alone"] if words[0] == "evaluate" else []
        done = tasft_here(*words, *out, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


COMMANDS = {
    "judge": ["judge", "DISK/pairs.jsonl", "--judge", "refusal_matching", "--json"],
    "evaluate": ["evaluate", "TINY", "--sets", "demo-toxic-heldout", "--judge", "refusal_matching", "--limit", "2",
                 "--out", "DISK/new", "--json"],
    "harvest": ["harvest", "WHOLE/recipe.yaml", "--out", "DISK/new"],
    "train": ["train", "WHOLE/recipe.yaml", "train.max_steps=3", "--out", "DISK/run"],
    "report": ["report", "DISK/run", "train.save_steps=7", "--json"],  # That concerns the report alone.
    "export": ["export", "WHOLE/run", "DISK/model", "--json"],
    "init": ["init", "--model", "TINY", "--yes", "--out", "DISK/r.yaml"],
    "sweep": ["sweep", "WHOLE/sweep.yaml", "--out", "DISK/sweep", "--json"],
    "compare": ["compare", "WHOLE/run/evaluate/base", "WHOLE/run", "--out", "DISK/beside", "--json"],
    "a page of a judge": ["judge", "WHOLE/pairs.jsonl", "--judge", "refusal_matching", "--labels", "label",
                          "--label-of", "refusal", "--page", "DISK/page.html", "--json"],
    "a table of a judge": ["judge", "WHOLE/pairs.jsonl", "--judge", "refusal_matching", "--table", "DISK/t.csv",
                           "--json"],
}  # fmt: skip


@pytest.mark.parametrize("state", ["full", "read-only"])
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_a_disk_refuses_and_leaves_nothing_half_written(whole, tiny, disk, name, state):
    (whole / "sweep.yaml").write_text(yaml.safe_dump({"name": "s", "base": "recipe.yaml", "grid": {"seed": [1]}}))
    (whole / "pairs.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    (disk.place / "pairs.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    shutil.copytree(whole / "run", disk.place / "run", ignore=shutil.ignore_patterns(".lock*"))
    before = {path for path in disk.place.rglob("*") if path.is_file()}
    places = {"DISK": disk.place, "TINY": tiny, "WHOLE": whole}
    words = COMMANDS[name]
    for mark, place in places.items():
        words = [word.replace(mark, str(place)) for word in words]
    disk.leave(0) if state == "full" else disk.remount("ro")
    try:
        done = tasft_here(*words)
    finally:
        disk.remount("rw")
    assert "Traceback" not in done.stderr, done.stderr
    if name == "report" and done.returncode == 0:
        return  # Nothing was to be written.
    assert done.returncode == 2, done.stderr
    assert any(word in done.stderr for word in ("No space left on device", "Read-only file system"))
    if "--json" in words:
        assert json.loads(done.stdout)["faults"]
    new = {path for path in disk.place.rglob("*") if path.is_file()} - before - {disk.filler}
    assert not [path for path in new if path.suffix == ".yaml"]
    if name in ("init", "judge"):
        disk.filler.unlink(missing_ok=True)
        done = tasft_here(*words)
        assert done.returncode == 0, done.stderr
