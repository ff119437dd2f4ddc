"""The demo's own recipe on its own model, in miniature."""

import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT, needs_models, tasft_here
from jsonschema import validate
from pydantic import TypeAdapter

from tasft.data.rows import Example, read_prompts
from tasft.judges.base import Verdict
from tasft.models.engine import Reply
from tasft.run import recipe_file
from tasft.run.pipeline import Pipeline


def few(folder, source, count):
    prompts = read_prompts(source)[:count]
    path = folder / f"{source}.jsonl"
    rows = [{"id": prompt.id, "prompt": prompt.prompt, "kind": prompt.kind} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_models
def test_the_demo_runs_on_the_real_model_in_miniature(tmp_path):
    overrides = [
        f"data.toxic_prompts={few(tmp_path, 'demo-toxic-harvest', 6)}",
        f"data.benign_prompts={few(tmp_path, 'demo-benign-train', 4)}",
        f"evaluate.sets.toxic.source={few(tmp_path, 'demo-toxic-heldout', 3)}",
        f"evaluate.sets.benign.source={few(tmp_path, 'demo-benign-heldout', 3)}",
        f"evaluate.sets.plain.source={few(tmp_path, 'demo-plain-heldout', 3)}",
        "harvest.max_new_tokens=24",
        "evaluate.max_new_tokens=16",
        "train.max_steps=3",
        "train.batch_size=3",
        "train.avoid_per_step=1",
        "gate={harmful: 100}",
        "evaluate.judges=[refusal_matching, classifier]",
    ]
    run = tmp_path / "run"
    Pipeline(recipe_file.load("demo", overrides), run).go()
    summary = json.loads((run / "harvest" / "summary.json").read_text())
    assert summary["kept"] >= 1
    assert summary["anchors"]["kept"] >= 1
    metrics = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    # An instruction-tuned model on its own answers: far from random (ln 49152 = 10.8), not yet memorised.
    assert 0.3 < metrics[0]["imitate_nll"] < 3
    for state in ("base", "final"):
        for judge in ("refusal_matching", "classifier"):
            rates = json.loads((run / "evaluate" / state / "toxic" / judge / "summary.json").read_text())
            undecided = rates.get("undecided", {"value": 0.0})["value"]
            assert rates["harmful"]["n"] + round(3 * undecided) == 3
    page = (run / "report" / "index.html").read_text()
    assert page.count("<script") == 2  # the replies as data, and the one that shows them
    assert "Content-Security-Policy" in page
    follow_their_schemas(run)


@needs_models
def test_the_first_page_is_there_after_one_command(tmp_path):
    done = tasft_here("run", "try", "--out", tmp_path / "try")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "try" / "report" / "index.html").exists()
    assert json.loads((tmp_path / "try" / "harvest" / "summary.json").read_text())["kept"] >= 3


def follow_their_schemas(run):
    """The schemas of the page on files, `docs/site.py`, hold of a real run."""
    schemas = [json.loads(path.read_text()) for path in (ROOT / "docs" / "schemas").glob("*.json")]
    kinds = {"**/replies.jsonl": Reply, "**/verdicts.jsonl": Verdict, "train/data.jsonl": Example}
    schemas += [{"files": files, **TypeAdapter(kind).json_schema()} for files, kind in kinds.items()]
    for schema in schemas:
        paths = list(run.glob(schema["files"]))
        assert paths, schema["files"]
        for path in paths:
            text = path.read_text()
            for row in map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text]):
                validate(row, schema)


@needs_models
@pytest.mark.slow
def test_a_killed_harvest_of_the_real_model_loses_nothing_and_ends_the_same(tmp_path):
    arguments = [
        "harvest",
        "demo",
        f"data.toxic_prompts={few(tmp_path, 'demo-toxic-harvest', 4)}",
        f"data.benign_prompts={few(tmp_path, 'demo-benign-train', 4)}",
        "harvest.max_new_tokens=24",
        "harvest.judge=refusal_matching",  # With so few prompts another may find no harmful answer.
    ]

    def start(run):
        script = "import sys; from tasft.cli.main import main; sys.argv[1:] = " + repr([*arguments, "--out", str(run)])
        return subprocess.Popen([sys.executable, "-c", script + "; main()"], stdout=subprocess.DEVNULL)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait(300) == 0
    process = start(cut)
    replies = cut / "harvest" / "replies.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not (replies.exists() and replies.stat().st_size):
            assert time.monotonic() < deadline, "no reply came"
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    survived = replies.read_bytes()
    assert not (cut / "harvest" / "done.json").exists()
    assert start(cut).wait(300) == 0
    assert replies.read_bytes().startswith(survived)
    for name in ("replies.jsonl", "verdicts.jsonl", "avoid.jsonl", "anchor.jsonl", "imitate.jsonl", "summary.json"):
        assert (cut / "harvest" / name).read_bytes() == (whole / "harvest" / name).read_bytes(), name
