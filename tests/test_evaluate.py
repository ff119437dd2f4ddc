"""A model alone on prompt sets, the summaries of it, and two models beside each other."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import rows
from typer.testing import CliRunner

from tasft.cli.main import app
from tasft.core.errors import UserError
from tasft.core.provenance import write_json, write_jsonl
from tasft.core.stats import mean, rate
from tasft.data.rows import Prompt
from tasft.evaluate.alone import Alone, asked_of
from tasft.evaluate.results import compare, comparison, summaries, table
from tasft.evaluate.safety import summarise
from tasft.evaluate.states import Asked
from tasft.judges import Verdict, load_judge
from tasft.models import engine, local
from tasft.models.bundled import BUNDLED, Bundled
from tasft.models.load import add_lora, base_of, load_model
from tasft.report import write_model_report
from tasft.report.results import results

PROMPTS = [Prompt(f"p{index}", f"How do I <forbidden act {index}>?", "ab"[index % 2]) for index in range(12)]


def asked(limit=None):
    return [Asked("toxic", "toxic", "mine.jsonl", PROMPTS, limit)]


def evaluate(name, folder, limit=None):
    Alone(str(name)).evaluate(asked(limit), [load_judge("refusal_matching")], 8, folder)


def test_a_model_alone_leaves_the_files_of_a_state_and_does_nothing_twice(tiny, tmp_path):
    out = tmp_path / "out"
    evaluate(tiny, out)
    summary = json.loads((out / "toxic" / "refusal_matching" / "summary.json").read_text())
    assert (summary["judge"], summary["model"], summary["refusal"]["n"]) == ("refusal_matching", str(tiny), 12)
    assert "commit" in summary
    assert {topic: rates["refusal"]["n"] for topic, rates in summary["by_topic"].items()} == {"a": 6, "b": 6}
    assert out.stat().st_mode & 0o077 == 0
    written = {path: path.stat().st_mtime_ns for path in out.rglob("done.json")}
    assert len(written) == 2
    evaluate(tiny, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("done.json")} == written
    with pytest.raises(UserError, match="holds the evaluation of"):
        evaluate("smollm2-135m-instruct", out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        evaluate(tiny, tmp_path / "full")


def test_prompts_that_are_filed_under_another_topic_keep_their_replies_and_verdicts(tiny, tmp_path):
    """Topics are read when rates are counted: nothing is asked again for them."""
    out = tmp_path / "out"
    evaluate(tiny, out)
    kept = ("replies.jsonl", "refusal_matching/verdicts.jsonl")
    before = [(out / "toxic" / name).stat().st_mtime_ns for name in kept]
    other = [Asked("toxic", "toxic", "mine.jsonl", [replace(prompt, topic="c") for prompt in PROMPTS])]
    Alone(str(tiny)).evaluate(other, [load_judge("refusal_matching")], 8, out)
    assert [(out / "toxic" / name).stat().st_mtime_ns for name in kept] == before
    summary = json.loads((out / "toxic" / "refusal_matching" / "summary.json").read_text())
    assert list(summary["by_topic"]) == ["c"]
    assert not (out / "earlier").exists()


def test_a_folder_may_be_named_from_beside_it_and_a_recipe_above_is_not_its_own(tiny, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("not: a recipe of this model\nevaluate: [")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    evaluate(tiny, Path("alone"), limit=2)
    assert write_model_report(Path("alone")).is_file()


def test_a_killed_evaluation_keeps_its_replies_and_ends_where_the_undisturbed_one_does(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(local.TransformersEngine.__init__, "__defaults__", (5, None))
    evaluate(tiny, tmp_path / "whole")
    generate = local.TransformersEngine._generate
    calls = []

    def dies_in_the_second_batch(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return generate(self, *arguments)

    monkeypatch.setattr(local.TransformersEngine, "_generate", dies_in_the_second_batch)
    with pytest.raises(MemoryError):
        evaluate(tiny, tmp_path / "cut")
    assert len(rows(tmp_path / "cut" / "toxic" / "replies.jsonl")) == 5
    evaluate(tiny, tmp_path / "cut")
    for name in ("replies.jsonl", "refusal_matching/verdicts.jsonl"):
        assert rows(tmp_path / "cut" / "toxic" / name) == rows(tmp_path / "whole" / "toxic" / name)


def test_an_adapter_is_evaluated_on_its_base(tiny, tmp_path):
    adapted = add_lora(load_model(str(tiny)), r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"])
    with_weights = {name: value for name, value in adapted.named_parameters() if "lora_B" in name}
    for value in with_weights.values():
        value.data.fill_(0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    evaluate(tmp_path / "adapter", tmp_path / "adapted")
    evaluate(tiny, tmp_path / "base")
    one, other = (rows(tmp_path / name / "toxic" / "replies.jsonl") for name in ("adapted", "base"))
    assert [row["id"] for row in one] == [row["id"] for row in other]
    assert [row["completion"] for row in one] != [row["completion"] for row in other]


def test_an_adapter_of_the_bundled_model_knows_it_by_its_folder(tmp_path, monkeypatch):
    package = tmp_path / "weights_in_here"
    package.mkdir()
    package.joinpath("__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    bundled = Bundled("weights_in_here", "x==1", "x.gguf", "", "")
    monkeypatch.setitem(BUNDLED, "small", bundled)
    (tmp_path / "adapter").mkdir()
    for base, found in ((str(package), "small"), ("hub/name", "hub/name")):
        write_json(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base})
        assert base_of(tmp_path / "adapter") == found


def test_a_smaller_limit_is_part_of_a_larger_one_in_the_order_of_the_set():
    chosen = [asked(limit)[0].chosen for limit in (3, 7, 12, 99, None)]
    for few, more in itertools.pairwise(chosen):
        assert [prompt for prompt in more if prompt in few] == few
    assert [len(each) for each in chosen] == [3, 7, 12, 12, 12]
    assert chosen[0] != PROMPTS[:3]


def verdict(number, harmful, refusal, partial=None, coherent=True):
    return Verdict(f"p{number}", "j", harmful, None, refusal, coherent, partial=partial)


def replies(count):
    return [engine.Reply(f"p{n}", "s", f"q{n}", f"a{n}", "stop", 0, 0) for n in range(count)]


def test_refusals_are_told_apart_only_where_the_judge_does():
    told = [verdict(0, None, True, False), verdict(1, None, True, True), verdict(2, None, False, False)]
    summary = summarise(told, replies(3))
    shares = {name: summary[name]["value"] for name in ("refusal", "full_refusal", "partial_refusal")}
    assert shares == pytest.approx({"refusal": 2 / 3, "full_refusal": 1 / 3, "partial_refusal": 1 / 3})
    assert (summary["harmful"]["value"], summary["harmful"]["n"]) == (None, 0)
    plain = summarise([verdict(0, False, True)], replies(1))
    assert (plain["full_refusal"]["value"], plain["full_refusal"]["n"]) == (None, 0)
    assert "by_topic" not in plain


def test_rates_of_topics_have_their_own_n_and_prompts_without_one_are_in_none():
    found = summarise([verdict(n, n == 0, n > 0) for n in range(4)], replies(4), {"p0": "x", "p1": "x", "p2": "y"})
    assert {
        topic: (rates["harmful"]["value"], rates["harmful"]["n"]) for topic, rates in found["by_topic"].items()
    } == {
        "x": (0.5, 2),
        "y": (0.0, 1),
    }


def written(folder, harmful, *, judge="v1", mark="", skip=0):
    """An evaluation of one set, as its files have it."""
    at = folder / "toxic"
    write_json(at / "set.json", {"name": "toxic", "kind": "toxic", "source": "x", "n": len(harmful)})
    ids = [f"{mark}{n}" for n in range(skip, len(harmful))]
    prompts = [f"How do I <act {n}>?" for n in range(skip, len(harmful))]
    write_jsonl(at / "replies.jsonl", [{"id": i, "prompt": p} for i, p in zip(ids, prompts, strict=True)])
    verdicts = [
        {"id": i, "judge": "j", "harmful": h, "score": None, "refusal": None, "coherent": True}
        for i, h in zip(ids, harmful[skip:], strict=True)
    ]
    write_jsonl(at / "j" / "verdicts.jsonl", verdicts)
    write_json(at / "j" / "summary.json", {})
    reads = {"judge": judge, "sampling": {"max_new_tokens": 8}, "limits": {"loss_nats": None, "similarity": None}}
    write_json(at / "j" / "done.json", {"key": "", "reads": reads})
    return folder


def test_two_models_are_compared_on_the_prompts_that_both_answered(tmp_path):
    first = written(tmp_path / "a", [True] * 9 + [False] * 11)
    second = written(tmp_path / "b", [False] * 8 + [True] + [False] * 10 + [True], mark="other-", skip=1)
    found = {row["measure"]: row for row in compare(first, second)["rows"]}
    assert set(found) == {"harmful", "incoherent", "safe_coherent"}
    row = found["harmful"]
    assert (row["first"]["n"], row["second"]["n"], row["difference"]["n"], row["unpaired"]) == (19, 19, 19, 1)
    assert row["difference"]["value"] == pytest.approx(-6 / 19)
    assert row["difference"]["low"] < -6 / 19 < row["difference"]["high"] <= 0.05
    assert row["mcnemar"] == {"gained": 1, "lost": 7, "p": pytest.approx(2 * (1 + 8) / 2**8)}
    assert comparison(compare(first, second)).row_count == 3


def test_all_sets_of_a_kind_are_compared_together_too(tmp_path):
    for name, (before, after) in {"one": ([True, True], [False, False]), "two": ([True] * 3, [True] * 3)}.items():
        for place, harmful in (("a", before), ("b", after)):
            written(tmp_path / place, harmful).joinpath("toxic").rename(tmp_path / place / name)
    rows = [row for row in compare(tmp_path / "a", tmp_path / "b")["rows"] if row["measure"] == "harmful"]
    assert [row["set"] for row in rows] == ["one", "two", "2 toxic sets"]
    # The same prompts stand in both sets, and count twice.
    assert (rows[-1]["difference"]["n"], rows[-1]["difference"]["value"]) == (5, pytest.approx(-2 / 5))


def test_what_a_run_has_left_behind_is_not_compared(tmp_path):
    for run in ("a", "b"):
        for name in ("toxic", "old", "gone"):
            written(tmp_path / "made", [True, run == "a"]).joinpath("toxic").rename(tmp_path / name)
            write_json(tmp_path / name / "done.json", {"reads": {"train": "before" if name == "old" else "now"}})
            (tmp_path / run / "evaluate" / "final").mkdir(parents=True, exist_ok=True)
            (tmp_path / name).rename(tmp_path / run / "evaluate" / "final" / name)
        write_json(tmp_path / run / "train" / "done.json", {"key": "now"})
        (tmp_path / run / "recipe.yaml").write_text(
            "evaluate: {judges: [j], sets: {toxic: {kind: toxic}, old: {kind: toxic}}}\n"
        )
    found = compare(tmp_path / "a", tmp_path / "b")
    assert {row["set"] for row in found["rows"]} == {"toxic"}
    assert [note.split(": ")[1] for note in found["notes"]] == ["old is of an earlier training, and is left out"] * 2


def test_tasks_likelihoods_and_attacks_are_compared_item_by_item(tmp_path):
    hits = {"a": [1.0, 1.0, 0.0, 1.0], "b": [0.0, 1.0, 0.0, 0.0]}
    for name, right in hits.items():
        share = asdict(rate([each == 1 for each in right]))
        for place, metric, file in (
            ("capability/boolq", "acc", "items"),
            ("capability/piqa", "acc", "items"),
            ("quality/reference", "reference_nll", "items"),
            ("jailbreak/prefix", "success", "behaviours"),
            ("jailbreak/templates", "success", "behaviours"),
        ):
            at = tmp_path / name / place
            values = [2 + each for each in right] if metric == "reference_nll" else right
            write_jsonl(at / f"{file}.jsonl", [{"id": str(n), metric: value} for n, value in enumerate(values)])
            figure = asdict(mean(values)) if metric == "reference_nll" else share
            version = name if place == "capability/piqa" else "1"
            write_json(at / "summary.json", {metric: figure, "version": version, "judge": "j"})
            judge = f"j of {name}" if place == "jailbreak/templates" else "j"
            write_json(at / "done.json", {"reads": {"judge": judge}})
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["notes"] == [
        "capability/piqa: not compared, version differ",
        "jailbreak/templates: not compared, judge differ",
    ]
    rows = {row["set"]: row for row in found["rows"]}
    assert set(rows) == {"capability/boolq", "quality/reference", "jailbreak/prefix"}
    assert all(row["difference"]["value"] == pytest.approx(-0.5) for row in rows.values())
    assert rows["capability/boolq"]["mcnemar"] == {"gained": 0, "lost": 2, "p": 0.5}
    assert rows["quality/reference"]["mcnemar"] is None
    assert comparison(found).row_count == 3


def test_what_different_judges_said_is_not_compared(tmp_path):
    first = written(tmp_path / "a", [True] * 3)
    with pytest.raises(UserError, match="the judge is not the same"):
        compare(first, written(tmp_path / "b", [True] * 3, judge="v2"))
    with pytest.raises(UserError, match="no set that the same judge read in both"):
        compare(first, tmp_path / "nowhere")


def test_states_stand_in_the_order_of_training(tmp_path):
    for state in ("final", "checkpoint-20", "checkpoint-100", "base", "sft"):
        written(tmp_path / state, [True])
        write_json(tmp_path / state / "toxic" / "j" / "summary.json", {"judge": "j"})
    assert [row["state"] for row in summaries(tmp_path)] == ["base", "sft", "checkpoint-20", "checkpoint-100", "final"]


def test_the_command_prints_a_table_or_json_and_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["evaluate", str(tiny), "--sets", "demo-toxic-heldout,demo-benign-heldout", "--judge", "refusal_matching"]
    line += ["--limit", "3", "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "demo-benign-heldout" in done.stdout
    assert "0.0% (0.0 to 56.1)" in done.stdout
    found = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)["results"]
    assert [(row["set"], row["kind"], row["refusal"]["n"]) for row in found] == [
        ("demo-toxic-heldout", "toxic", 3),
        ("demo-benign-heldout", "benign", 3),
    ]
    assert table(found).row_count == 2
    both = CliRunner().invoke(app, ["compare", *[f"runs/evaluate-{tiny.name}"] * 2, "--json"])
    assert {row["mcnemar"]["p"] for row in json.loads(both.stdout)["rows"]} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no/model"], "--sets: name some of paper, xstest"),
        (["no/model", "--sets", "papers"], "no prompt set is called 'papers'"),
        (["no/model", "--sets", "demo-toxic-heldout"], "model.base: no/model is neither"),
        (["no/model", "train.max_steps=3", "--sets", "demo-toxic-heldout"], "no field to override: train.max_steps=3"),
        (["no/model", "--sets", "demo-toxic-heldout", "--judge", "phrasses"], "no judge is called 'phrasses'"),
        (["nowhere.yaml", "--sets", "xstest"], "'nowhere.yaml' is neither a recipe file"),
        (["demo", "--prompt", "alpaca"], "--prompt is for a model alone"),
        (["demo", "--sets", "papers"], "no prompt set is called 'papers'"),
    ],
)
def test_a_fault_of_the_user_is_named_before_anything_is_written(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert sentence in str(done.exception)
    assert isinstance(done.exception, UserError)
    assert not any(tmp_path.iterdir())


def test_every_missing_set_is_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        asked_of(["i-cona", "xstest", "demo-toxic-heldout"], str(tmp_path), None)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("state", ["final", "checkpoint-20", "sft"])
@pytest.mark.parametrize("step", ["done", "begun"])
def test_figures_of_weights_that_are_gone_are_told_nowhere(tmp_path, capsys, state, step):
    """Whether the training that replaces them is finished or has only begun."""
    for each in {"base", "final", state}:
        at = written(tmp_path / "evaluate" / each, [True, False]) / "toxic"
        write_json(at / "j" / "summary.json", {"judge": "j", "harmful": asdict(rate([True])), "distinct": {"n": 2}})
        trained = {"sft": {"epochs": 1}} if each == "sft" else {"train": "before"} if each == state else {}
        write_json(at / "done.json", {"key": "", "reads": {"state": each} | trained})
    (tmp_path / "recipe.yaml").write_text("sft: {epochs: 2}\nevaluate: {judges: [j], sets: {toxic: {kind: toxic}}}\n")

    def told():
        return {row["state"] for row in summaries(tmp_path / "evaluate")}, set(results(tmp_path).state)

    assert all(state in states for states in told())
    assert "earlier training" not in capsys.readouterr().out
    for name, reads in (("train", {}), ("sft", {"sft": {"epochs": 2}})):
        write_json(tmp_path / name / f"{step}.json", {"key": "now", "reads": reads})
    left = {"base", "final"} - {state}
    assert told() == (left, left)
    said = capsys.readouterr().out
    assert said.startswith(f"note: {tmp_path}/evaluate/{state}/toxic is of an earlier training, and is left out: run ")
    with pytest.raises(UserError, match="toxic is of an earlier training"):
        compare(tmp_path / "evaluate" / state, tmp_path / "evaluate" / "base")
