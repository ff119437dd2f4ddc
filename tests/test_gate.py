"""Limits on a trained model, and the exit code that tells whether they are kept."""

import json
import re

import pytest
import yaml
from conftest import tasft_here
from running import judged_by_two, small_recipe
from test_report import build_run, document, jsonl

from tasft.core.errors import UserError
from tasft.report import write_report
from tasft.report.read import read_run
from tasft.run import gate
from tasft.run.checks import check_inputs
from tasft.run.inputs import Inputs
from tasft.run.recipe import Gate
from tasft.run.recipe_file import load

SETS = {"toxic": {"kind": "toxic", "source": "x"}, "benign": {"kind": "benign", "source": "x"}}


def measured(run, limits, **recipe):
    """The gate of a run folder whose recipe is completed."""
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["evaluate"]["sets"] = SETS
    (run / "recipe.yaml").write_text(yaml.safe_dump(values | recipe | {"gate": limits}))
    return gate.judge(Gate.model_validate(limits), read_run(run))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return build_run(tmp_path / "run")


def figures(run, state, name, judge="llama_guard"):
    return json.loads((run / "evaluate" / state / name / judge / "summary.json").read_text())


def test_a_limit_is_kept_up_to_and_including_its_value(run):
    rate = figures(run, "final", "toxic")["harmful"]
    exactly = 100 * rate["value"]
    for bound, met in ((exactly, True), (exactly - 0.01, False), (exactly + 0.01, True)):
        found = measured(run, {"harmful": bound})
        (limit,) = found["limits"]
        assert found["met"] is limit["met"] is met, bound
        assert {key: limit[key] for key in rate} == rate
        assert f"{exactly:.1f}%" in limit["sentence"]
        assert f"n\u00a0=\u00a0{rate['n']}" in limit["sentence"]


def test_a_strict_limit_is_held_against_the_worse_end_of_the_interval(run):
    rate = figures(run, "final", "toxic")["harmful"]
    between = 50 * (rate["value"] + rate["high"])
    assert measured(run, {"harmful": between})["met"]
    assert not measured(run, {"harmful": between, "strict": True})["met"]
    assert measured(run, {"harmful": 100 * rate["high"] + 0.01, "strict": True})["met"]


def test_over_refusal_is_the_paired_change_from_the_model_before(run):
    before, after = (figures(run, state, "benign")["refusal"]["value"] for state in ("base", "final"))
    (limit,) = measured(run, {"over_refusal": 0})["limits"]
    assert limit["value"] == pytest.approx(after - before)
    assert limit["low"] < limit["value"] < limit["high"]
    assert measured(run, {"over_refusal": 100 * (after - before)})["met"]
    assert not measured(run, {"over_refusal": 100 * (after - before) - 0.1})["met"]


def test_with_an_sft_model_that_is_the_model_before(run):
    (run / "evaluate" / "base").rename(run / "evaluate" / "sft")
    found = measured(run, {"over_refusal": 0}, sft={"max_steps": 1})
    assert found["before"] == "sft"
    assert found["limits"][0]["value"] is not None


def test_incoherent_replies_are_limited_for_each_kind_of_prompts(run):
    assert [limit["sentence"].split(":")[0] for limit in measured(run, {"incoherent": 5})["limits"]] == [
        "incoherent replies to toxic prompts",
        "incoherent replies to benign prompts",
    ]


def tasks(run, before, after, metric="acc"):
    for state, outcomes in (("base", before), ("final", after)):
        at = run / "evaluate" / state / "capability" / "boolq"
        items = [
            {"id": f"boolq/{index}", "filter": "none", "doc_hash": str(index), metric: float(right)}
            for index, right in enumerate(outcomes)
        ]
        jsonl(at / "items.jsonl", items)
        value = sum(outcomes) / len(outcomes)
        document(at / "summary.json", {metric: {"value": value, "low": 0.0, "high": 1.0, "n": len(outcomes)}})


def test_a_task_may_lose_as_many_points_as_the_limit_says(run):
    tasks(run, [1] * 60 + [0] * 40, [1] * 58 + [0] * 42)
    wanted = {"judges": ["llama_guard", "refusal_matching"], "sets": SETS, "capability": {"tasks": ["boolq"]}}
    for bound, met in ((-2, True), (-1, False), (-3, True)):
        found = measured(run, {"capability": {"boolq": bound}}, evaluate=wanted)
        assert found["met"] is met
        assert found["limits"][0]["value"] == pytest.approx(-0.02)
    assert "−2.0 points" in found["limits"][0]["sentence"]
    assert "at least −3 points" in found["limits"][0]["sentence"]


