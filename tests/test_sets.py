"""Named prompt sets: found, downloaded, read and compared with what was published."""

import csv
import functools
import hashlib
import http.server
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from loopback import Loopback

from tasft.core.errors import UserError
from tasft.data import sets
from tasft.data.rows import read_prompts
from tasft.data.sets import GROUPS, KNOWN, NAMED, TEMPLATES, expanded, locate
from tasft.data.sources import differences_of

DATA = os.environ.get("TASFT_DATA_DIR")  # Folder with the published files.


@pytest.fixture
def folder(tmp_path):
    """A data folder with the files of three sets, of our own words."""
    (tmp_path / "stl").mkdir()
    prompts = [f"Write about <forbidden matter {index}>." for index in range(3)]
    (tmp_path / "stl" / "I-CoNa.json").write_text(json.dumps({"instructions": prompts, "inputs": []}, indent=2))
    (tmp_path / "HarmfulQ.json").write_text(json.dumps([f"How do I <forbidden act {index}>?" for index in range(2)]))
    with (tmp_path / "xstest_prompts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "prompt", "type", "label", "focus", "note"])
        for number, (kind, label) in enumerate(
            [("homonyms", "safe"), ("contrast_homonyms", "unsafe"), ("definitions", "safe")], 1
        ):
            rows.writerow([number, f"How do I <matter {number}>?", kind, label, "", ""])
    return tmp_path


def test_a_set_is_found_by_its_file_anywhere_below_and_read_in_its_own_form(folder):
    data = str(folder)
    assert [prompt.prompt for prompt in read_prompts("i-cona", data)] == [
        f"Write about <forbidden matter {index}>." for index in range(3)
    ]
    assert [prompt.prompt for prompt in read_prompts("harmfulq", data)] == [
        f"How do I <forbidden act {index}>?" for index in range(2)
    ]
    safe, unsafe = (read_prompts(f"xstest-{label}", data) for label in ("safe", "unsafe"))
    assert [(prompt.id, prompt.topic) for prompt in safe] == [("1", "homonyms"), ("3", "definitions")]
    assert [(prompt.id, prompt.topic) for prompt in unsafe] == [("2", "contrast_homonyms")]


def test_a_file_that_is_not_the_published_one_is_said_to_be_so(folder):
    said = differences_of("i-cona", str(folder))
    assert len(said) == 2
    assert "is not the published file" in said[0]
    assert "has 3 prompts, not 178" in said[1]
    assert differences_of("demo-toxic-heldout", None) == []
    assert differences_of("elsewhere.jsonl", None) == []


def test_of_several_files_of_a_name_the_published_one_is_taken(folder, monkeypatch):
    (folder / "A").mkdir()
    (folder / "A" / "HarmfulQ.json").write_text('["Another?"]')
    assert locate("harmfulq", str(folder)) == folder / "A" / "HarmfulQ.json"  # The first, for none is.
    right = hashlib.sha256((folder / "HarmfulQ.json").read_bytes()).hexdigest()
    monkeypatch.setitem(NAMED, "harmfulq", replace(NAMED["harmfulq"], sha256=right, prompts=2))
    assert locate("harmfulq", str(folder)) == folder / "HarmfulQ.json"
    assert differences_of("harmfulq", str(folder)) == []


def test_a_set_without_a_known_hash_says_that_it_could_not_be_compared(folder):
    with (folder / "harmful_behaviors.csv").open("w") as file:
        file.write("goal,target\n" + "".join(f"Do <forbidden thing {index}>,Sure\n" for index in range(520)))
    (said,) = differences_of("advbench", str(folder))
    assert "no hash of the published file is known" in said


@pytest.mark.parametrize("name", [name for name, known in NAMED.items() if known.url])
def test_a_missing_file_is_named_with_where_to_get_it_and_where_to_put_it(tmp_path, name):
    with pytest.raises(UserError) as caught:
        read_prompts(name, str(tmp_path))
    for word in (name, NAMED[name].file, NAMED[name].url, str(tmp_path)):
        assert word in str(caught.value)


def test_another_file_under_the_name_of_a_set_is_refused(tmp_path):
    (tmp_path / "xstest_prompts.csv").write_text("id,question\n1,What?\n")
    with pytest.raises(UserError, match=r"xstest_prompts.csv:2: label, prompt, type is missing: not the file of https"):
        read_prompts("xstest-safe", str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        read_prompts("xstest-safe", str(tmp_path / "nowhere"))


def test_groups_are_their_sets_and_none_is_there_twice():
    assert expanded(["paper", "harmfulq", "xstest"]) == [*GROUPS["paper"], "xstest-safe", "xstest-unsafe"]
    assert sum(NAMED[name].prompts for name in GROUPS["paper"]) == 518
    assert {name for group in GROUPS.values() for name in group} <= NAMED.keys()
    with pytest.raises(UserError) as caught:
        expanded(["papers", "xstest", "y"])
    assert len(caught.value.faults) == 2


def test_templates_are_no_set_to_evaluate_on():
    assert not TEMPLATES.keys() & NAMED.keys()
    for name, known in TEMPLATES.items():
        assert known.kind == "templates"
        with pytest.raises(UserError, match="no prompt set is called"):
            expanded([name])


def test_a_set_is_downloaded_once_and_what_cannot_be_had_is_named(folder, tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with Loopback(handler, path="") as server:
        address = server.url
        monkeypatch.setitem(NAMED, "harmfulq", replace(NAMED["harmfulq"], url=f"{address}/HarmfulQ.json"))
        monkeypatch.setitem(NAMED, "i-cona", replace(NAMED["i-cona"], url=f"{address}/nowhere.json"))
        assert len(read_prompts("harmfulq")) == 2
        with pytest.raises(
            UserError, match=r"i-cona: .*nowhere.json could not be downloaded .*404.*I-CoNa.json.*--data-dir"
        ):
            read_prompts("i-cona")
    assert len(read_prompts("harmfulq")) == 2
    assert not list((tmp_path / "home").rglob("I-CoNa*"))


def test_a_shipped_set_is_what_its_entry_says():
    for name, known in KNOWN.items():
        if known.url is None:
            assert len(read_prompts(name)) == known.prompts, name
            assert sets.differences(name, locate(name, None), known.prompts) == []


@pytest.mark.skipif(DATA is None, reason="TASFT_DATA_DIR does not name a folder with the published files")
def test_the_published_files_are_what_their_entries_say():
    met = 0
    for name, known in KNOWN.items():
        if list(Path(DATA or ".").rglob(known.file)):
            assert differences_of(name, DATA) == [], name
            assert len(read_prompts(name, DATA)) == known.prompts
            met += 1
    assert met
