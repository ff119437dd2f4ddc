"""Several processes of one command: how they end, and that they train as one does."""

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec

import forked
import pytest
import torch
from conftest import rows, tasft_here
from forked import TASFT
from running import go
from safetensors.torch import load_file

from tasft.cli.common import Launch
from tasft.core.errors import UserError
from tasft.run import launch

needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
IN_TWO = ("--launch", "ddp", "-n", "2")
ADAPTER = "train/adapter/adapter_model.safetensors"
SCRIPT = """
import sys
from pathlib import Path
from tasft import TASFTConfig, TASFTTrainer
from conftest import tiny_model, tiny_tokenizer
from peft import LoraConfig

rows = [{"prompt": f"Say {n}", "completion": f"well {n}", "label": n % 3 > 0} for n in range(9)]
arguments = TASFTConfig(
    output_dir=sys.argv[1],
    use_cpu=True,
    max_steps=3,
    per_device_train_batch_size=2,
    report_to="none",
    penalty="emd_hinge",
)
lora = LoraConfig(r=2, target_modules=["q_proj"])
trainer = TASFTTrainer(tiny_model(), arguments, rows, processing_class=tiny_tokenizer(), peft_config=lora)
trainer.train()
trainer.save_model()
# Not printed: ranks share a line.
Path(sys.argv[1], f"world-of-{arguments.process_index}").write_text(str(arguments.world_size))
"""


@pytest.fixture(autouse=True)
def _one_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def _ranks_are_forked(monkeypatch):
    monkeypatch.setattr(launch, "subprocess", forked)


def test_the_first_exit_code_is_passed_on_and_the_others_are_stopped():
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    started = time.monotonic()
    assert launch.launch([sys.executable, "-c", code], "ddp", 3) == 3
    assert time.monotonic() - started < 300
    assert launch.launch([sys.executable, "-c", "pass"], "ddp", 2) == 0


def test_what_cannot_be_launched_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: 1)
    with pytest.raises(UserError, match=r"this machine has 1 GPU$"):
        launch.launch(["true"], "ddp", 2)
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        launch.launch(["true"], "zero2", 1)


def test_the_command_line_names_every_kind():
    assert set(Launch.__args__) == set(launch.KINDS)


@pytest.mark.usefixtures("_ranks_are_forked")
def test_a_batch_that_does_not_divide_is_said_once(small, tmp_path, capfd):
    run = tmp_path / "run"
    go(small, run, stages=("harvest",))
    assert tasft_here("train", small, "train.batch_size=5", "--out", run, *IN_TWO).returncode == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tasft:")]
    assert len(said) == 1
    assert "not a multiple of 2 rows in each of 2 processes" in said[0]


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero2", marks=[pytest.mark.slow, needs_deepspeed]),
        pytest.param("zero3", marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_a_launched_training_gives_the_adapter_of_one_process(small, tmp_path, kind, capfd, request):
    one, two = tmp_path / "one", tmp_path / "two"
    go(small, one, stages=("harvest",))
    shutil.copytree(one, two)
    go(small, one, stages=("train",))
    command = ["train", str(small), "--out", str(two), "--launch", kind, "-n", "2"]
    if kind == "ddp":
        request.getfixturevalue("_ranks_are_forked")
        assert tasft_here(*command).returncode == 0
    else:
        assert subprocess.run([*TASFT, *command]).returncode == 0
    assert capfd.readouterr().out.count("train: done in") == 1 + 1
    alone, together = (load_file(folder / ADAPTER) for folder in (one, two))
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-6, rtol=0)
    assert rows(one / "train" / "data.jsonl") == rows(two / "train" / "data.jsonl")
    assert [row["step"] for row in rows(two / "train" / "metrics.jsonl")] == [1]
    # The next stage, in one process, finds the training done.
    go(small, two, stages=("evaluate",))


def test_a_script_under_torchrun_trains_in_ranks(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    places = [str(path) for path in (os.path.dirname(__file__), os.environ.get("PYTHONPATH")) if path]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )
    assert done.returncode == 0
    assert [(tmp_path / "out" / f"world-of-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("_ranks_are_forked")
def test_replies_and_verdicts_of_two_ranks_are_those_of_one(small, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    go(small, one, stages=("harvest", "train"))
    shutil.copytree(one, two)
    shutil.rmtree(two / "harvest")
    go(small, one, stages=("evaluate",))
    for stage in ("harvest", "evaluate"):
        assert tasft_here(stage, small, "--out", two, *IN_TWO).returncode == 0
    written = sorted(path.relative_to(one) for path in one.rglob("*.jsonl"))
    assert len(written) > 10
    for path in written:
        assert (one / path).read_bytes() == (two / path).read_bytes(), path
    assert (one / "harvest" / "summary.json").read_bytes() == (two / "harvest" / "summary.json").read_bytes()