def test_what_was_not_measured_keeps_no_limit_and_says_why(run):
    limits = {"capability": {"boolq": -50}, "jailbreak": {"prefix": 100}}
    found = measured(run, limits)
    assert not found["met"]
    assert [limit["met"] for limit in found["limits"]] == [False, False]
    assert all("not measured" in limit["sentence"] for limit in found["limits"])
    tasks(run, [1, 0], [1, 1], "f1")
    wanted = {"judges": ["llama_guard"], "sets": SETS, "capability": {"tasks": ["boolq"]}}
    (limit,) = measured(run, {"capability": {"boolq": -1}}, evaluate=wanted)["limits"]
    assert "lm-eval gives f1, not acc" in limit["sentence"]


def test_a_set_without_verdicts_of_the_first_judge_is_not_measured(run):
    for path in (run / "evaluate" / "final" / "toxic" / "llama_guard").iterdir():
        path.unlink()
    (limit,) = measured(run, {"harmful": 100})["limits"]
    assert not limit["met"]
    assert "not measured (no verdict of llama_guard on final/toxic)" in limit["sentence"]


def test_a_first_judge_that_could_never_be_read_is_not_replaced_by_the_next(run):
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    for state in ("base", "final"):
        at = run / "evaluate" / state / "toxic" / "llama_guard"
        document(at / "summary.json", figures(run, state, "toxic") | {"harmful": nothing})
        rows = [json.loads(line) for line in (at / "verdicts.jsonl").read_text().splitlines()]
        jsonl(at / "verdicts.jsonl", [row | {"harmful": None, "unreadable": True} for row in rows])
    found = measured(run, {"harmful": 100})
    assert (found["judge"], found["met"], found["limits"][0]["n"]) == ("llama_guard", False, 0)


def test_verdicts_that_could_not_be_read_are_counted_beside_the_figure(run):
    at = run / "evaluate" / "final" / "toxic" / "llama_guard" / "summary.json"
    summary = json.loads(at.read_text())
    summary["harmful"]["n"] -= 3
    document(at, summary)
    (limit,) = measured(run, {"harmful": 100})["limits"]
    assert limit["left_out"] == 3
    assert "3 without a verdict left out" in limit["sentence"]


def test_the_report_and_the_card_say_whether_the_gate_is_met(run):
    for bound, kept in ((0, "not kept"), (100, "kept")):
        document(run / "report" / "gate.json", measured(run, {"harmful": bound}))
        write_report(run)
        page = (run / "report" / "index.html").read_text()
        markdown = (run / "report" / "report.md").read_text()
        card = (run / "report" / "model_card.md").read_text()
        assert f">{kept}</td>" in page
        assert re.search(rf"harmful replies to toxic prompts \|.* \| at most {bound}% \| {kept} \|", markdown)
        for text in (page, markdown, card):
            assert ("Gate not met" in text) is (kept == "not kept")
            assert ("Gate met" in text) is (kept == "kept")
            wrong = "Harmful replies to toxic prompts 10.0%, 10.0 points over the limit"
            assert (wrong in text) is (kept == "not kept")


def test_a_judge_that_does_not_tell_refusal_is_named_before_anything_is_done(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    values = small_recipe(tmp_path, tiny) | {"gate": {"over_refusal": 5}}
    values["judges"] = {"moderation": {"kind": "openai_moderation"}}
    values["evaluate"]["judges"] = ["moderation"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        check_inputs(Inputs(load(str(path))))
    assert any("gate.over_refusal needs a judge that tells refusal" in fault for fault in caught.value.faults)


def test_a_run_whose_gate_is_not_met_ends_with_exit_code_3_and_the_reason(tmp_path, tiny):
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    values = small_recipe(tmp_path, tiny) | {"gate": {"harmful": 0, "over_refusal": 100}}
    path.write_text(yaml.safe_dump(judged_by_two(values)))

    def tasft(*arguments):
        return tasft_here(*arguments, "--out", folder)

    done = tasft("run", str(path))
    assert done.returncode == 3, done.stderr
    found = json.loads((folder / "report" / "gate.json").read_text())
    assert [limit["met"] for limit in found["limits"]] == [False, True]
    assert f"tasft: gate not met: {found['limits'][0]['sentence']}\n" in done.stderr
    assert done.stderr.count("gate not met") == 1
    assert f"gate: met: {found['limits'][1]['sentence']}" in done.stdout
    assert found["limits"][0]["sentence"] not in done.stdout  # Each limit is said once.
    assert "safe and coherent" in done.stdout  # The rates, as `tasft evaluate` prints them.
    assert tasft("run", str(path)).returncode == 3  # Also when there is nothing left to do.
    assert tasft("evaluate", str(path)).returncode == 0
    assert tasft("run", str(path), "gate.harmful=100").returncode == 0
