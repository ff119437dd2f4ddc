"""What this machine can do, said without asking anybody."""

import json
import socket
import time

import pytest
from conftest import needs_models
from packaging.requirements import Requirement
from rich.console import Console
from typer.testing import CliRunner

from tasft.cli import doctor
from tasft.cli.main import app


def test_it_says_what_is_here_and_asks_nobody(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"asked {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert found["packages"]["torch"]
    assert 0 < found["memory_gib"]["free"] <= found["memory_gib"]["total"]
    assert found["disk_gib"]["total"] > 0
    assert found["cores"] >= 1
    assert found["precision"]["dtype"] in ("float32", "bfloat16")
    assert found["precision"]["why"]
    assert found["hub"]["reached"] is None


def test_the_table_has_every_line_and_no_escape_where_there_is_no_terminal():
    found = doctor.examine()
    found["extras"] = {"kto": {"missing": ["trl is not installed"], "install": "pip install '.[kto]'"}}
    found["packages"]["torch"] = "2\x1b]0;title\x07"
    with (console := Console(width=200)).capture() as caught:
        console.print(doctor.table(found))
    text = caught.get()
    for what in ("python", "torch", "GPU", "precision", "memory", "disk", "extra kto", "pip install '.[kto]'", "hub"):
        assert what in text, what
    assert not {"\x1b", "\x07"} & set(text)


@needs_models
def test_models_that_came_as_packages_are_here():
    here = {name for name, about in doctor.examine()["models"].items() if about["here"]}
    assert here >= {"smollm2-135m-instruct", "sentence encoder"}


def test_a_package_that_is_missing_or_too_old_is_named():
    wanted = [Requirement(line) for line in ("torch>=1", "torch>=99", "no-such-package>=1")]
    old, gone = doctor.missing(wanted)
    assert old.startswith("torch 2")
    assert ">=99" in old
    assert gone == "no-such-package is not installed"


def test_what_an_extra_requires_is_apart_from_what_the_package_does():
    found = doctor.requirements_of("huggingface_hub")
    assert "filelock" in {each.name for each in found[""]}
    assert "torch" in {each.name for each in found["torch"]}
    assert "torch" not in {each.name for each in found[""]}


def test_a_hub_that_is_not_reached_is_said_and_not_waited_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    started = time.monotonic()
    hub = doctor.examine(ask_hub=True)["hub"]
    assert hub["reached"] is False
    assert "no route" in hub["reason"]
    assert time.monotonic() - started < 30


def test_a_missing_requirement_ends_with_exit_code_2(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda hub: doctor_with_a_fault)
    doctor_with_a_fault = {"faults": ["torch is not installed: pip install tasft"]}
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(done.stdout) == doctor_with_a_fault
    assert "torch is not installed" in str(done.exception)


@pytest.mark.parametrize("limit", ["max", "1073741824"])
def test_a_containers_limit_is_its_memory(tmp_path, monkeypatch, limit):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(doctor, "_LIMITS", (str(tmp_path / "memory.max"),))
    total = doctor.examine()["memory_gib"]["total"]
    assert (total == 1.0) is (limit != "max")
