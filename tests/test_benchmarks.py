"""`benchmarks/gpu.py` and `speed.py`: rehearsed in small, and what a part can do to the others."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT, needs_models


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("gpu")


@pytest.fixture
def parts(gpu):
    return import_module("parts")


def python(parts, program, seconds=60.0, table=None):
    return parts.Part("A part", (sys.executable, "-c", program, "{json}"), seconds, table)


@pytest.mark.parametrize(
    ("program", "seconds", "ended", "result"),
    [
        ("import sys; open(sys.argv[1], 'w').write('{\"rows\": 1}'); print('said')", 60, "done", {"rows": 1}),
        ("print('said'); raise SystemExit(3)", 60, "ended with exit code 3", None),
        (
            "import sys, time; open(sys.argv[1], 'w').write('{}'); print('said', flush=True); time.sleep(60)",
            2,
            "stopped after 2 s",
            {},
        ),
        ("import sys; open(sys.argv[1], 'w').write('{\"rows'); print('said')", 60, "done", None),
    ],
    ids=["done", "fails", "too long", "half a file"],
)
def test_what_a_part_left_is_kept_however_it_ends(parts, tmp_path, program, seconds, ended, result):
    found = parts.run(python(parts, program, seconds), tmp_path / "part.json")
    assert (found["ended"], found["result"], found["said"]) == (ended, result, ["said"])


def test_a_table_that_cannot_be_made_does_not_lose_the_page(gpu, parts):
    environment = parts.environment("cpu", "float32", 1)
    found = {"ended": "done", "seconds": 1.0, "result": {"half": True}, "said": []}
    wanted = {
        "loss": python(parts, "", table=gpu.loss.table),
        "step": python(parts, "", table=lambda result: "| table |"),
    }
    page = parts.page("Measured", {"environment": environment, "parts": dict.fromkeys(wanted, found)}, wanted)
    assert "No table: KeyError" in page
    assert "| table |" in page


def test_it_takes_at_most_ten_minutes(gpu, parts):
    assert sum(part.seconds + parts.GRACE for part in gpu.parts(rehearse=False).values()) <= 600
    assert gpu.parts(rehearse=True).keys() == gpu.parts(rehearse=False).keys()


@pytest.mark.slow
def test_a_rehearsal_writes_one_json_and_one_page(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(tmp_path / "gpu")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["ended"] for name, part in parts.items()} == dict.fromkeys(
        ("kernels", "loss", "step", "step-4bit"), "done"
    )
    assert {row["variant"] for row in parts["loss"]["result"]["rows"]} >= {"naive", "emd", "nlcl", "trl", "liger"}
    assert parts["step"]["result"]["rows"][0]["time_s"] > 0
    assert "needs a GPU" in parts["step-4bit"]["result"]["rows"][0]["not_run"]
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("\n## ") == 4
    assert "No table" not in page


@pytest.mark.slow
@needs_models
def test_how_soon_a_page_opens_is_measured(chromium, tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/report.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["results"]
    assert found["replies"] == 400
    assert 0 < found["open_s_median"] <= found["open_s_worst"]


@pytest.mark.slow
def test_a_quick_look_at_speed_has_every_part(tmp_path):
    command = [sys.executable, "benchmarks/speed.py", "--quick", "--out", str(tmp_path / "speed")]
    subprocess.run(command, cwd=ROOT, check=True)
    parts = json.loads((tmp_path / "speed.json").read_text())["parts"]
    assert {"generate-float32", "step-float32", "demo"} <= parts.keys()
    assert {part["ended"] for part in parts.values()} == {"done"}
    assert parts["demo"]["result"]["stages"]["train"]["seconds"] > 0
    assert "| together |" in (tmp_path / "speed.md").read_text()
