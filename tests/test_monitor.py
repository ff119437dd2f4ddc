import json
import logging
import math
import shutil

import pytest
import torch
from conftest import rows, tiny_model, tiny_tokenizer
from peft import LoraConfig
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from tasft import TASFTConfig, TASFTTrainer
from tasft.core.errors import UserError
from tasft.data.rows import Example
from tasft.train.monitor import CollapseMonitor
from tasft.train.settings import MonitorSettings

ROWS = [Example(f"Say {word}?", f"{word} it is" + "!" * index, True) for index, word in enumerate("abcdefghi")]
ROWS += [Example(f"Do {word}?", f"sure, {word}" + "." * index, False) for index, word in enumerate("xyz")]
# Gathers all mass on one token of avoid rows: at step 15 the entropy is low for the third time in a row.
COLLAPSE = {"penalty": "emd", "penalty_weight": 50.0, "learning_rate": 5e-2, "max_steps": 24}
# Ruins everything: at step 8 the loss on imitate rows is high for the third time in a row.
RUIN = {"penalty": "ascent", "penalty_weight": 200.0, "learning_rate": 1e-1, "max_steps": 12}
AT_ONCE = MonitorSettings(action="stop", patience=1)
OFF = dict.fromkeys(("entropy_nats", "entropy_fraction", "nll_factor", "kl_nats", "broken_share"))


def trainer(folder, monitor=None, lora=False, **settings):
    settings = {"save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4} | settings
    arguments = TASFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, seed=3, **settings
    )
    model = tiny_model(tied=not lora)
    if lora:
        with torch.no_grad():
            # Or else no adapter could make any token likely.
            model.get_output_embeddings().weight *= 20
    return TASFTTrainer(
        model,
        arguments,
        ROWS,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        callbacks=[monitor] if monitor else [],
    )


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def feed(monitor, folder, logs):
    """Control and arguments after the monitor has read these logs, one a step."""
    arguments = TASFTConfig(output_dir=str(folder), report_to="none", use_cpu=True)
    state, control = TrainerState(max_steps=99), TrainerControl(should_save=True)
    monitor.on_train_begin(arguments, state, control)
    for state.global_step, log in enumerate(logs, 1):
        monitor.on_log(arguments, state, control, logs={"loss": 1.0, **log})
    return control, arguments


@pytest.mark.parametrize("penalty", ["emd_exact", "emd_hinge"])
def test_a_healthy_run_does_not_trip(tmp_path, penalty):
    monitor = CollapseMonitor(MonitorSettings(action="stop"))
    subject = trainer(tmp_path, monitor, penalty=penalty, learning_rate=1e-2, max_steps=20)
    subject.train()
    assert subject.state.global_step == 20
    assert not monitor.stopped
    assert (tmp_path / "monitor.jsonl").read_text() == ""


def test_it_warns_once_with_what_was_measured_and_changes_nothing(tmp_path, caplog):
    plain = trainer(tmp_path / "plain", **COLLAPSE)
    plain.train()
    watched = trainer(tmp_path / "watched", CollapseMonitor(), **COLLAPSE)
    with caplog.at_level(logging.WARNING, "tasft.train.monitor"):
        watched.train()
    assert same(weights(plain.model), weights(watched.model))
    (event,) = rows(tmp_path / "watched" / "monitor.jsonl")
    (message,) = [record.message for record in caplog.records if record.name == "tasft.train.monitor"]
    log = rows(tmp_path / "watched" / "metrics.jsonl")
    assert event == {
        "step": 15,
        "measure": "entropy",
        "value": log[14]["entropy"],
        "limit": log[0]["entropy"] / 4,
        "action": "warn",
        "message": message,
    }
    assert message.startswith("step 15: the entropy on avoid tokens is 0.6")
    assert "below its limit of 1.46 for 3 logs in a row" in message
    assert "Lower penalty_weight" in message


def test_gradient_ascent_trips_it_too(tmp_path):
    trainer(tmp_path, CollapseMonitor(), **RUIN).train()
    (event,) = rows(tmp_path / "monitor.jsonl")
    assert (event["step"], event["measure"]) == (8, "imitate_nll")
    assert event["value"] > event["limit"] > 10


