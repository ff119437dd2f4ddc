"""Two ranks train as one does: the same steps, the same weights; and again after they were killed."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import forked
import pytest
import torch
from safetensors.torch import load_file

from tasft.run import launch

SCRIPT = Path(__file__).with_name("ranks.py")
# What is measured, and what is a matter of the machine.
UNLIKE = ("runtime", "per_second", "_per_s", "peak_mib", "tokens", "total_flos", "model_preparation_time")


def start(kind, task, folder):
    """Exit code of a task of ranks.py, in two ranks, or in `one` process as nobody launched it."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), task, str(folder)]
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}), mock.patch.object(launch, "subprocess", forked):
        return forked.run(command).returncode if kind == "one" else launch.launch(command, kind, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished tasks, each run once: by kind."""
    folder, done = tmp_path_factory.mktemp("ranks"), {}

    def get(kind):
        if kind not in done:
            done[kind] = folder / kind
            # Two ranks end by killing themselves once all is written; the slower one may die of the other's end.
            code = start(kind, "cases", folder / kind)
            assert (code == 0) == (kind == "one"), code
        return done[kind]

    return get


def results(folder):
    return torch.load(folder / "results.pt", weights_only=False)


def measured(row):
    return {name: value for name, value in row.items() if not any(part in name for part in UNLIKE)}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_take_the_steps_of_one(runs, kind):
    one, two = results(runs("one")), results(runs(kind))
    assert one.keys() == two.keys()
    for name, wanted in one.items():
        found = two[name]
        assert found["sharded"] == (kind == "fsdp2"), name
        assert found["rows"] == wanted["rows"], name
        assert len(found["gradients"]) == len(wanted["gradients"]) == len(wanted["rows"])
        assert max(gradient.abs().max() for gradient in wanted["gradients"][0].values()) > 1e-3
        for step, (gradients, others) in enumerate(zip(wanted["gradients"], found["gradients"], strict=True)):
            assert gradients.keys() == others.keys(), name
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(
                    others[parameter],
                    gradient,
                    atol=1e-10,
                    rtol=0,
                    msg=lambda said, where=(name, step, parameter): f"{where}: {said}",
                )
        for parameter, weight in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][parameter], weight, atol=1e-10, rtol=0)
        assert [row.keys() for row in found["log"]] == [row.keys() for row in wanted["log"]], name
        for row, other in zip(wanted["log"], found["log"], strict=True):
            assert measured(other) == pytest.approx(measured(row), rel=1e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_two_ranks_of_deepspeed_end_with_the_weights_of_one(runs, tmp_path, kind):
    """In float32, which is all that it offers, after steps that move weights by hundredths."""
    one = results(runs("one"))
    assert start(kind, "cases in float32", tmp_path) == 0
    two = results(tmp_path)
    for name, wanted in one.items():
        found = two[name]
        assert found["sharded"] == (kind == "zero3"), name
        assert found["rows"] == wanted["rows"], name
        for parameter, weight in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][parameter].double(), weight, atol=2e-4, rtol=0)
        for row, other in zip(wanted["log"], found["log"], strict=True):
            assert measured(other) == pytest.approx(measured(row), rel=1e-3, abs=1e-4), name


def test_the_rows_of_a_step_are_as_many_of_each_kind_as_asked_for(runs):
    steps = results(runs("ddp"))["stratified, of lora"]["rows"]
    assert [len(step) for step in steps] == [8, 8, 8, 2] * 2
    drawn = [sorted(row for step in epoch for row in step) for epoch in (steps[:4], steps[4:])]
    assert drawn[0] != drawn[1]  # other rows to avoid


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_ranks_that_were_killed_end_where_the_undisturbed_ones_do(runs, kind):
    folder = runs(kind)
    whole, cut = folder / "whole", folder / "cut"
    assert not (cut / "checkpoint-7").exists()
    # The log of a step whose checkpoint was not there yet; the step comes again.
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss')
    assert start(kind, "go on", folder) == 0
    rows = [
        [measured(json.loads(line)) for line in (side / "metrics.jsonl").read_text().splitlines()]
        for side in (whole, cut)
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    assert rows[0] == rows[1]
    last = "checkpoint-8"
    saved = "adapter_model.safetensors"
    assert (whole / last / saved).read_bytes() == (cut / last / saved).read_bytes()
    optimizer = "optimizer.bin" if kind == "fsdp2" else "optimizer.pt"
    states = [torch.load(side / last / optimizer, weights_only=False)["state"] for side in (whole, cut)]
    assert states[0].keys() == states[1].keys()
    for parameter, state in states[0].items():
        assert all(torch.equal(value, states[1][parameter][name]) for name, value in state.items()), parameter
    # It is a training, and one without dropout would differ.
    before = load_file(whole / "checkpoint-1" / saved)
    assert any(not torch.equal(value, before[name]) for name, value in load_file(whole / last / saved).items())
