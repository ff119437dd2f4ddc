"""What a log gets where a terminal would get a bar, and what a signal leaves behind."""

import io
import json
import os
import shutil
import signal
import subprocess
import time

import forked
import pytest
import yaml
from conftest import rows
from forked import TASFT
from running import go, small_recipe
from tqdm import tqdm

from tasft.core.progress import PLAIN, Lines
from tasft.train.checkpoints import STOPPED, checkpoints

# Hours of work in a second: every update is shown.
OFTEN = os.environ | {"TQDM_MININTERVAL": "0", "TQDM_DELAY": "0"}


def shown(work):
    stream = io.StringIO()
    work(Lines(stream))
    return stream.getvalue()


def test_each_state_of_a_bar_is_a_line_of_its_own():
    def work(stream):
        with tqdm(total=2, desc="replies", file=stream, mininterval=0, bar_format=PLAIN["TQDM_BAR_FORMAT"]) as bar:
            bar.update()
            print("between", file=stream)
            bar.update()
        print("after", file=stream)

    lines = shown(work).splitlines()
    assert [line.split(" (")[0] for line in lines if "between" not in line] == [
        *("replies: 0 of 2", "replies: 1 of 2", "replies: 2 of 2"),
        "after",
    ]
    assert "between" in lines
    assert all("left)" in line for line in lines if line.startswith("replies"))


def test_bars_below_each_other_and_bars_that_vanish_leave_nothing_but_lines():
    def work(stream):
        for _ in tqdm(range(2), desc="outer", file=stream, mininterval=0):
            for _ in tqdm(range(2), desc="inner", file=stream, mininterval=0, leave=False):
                pass

    found = shown(work)
    assert not {"\r", "\x1b"} & set(found)
    assert all(line.startswith(("outer: ", "inner: ")) for line in found.splitlines())


def test_ordinary_text_passes_unchanged():
    text = "one\n\ntwo: 100%\n  three\n"
    assert shown(lambda stream: [stream.write(part) for part in (text[:5], text[5:])]) == text


@pytest.fixture
def small(tmp_path, tiny):
    path = tmp_path / "recipe.yaml"
    values = small_recipe(tmp_path, tiny)
    values["train"] |= {"max_steps": 40, "save_steps": 500}
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_log_has_rate_and_time_left_and_no_carriage_return(small, tmp_path):
    done = subprocess.run(
        [*TASFT, "run", str(small), "train.max_steps=4", "--out", str(tmp_path / "run")],
        env=OFTEN,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    log = done.stderr.decode()
    assert not {"\r", "\x1b", "█"} & set(log + done.stdout.decode())
    for what in ("replies: toxic: 12 of 12 (", "train: 4 of 4 (", "judge: refusal_matching: 6 of 6 ("):
        assert any(line.startswith(what) for line in log.splitlines()), what
    assert "step/s, 00:00 left, loss " in log


def has_text(path):
    """Whether a line stands in the file, which is there before its first one."""
    return path.is_file() and path.stat().st_size > 0


def stopped(command, number, file, said):
    """Start a command, send it a signal when a file has text, and see how it ends; what it says of that, in a file."""
    with said.open("w") as stream:
        process = forked.Popen(command, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 400
        while not has_text(file):
            assert time.monotonic() < deadline, f"{file} stayed empty"
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.01)
    finally:
        process.send_signal(number)
        code = process.wait()
    assert code == 128 + number, said.read_text()
    assert "Traceback" not in said.read_text()
    return said.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_says_how_to_go_on_and_changes_nothing_of_the_end(number, small, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(small, whole, stages=("harvest",))
    shutil.copytree(whole, cut)
    go(small, whole, stages=("train",))

    command = [*TASFT, "train", str(small), "--out", str(cut)]
    said = stopped(command, number, cut / "train" / "metrics.jsonl", tmp_path / "said")
    assert f"Go on with: tasft train {small} --out {cut}\n" in said
    (checkpoint,) = cut.glob("train/checkpoint-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert 0 < step < 40
    assert (checkpoint / STOPPED).exists()
    assert checkpoints(cut / "train", 1) == []  # None that a recipe asks for.

    go(small, cut, stages=("train",))
    saved = "train/adapter/adapter_model.safetensors"
    assert (cut / saved).read_bytes() == (whole / saved).read_bytes()
    assert [row["step"] for row in rows(cut / "train/metrics.jsonl")] == [
        row["step"] for row in rows(whole / "train/metrics.jsonl")
    ]


def test_sigterm_between_replies_keeps_them_and_says_how_to_go_on(small, tmp_path):
    command = [*TASFT, "harvest", str(small), "harvest.max_new_tokens=64", "harvest.samples=40", "--out"]
    run = tmp_path / "run"
    said = stopped([*command, str(run)], signal.SIGTERM, run / "harvest" / "replies.jsonl", tmp_path / "said")
    assert "Go on with: tasft harvest" in said
    assert rows(run / "harvest" / "replies.jsonl")