def test_a_resumed_run_knows_what_it_warned_of_and_has_no_event_twice(tmp_path):
    settings = COLLAPSE | {"max_steps": 22, "save_strategy": "steps", "save_steps": 8}

    def build(side):
        return trainer(tmp_path / side, CollapseMonitor(), lora=True, **settings)

    whole = build("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    found = rows(tmp_path / "whole" / "monitor.jsonl")
    assert found
    for checkpoint in (8, 16):
        again = build("cut")
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{checkpoint}"))
        assert same(weights(whole.model), weights(again.model))
        assert rows(tmp_path / "cut" / "monitor.jsonl") == found


@pytest.mark.parametrize("lora", [False, True])
def test_a_stop_leaves_the_last_good_checkpoint_in_trainer_and_folder(tmp_path, lora):
    monitor = CollapseMonitor(MonitorSettings(action="stop"))
    limits = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    subject = trainer(tmp_path, monitor, lora, **COLLAPSE, **limits)
    started = weights(subject.model)
    subject.train()
    (event,) = rows(tmp_path / "monitor.jsonl")
    log = rows(tmp_path / "metrics.jsonl")
    # What was saved from the first log over the limit on is not good.
    last_good = (event["step"] - 3) // 4 * 4
    assert monitor.stopped
    assert monitor.last_good == last_good > 0
    assert log[-1]["step"] == subject.state.global_step == event["step"] < COLLAPSE["max_steps"]
    assert (event["action"], event["checkpoint"]) == ("stop", f"checkpoint-{last_good}")
    assert checkpoints(tmp_path) == [f"checkpoint-{last_good}"]
    saved = load_file(
        tmp_path / f"checkpoint-{last_good}" / ("adapter_model.safetensors" if lora else "model.safetensors")
    )
    now = weights(subject.model)
    for name, weight in saved.items():
        assert torch.equal(now[name.replace(".weight", ".default.weight") if lora else name], weight), name
    assert not same(started, now)
    assert not subject.args.load_best_model_at_end


def test_a_stop_before_the_first_checkpoint_says_so(tmp_path):
    monitor = CollapseMonitor(MonitorSettings(action="stop"))
    subject = trainer(tmp_path, monitor, **RUIN, save_steps=50)
    subject.train()
    (event,) = rows(tmp_path / "monitor.jsonl")
    assert "no checkpoint was saved before" in event["message"]
    assert "checkpoint" not in event
    assert monitor.last_good is None
    assert (subject.state.global_step, checkpoints(tmp_path)) == (8, [])


def test_nothing_is_saved_after_a_stop(tmp_path):
    # An epoch has three steps; saved are those after step 3 and 6, of which the first is good.
    subject = trainer(tmp_path, CollapseMonitor(MonitorSettings(action="stop")), **RUIN, save_strategy="epoch")
    subject.train()
    assert subject.state.global_step == 8
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert rows(tmp_path / "monitor.jsonl")[0]["checkpoint"] == "checkpoint-3"


def test_a_run_that_ends_while_over_a_limit_keeps_its_end_and_the_last_good_checkpoint(tmp_path):
    settings = COLLAPSE | {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    monitor = CollapseMonitor(MonitorSettings(action="stop", patience=99))
    trainer(tmp_path, monitor, **settings).train()
    assert not monitor.stopped
    assert checkpoints(tmp_path) == ["checkpoint-12", "checkpoint-24"]


def test_a_resumed_run_still_knows_the_last_good_checkpoint(tmp_path):
    settings = COLLAPSE | {"save_strategy": "steps", "save_steps": 7}
    trainer(tmp_path, CollapseMonitor(), **settings).train()
    # Taken up within the streak: the monitor was not told to keep any, so there is none.
    inside = CollapseMonitor(MonitorSettings(action="stop"))
    trainer(tmp_path, inside, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert inside.stopped
    assert inside.last_good is None
    before = CollapseMonitor(MonitorSettings(action="stop"))
    trainer(tmp_path, before, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert before.stopped
    assert before.last_good == 7
    assert [row["step"] for row in rows(tmp_path / "monitor.jsonl")] == [15]


def test_a_checkpoint_in_another_folder_is_not_gone_back_to(tmp_path):
    settings = RUIN | {"max_steps": 9, "save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path / "one", **settings).train()
    monitor = CollapseMonitor(MonitorSettings(action="stop", nll_factor=1.001))
    trainer(tmp_path / "two", monitor, **settings).train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-5"))
    (event,) = rows(tmp_path / "two" / "monitor.jsonl")
    assert "no checkpoint was saved before" in event["message"]


def test_it_stops_once(tmp_path):
    logs = [{"entropy": 2.0, "kl": 0.0}, {"entropy": 0.0, "kl": 0.0}, {"entropy": 0.0, "kl": 9.0}]
    feed(CollapseMonitor(AT_ONCE), tmp_path, logs)
    assert [row["step"] for row in rows(tmp_path / "monitor.jsonl")] == [2]


def test_a_checkpoint_made_without_the_monitor_can_be_taken_up_with_it(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **settings).train()
    again = trainer(tmp_path, CollapseMonitor(MonitorSettings(action="stop")), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    kept = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert kept["stateful_callbacks"]["CollapseMonitor"]["attributes"]["seen"]["last_good"] == 2


def prober(replies, seen):
    """A probe that answers from a list, one entry a call, and notes in what state the model was."""

    def probe(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return [("How do I bake bread?", reply) for reply in replies[len(seen) - 1]]

    return probe


FINE = "Knead the dough and bake it in the oven."


def test_broken_probe_replies_trip_it_at_once(tmp_path):
    seen = []
    replies = [[FINE] * 4, [FINE, FINE, FINE, ""], [FINE, "", "no no no no no no", FINE]]
    monitor = CollapseMonitor(MonitorSettings(action="stop"), probe=prober(replies, seen), every=2)
    subject = trainer(tmp_path, monitor, max_steps=6, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    subject.train()
    (event,) = rows(tmp_path / "monitor.jsonl")
    assert (event["step"], event["measure"], event["value"], event["limit"]) == (4, "broken", 0.5, 0.25)
    assert event["checkpoint"] == "checkpoint-2"
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert seen == [(False, False)] * 3


def test_the_probe_gives_the_model_back_as_it_was(tmp_path):
    monitor = CollapseMonitor(probe=prober([[FINE], [""], [FINE]], []), every=1)
    model = torch.nn.Dropout()
    arguments = TASFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    for mode in (True, False):
        monitor.on_train_begin(arguments, state, control, model=model.train(mode))
        assert model.training == mode


def test_replies_that_were_broken_at_the_start_do_not_count(tmp_path):
    monitor = CollapseMonitor(MonitorSettings(action="stop"), probe=prober([["", "", FINE, FINE]] * 3, []), every=1)
    trainer(tmp_path, monitor, max_steps=2, learning_rate=1e-3).train()
    assert not monitor.stopped


def test_a_real_probe_does_not_disturb_training(tmp_path):
    def probe(model):
        ids = torch.tensor([tiny_tokenizer()("Say a?").input_ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        return [("Say a?", tiny_tokenizer().decode(output[0, ids.shape[1] :]))]

    settings = {"max_steps": 4, "lora": True, "learning_rate": 1e-2}
    plain = trainer(tmp_path / "plain", **settings)
    plain.train()
    probed = trainer(tmp_path / "probed", CollapseMonitor(probe=probe, every=1), **settings)
    probed.train()
    assert same(weights(plain.model), weights(probed.model))


def test_a_single_noisy_log_does_not_trip_it(tmp_path):
    noisy = [{"entropy": 2.0, "imitate_nll": 1.0}, {"entropy": 0.0, "imitate_nll": 9.0}]
    monitor = CollapseMonitor(MonitorSettings(action="stop", patience=2))
    control, _ = feed(monitor, tmp_path, noisy * 4)
    assert not control.should_training_stop
    control, _ = feed(monitor, tmp_path, [*noisy, *noisy[1:]])
    assert control.should_training_stop
    assert not control.should_save
    assert [(row["step"], row["measure"]) for row in rows(tmp_path / "monitor.jsonl")] == [
        (3, "entropy"),
        (3, "imitate_nll"),
    ]


@pytest.mark.parametrize(
    ("measure", "first", "fine", "over", "switch"),
    [
        ("entropy", 2.0, 0.5, 0.49, {"entropy_nats": None, "entropy_fraction": None}),
        ("entropy", 0.2, 0.1, 0.09, {"entropy_nats": None, "entropy_fraction": None}),
        ("imitate_nll", 1.5, 3.0, 3.1, {"nll_factor": None}),
        ("kl", 0.0, 2.0, 2.1, {"kl_nats": None}),
        ("kl", 0.0, 2.0, math.nan, {"kl_nats": None}),
    ],
)
def test_each_limit_holds_and_none_switches_it_off(tmp_path, measure, first, fine, over, switch):
    def steps(value, **limits):
        logs = [{measure: first}, {measure: value}]
        monitor = CollapseMonitor(MonitorSettings(action="stop", patience=1, **limits))
        return feed(monitor, tmp_path, logs)[0].should_training_stop

    assert not steps(fine)
    assert steps(over)
    (event,) = rows(tmp_path / "monitor.jsonl")
    assert event["value"] == (None if math.isnan(over) else over)
    assert not steps(over, **switch)
    assert not steps(over, **OFF)


def test_logs_without_its_measures_are_passed_over(tmp_path):
    control, _ = feed(CollapseMonitor(AT_ONCE), tmp_path, [{}, {"grad_norm": math.nan}])
    assert not control.should_training_stop


def test_all_processes_act_on_what_the_first_one_measured(tmp_path, monkeypatch):
    sent = iter([{"entropy": 2.0}, {"entropy": 0.0}])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box: box.__setitem__(0, next(sent)))
    control, _ = feed(CollapseMonitor(AT_ONCE), tmp_path, [{"entropy": 2.0}, {"entropy": 2.0}])
    assert control.should_training_stop


def test_what_contradicts_it_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="'warn' or 'stop'"):
        MonitorSettings(action="halt")
    for action, settings in (
        ("stop", {"metric_for_best_model": "loss"}),
        ("warn", {"restore_callback_states_from_checkpoint": True}),
    ):
        with pytest.raises(UserError, match="off"):
            trainer(tmp_path, CollapseMonitor(MonitorSettings(action=action)), max_steps=1, **settings).train()
