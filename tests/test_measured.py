"""Capability and quality as steps of a run, and in its report."""

import json

import pytest
import yaml
from running import done, go, redone
from test_capability import BOOLQ

from tasft.core.errors import UserError
from tasft.core.stats import Estimate
from tasft.report.blocks import Cell
from tasft.report.read import read_run
from tasft.report.record import Measured, Record
from tasft.report.tasks import _row, task_rows
from tasft.run import recipe_file
from tasft.run.pipeline import Pipeline

STEPS = {
    f"evaluate/{state}/{step}" for state in ("base", "final") for step in ("capability/boolq", "quality/reference")
}
STAGES = ("harvest", "train", "evaluate", "report")
STATES = {"base": "base model", "final": "final model"}
COMPARED = Record("x", STATES, "base", ["final"], sets=[], judges=[], attacks={}, measured={}, notes=[])


@pytest.fixture
def wide(small, tmp_path):
    """The small recipe with a task of lm-eval and reference answers."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "boolq_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BOOLQ))
    rows = [{"instruction": f"Explain <matter {k}>.", "output": "It is plain.", "generator": "g"} for k in range(6)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    values = yaml.safe_load(small.read_text())
    values["data"]["data_dir"] = str(tmp_path / "data")
    values["evaluate"] |= {
        "capability": {"tasks": ["boolq"], "limit": 6},
        "quality": {"prompts": str(tmp_path / "alpaca.json")},
    }
    small.write_text(yaml.safe_dump(values))
    return small


def test_they_are_steps_of_a_run_each_redone_for_its_own_settings_alone(wide, tmp_path):
    run = tmp_path / "run"
    go(wide, run, stages=STAGES)
    first = done(run)
    assert first.keys() >= STEPS
    summary = json.loads((run / "evaluate/final/capability/boolq/summary.json").read_text())
    assert summary["acc"]["n"] == 6
    assert summary["recipe"]
    moved = json.loads((run / "evaluate/final/quality/reference/summary.json").read_text())["kl_to_before"]
    assert moved["n"] == 6
    assert moved["value"] > 0
    base = json.loads((run / "evaluate/base/quality/reference/summary.json").read_text())["kl_to_before"]
    assert base["n"] == 0

    shown = {row[0]: row[1:] for row in task_rows(read_run(run))}
    measures = ("reference_nll", "reference_perplexity", "kl_to_before")
    assert shown.keys() == {f"quality/reference: {name}" for name in measures} | {"capability/boolq: acc"}
    assert shown["quality/reference: reference_perplexity"][2:] == ["—"]
    before, _, change = shown["capability/boolq: acc"]
    assert "n\u00a0=\u00a06" in before
    assert "n\u00a0=\u00a06" in change.text
    assert "p\u00a0=\u00a0" in change.detail
    assert shown["quality/reference: kl_to_before"][::2] == ["—", "—"]
    page, table = (run / "report" / "report.md").read_text(), (run / "report" / "results.csv").read_text()
    assert "Capability and quality" in page
    assert "General ability" not in page
    # Likelihoods are no measure of how good answers are.
    assert "The quality of benign answers" in page
    assert "final,capability/boolq,capability,,acc," in table

    go(wide, run, "evaluate.capability.limit=4", stages=STAGES)
    second = done(run)
    assert redone(first, second) == {step for step in STEPS if "capability" in step} | {"report"}
    go(wide, run, "evaluate.capability.limit=4", "evaluate.capability.batch_size=2", stages=STAGES)
    assert redone(second, done(run)) == {"report"}


def test_a_prompt_that_is_judged_is_not_trained_on(wide, tmp_path):
    benign = tmp_path / "benign.jsonl"
    benign.write_text(benign.read_text() + json.dumps({"id": "held-out", "prompt": "Explain <matter 3>."}) + "\n")
    assert "held-out" not in {
        prompt.id for prompt in Pipeline(recipe_file.load(str(wide)), tmp_path / "run").inputs.benign
    }


def test_faults_of_tasks_prompts_and_annotators_show_before_anything_is_written(wide, tmp_path):
    wrong = (
        "evaluate.capability.tasks=[bollq]",
        "evaluate.quality.prompts=nowhere.json",
        "evaluate.quality.annotator={config: nobody}",
    )
    with pytest.raises(UserError) as caught:
        go(wide, tmp_path / "run", *wrong)
    said = "\n".join(caught.value.faults)
    for fault in ("no task 'bollq'", "nowhere.json", "'nobody' is neither"):
        assert fault in said
    assert not (tmp_path / "run").exists()


def test_a_change_is_of_the_same_items_alone():
    def measured(outcomes, **more):
        items = [{"id": name, "filter": "none", "doc_hash": hashed, "acc": value} for name, hashed, value in outcomes]
        value = sum(row["acc"] for row in items) / len(items)
        return Measured({"acc": Estimate(value, value - 0.1, value + 0.1, len(items))}, items)

    before = measured([("a", "1", 0.0), ("b", "2", 0.0), ("c", "3", 1.0), ("only before", "4", 1.0)])
    after = measured([("a", "1", 1.0), ("b", "2", 1.0), ("c", "another text", 0.0), ("only after", "5", 1.0)])
    _, was, now, change = _row(COMPARED, "x", "acc", {"base": before, "final": after})
    assert was == "50.0% (40.0 to 60.0; n\u00a0=\u00a04)"
    assert now == "75.0% (65.0 to 85.0; n\u00a0=\u00a04)"
    assert change.text.startswith("+100.0 points")
    assert "n\u00a0=\u00a02" in change.text
    assert change.detail == "2 right now, 0 no longer; p\u00a0=\u00a00.5"
    assert _row(COMPARED, "x", "acc", {"final": after})[1:] == ["—", now, "—"]


def test_what_is_no_share_is_shown_as_a_number_with_its_paired_difference():
    items = [{"id": str(k), "reference_nll": 2.0 + k / 10} for k in range(5)]
    moved = [{"id": str(k), "reference_nll": 1.5 + k / 20} for k in range(5)]
    before = Measured({"reference_nll": Estimate(2.2, 2.0, 2.4, 5)}, items)
    after = Measured({"reference_nll": Estimate(1.6, 1.5, 1.7, 5)}, moved)
    row = _row(COMPARED, "x", "reference_nll", {"base": before, "final": after})
    assert row[1] == "2.2 (2 to 2.4; n = 5)"
    assert row[3] == Cell("−0.6 (−0.698 to −0.502; n = 5)")
