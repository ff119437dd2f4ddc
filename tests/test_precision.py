"""What `auto` becomes, and that a run keeps to it."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from tasft.core.provenance import write_json
from tasft.models import precision
from tasft.models.load import load_model
from tasft.models.precision import Choice, fastest, remembered
from tasft.run import recipe_file
from tasft.run.pipeline import Pipeline
from tasft.run.precision import settled

QUICK = Choice("bfloat16", "7 times as fast")


def opened(path, folder, *overrides):
    return Pipeline(recipe_file.load(str(path), overrides), folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is asked and not tried")
@pytest.mark.parametrize(("times", "wanted"), [(7.6, "bfloat16"), (1.2, "float32"), (0.01, "float32")])
def test_a_processor_is_tried_and_bfloat16_taken_where_it_is_clearly_faster(monkeypatch, times, wanted):
    monkeypatch.setattr(precision, "faster_by", lambda: times)
    choice = fastest.__wrapped__()
    assert choice.dtype == wanted
    assert f"{times:.2g} times as fast" in choice.why


def test_the_trial_multiplies_both(monkeypatch):
    seen = []
    clock = iter(range(1000))
    monkeypatch.setattr(precision, "linear", lambda rows, weights: seen.append(rows.dtype))
    monkeypatch.setattr(precision.time, "thread_time", lambda: next(clock))
    assert precision.faster_by() == 1.0
    assert seen == [torch.float32, torch.bfloat16] * 4


def test_the_trial_waits_for_no_other_thread_and_leaves_threads_as_they_were(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(precision, "linear", lambda rows, weights: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(precision.time, "thread_time", iter(range(1000)).__next__)
    precision.faster_by()
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("overrides", "dtype", "products"),
    [
        ((), "bfloat16", "bf16"),
        (("model.lora=null",), "float32", "bf16"),
        (("model.quantize=4bit",), "bfloat16", "bf16"),
        (("model.dtype=float32",), "float32", "bf16"),
        (("train.precision=fp32",), "bfloat16", "fp32"),
        (("model.dtype=float16", "train.precision=fp16"), "float16", "fp16"),
    ],
)
def test_weights_that_are_trained_stay_in_float32_and_what_a_recipe_says_holds(auto, overrides, dtype, products):
    spec = settled(
        recipe_file.load(str(auto), [*overrides, "sft={max_steps: 1}", "data.imitate={source: rows.jsonl}"]), QUICK
    )
    assert (spec.model.dtype, spec.train.precision, spec.sft.precision) == (dtype, products, "bf16")


def test_a_run_keeps_what_it_was_begun_with(auto, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(precision, "fastest", lambda: QUICK)
    assert opened(auto, run).spec.model.dtype == "bfloat16"
    write_json(run / "manifest.json", {"precision": {"dtype": "float32", "why": "it was begun elsewhere"}})
    shutil.copy(auto, run / "recipe.yaml")
    taken_up = opened(auto, run)
    assert taken_up.spec.model.dtype == "float32"
    assert taken_up.spec.train.precision == "fp32"
    assert taken_up.precision.why == "it was begun elsewhere"
    assert remembered(tmp_path / "no manifest.json") == QUICK


def test_what_is_written_in_full_is_the_same_work(auto, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "fastest", lambda: QUICK)
    chosen = opened(auto, tmp_path / "run")
    monkeypatch.setattr(precision, "fastest", pytest.fail)
    said = opened(auto, tmp_path / "run", "model.dtype=bfloat16", "train.precision=bf16")
    assert said.precision is None
    assert said.context.training_reads == chosen.context.training_reads
    assert json.loads(json.dumps(said.spec.model_dump())) == chosen.spec.model_dump()


def test_an_adapter_on_bfloat16_weights_is_float32(tiny):
    loaded = load_model(str(tiny), QUICK.dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    adapted = get_peft_model(loaded, LoraConfig(target_modules=["q_proj"]))
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.float32}
    assert next(tiny_model().parameters()).dtype == torch.float32
