"""Faults of the world: a full disk, a folder read-only or in use, a clock that jumps, damaged files of a run."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import rows
from running import go, small_recipe
from safetensors.torch import load_file, save_file

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.core.provenance import lock, write_json, writing
from tasft.models import local
from tasft.run.export import export
from tasft.train.metrics import MetricsFile
from tasft.train.trainer import TASFTTrainer

TRAIN = ("train.max_steps=8", "train.save_steps=2")
WEIGHTS = "train/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe_file(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(folder, tiny)))
    return path


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory):
    """An undisturbed run, up to its weights."""
    run = tmp_path_factory.mktemp("whole") / "run"
    go(recipe_file, run, *TRAIN, stages=("harvest", "train"))
    return run


@pytest.fixture
def begun(recipe_file, whole, tmp_path, monkeypatch):
    """A run whose training died at step 5."""
    run = tmp_path / "run"
    copied(whole, run)
    on_log = MetricsFile.on_log

    def dies(self, args, state, control, **arguments):
        if state.global_step >= 5:
            raise MemoryError
        return on_log(self, args, state, control, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "on_log", dies)
        with pytest.raises(MemoryError):
            go(recipe_file, run, *TRAIN, stages=("harvest", "train"))
    assert [path.name for path in run.glob("train/checkpoint-*")] == ["checkpoint-4"]
    return run


def copied(whole, run):
    """What was done before the training."""
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("train", ".lock*"))


def same_end(recipe_file, run, whole):
    go(recipe_file, run, *TRAIN, stages=("harvest", "train"))
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    steps = [row["step"] for row in rows(run / "train" / "metrics.jsonl")]
    assert steps == [row["step"] for row in rows(whole / "train" / "metrics.jsonl")]


# A disk ----------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own."""

    def __init__(self, place):
        self.place = place
        self.filler = place / ".filler"

    def leave(self, free):
        """Fill it but for so many bytes."""
        self.filler.unlink(missing_ok=True)
        self.filler.write_bytes(bytes(shutil.disk_usage(self.place).free - free))

    def remount(self, option):
        subprocess.run(["mount", "-o", f"remount,{option}", self.place], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    yield from mounted(tmp_path)


def mounted(tmp_path):
    """A `Disk`, while it is used."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small file system can be mounted here: needs root and its rights")
    yield Disk(place)
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_while_answers_come_is_named_and_the_run_goes_on_when_there_is_room(
    recipe_file, whole, disk, monkeypatch
):
    monkeypatch.setattr(local.TransformersEngine.__init__, "__defaults__", (5, None))
    run = disk.place / "run"
    run.mkdir()
    disk.leave(48 << 10)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room"):
        go(recipe_file, run, *TRAIN, stages=("harvest",))
    written = [row for path in run.rglob("replies.jsonl") for row in whole_rows(path)]
    assert not list(run.rglob(".*.json*.*")), "half a file is left"
    disk.filler.unlink()
    go(recipe_file, run, *TRAIN, stages=("harvest",))
    after = [row for path in run.rglob("replies.jsonl") for row in rows(path)]
    assert written
    assert all(row in after for row in written)


def whole_rows(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("free", [8 << 10, 40 << 10, 80 << 10])
def test_a_full_disk_while_weights_are_saved_is_named_and_training_goes_on_from_what_is_whole(
    recipe_file, whole, disk, free
):
    run = disk.place / "run"
    copied(whole, run)
    disk.leave(free)
    with pytest.raises(UserError, match="cannot be written"):
        go(recipe_file, run, *TRAIN, stages=("harvest", "train"))
    disk.filler.unlink()
    same_end(recipe_file, run, whole)


def test_a_read_only_folder_is_named_before_anything_is_done(recipe_file, whole, disk):
    run = disk.place / "run"
    copied(whole, run)
    disk.remount("ro")
    with pytest.raises(UserError, match="Read-only file system"):
        go(recipe_file, run, *TRAIN, stages=("harvest", "train"))
    with pytest.raises(UserError, match="Read-only file system"):
        go(recipe_file, disk.place / "new", *TRAIN, stages=("harvest",))
    disk.remount("rw")
    same_end(recipe_file, run, whole)


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path):
    for error in (FileNotFoundError(2, "No such file"), RuntimeError("shape"), MemoryError()):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error
    with pytest.raises(UserError, match=r"x: cannot be written \(Permission denied\)"), writing(tmp_path):
        raise PermissionError(13, "Permission denied", "x")
    with pytest.raises(UserError, match="No space left"), writing(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


# Two at once -----------------------------------------------------------------------------------------------------


def _hold(run, ready):
    with lock(Path(run)):
        ready.set()
        time.sleep(600)


def test_the_second_of_two_runs_is_told_who_holds_the_folder_until_that_one_dies(recipe_file, whole, tmp_path):
    run = tmp_path / "run"
    copied(whole, run)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(run, ready), daemon=True)
    other.start()
    try:
        assert ready.wait(30)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
        with pytest.raises(UserError) as caught:
            go(recipe_file, run, *TRAIN, stages=("harvest", "train"))
        said = rf"process {other.pid} on {re.escape(socket.gethostname())}, since 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        assert re.search(f"in use by another tasft process \\({said}\\)", str(caught.value))
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before
    finally:
        other.kill()
        other.join()
    with lock(run):
        assert json.loads((run / ".lock.json").read_text())["pid"] == os.getpid()


def test_a_lock_whose_holder_is_not_told_is_a_lock(tmp_path):
    with lock(tmp_path):
        (tmp_path / ".lock.json").write_text("{half")
        with pytest.raises(UserError, match="in use by another tasft process: wait for it"):
            lock(tmp_path)


# A clock ---------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_changes_nothing_and_no_newer_checkpoint_is_removed(
    recipe_file, whole, begun, monkeypatch
):
    tomorrow = time.time() + 86_400
    for path in begun.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    clock = iter(range(2**31, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    same_end(recipe_file, begun, whole)
    assert [path.name for path in begun.glob("train/checkpoint-*")] == ["checkpoint-8"]


# Checkpoints -----------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path):
    with zipfile.ZipFile(path) as archive:
        first = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[first.header_offset + 200] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter_model.safetensors", cut),
        ("adapter_model.safetensors", zeros),
        ("optimizer.pt", cut),
        ("optimizer.pt", flipped),
        ("scheduler.pt", empty),
        ("rng_state.pth", cut),
        ("trainer_state.json", cut),
        ("trainer_state.json", zeros),
        ("training_args.bin", empty),
    ],
)
def test_a_damaged_checkpoint_is_named_and_training_ends_as_the_undisturbed_one(
    recipe_file, whole, begun, capsys, name, damage
):
    path = begun / "train" / "checkpoint-4" / name
    damage(path)
    same_end(recipe_file, begun, whole)
    assert f"note: {path}: damaged" in capsys.readouterr().out


def test_of_two_checkpoints_the_whole_one_is_gone_on_from(recipe_file, whole, begun, capsys):
    good = begun / "train" / "checkpoint-4"
    bad = begun / "train" / "checkpoint-6"
    shutil.copytree(good, bad)
    cut(bad / "optimizer.pt")
    same_end(recipe_file, begun, whole)
    said = capsys.readouterr().out
    assert (
        f"note: {bad / 'optimizer.pt'}: damaged or cut short: training goes on from a step before checkpoint-6" in said
    )
    assert str(good) not in said


def test_a_checkpoint_that_was_not_finished_is_passed_over(recipe_file, whole, begun):
    half = begun / "train" / "checkpoint-6"
    shutil.copytree(begun / "train" / "checkpoint-4", half)
    (half / "trainer_state.json").unlink()
    empty(half / "optimizer.pt")
    same_end(recipe_file, begun, whole)


def test_damaged_weights_of_a_finished_training_are_named_and_made_again(recipe_file, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    cut(run / WEIGHTS)
    with pytest.raises(UserError) as caught:
        go(recipe_file, run, *TRAIN, stages=("evaluate",))
    assert re.search(
        r"adapter_model\.safetensors: damaged or cut short .*; remove .*/train to have it", str(caught.value)
    )
    shutil.rmtree(run / "train")
    same_end(recipe_file, run, whole)


# Rows ------------------------------------------------------------------------------------------------------------


def undone(run, step):
    (run / step / "done.json").unlink()


@pytest.mark.parametrize("name", ["replies", "verdicts"])
@pytest.mark.parametrize("tail", [b'{"id": "to', b"\x00" * 40, b"\xff", b'{"id": "t\xc3'])
def test_a_half_written_row_is_dropped_and_the_rest_kept(recipe_file, whole, tmp_path, name, tail):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    undone(run, "harvest")
    path = run / "harvest" / f"{name}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + tail)
    go(recipe_file, run, *TRAIN, stages=("harvest",))
    assert path.read_bytes() == (whole / "harvest" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["replies", "verdicts"])
@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"\x00" * 40, "not JSON"),
        (b"[1]", "no (reply|verdict)"),
        (b'{"id": "a"}', "no (reply|verdict)"),
        (b'{"id": "a"}{"id": "b"}', "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"1" * 5000, "not JSON"),
    ],
)
def test_a_damaged_row_within_is_named_and_no_other_is_touched(recipe_file, whole, tmp_path, name, line, why):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    undone(run, "harvest")
    path = run / "harvest" / f"{name}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], line, b"\n", *lines[2:]])
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{name}\.jsonl:3: {why}.*; remove that line"):
        go(recipe_file, run, *TRAIN, stages=("harvest",))
    assert path.read_bytes() == damaged
    path.write_bytes(b"".join(lines))
    go(recipe_file, run, *TRAIN, stages=("harvest",))
    assert path.read_bytes() == (whole / "harvest" / path.name).read_bytes()


@pytest.mark.parametrize("tail", [b'{"step": 5, "lo', b'{"step": 5, "loss": {}', b"\x00\x00"])
def test_a_half_written_row_of_metrics_is_dropped(recipe_file, whole, begun, tail):
    with (begun / "train" / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    same_end(recipe_file, begun, whole)


def test_a_damaged_row_of_metrics_is_named(recipe_file, begun):
    path = begun / "train" / "metrics.jsonl"
    path.write_bytes(b"half\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not JSON"):
        go(recipe_file, begun, *TRAIN, stages=("harvest", "train"))


def test_replies_that_are_gone_are_named_and_drawn_again(recipe_file, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    go(recipe_file, run, *TRAIN, stages=("evaluate",))
    place = run / "evaluate" / "base" / "toxic"
    path = place / "replies.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"".join(before.splitlines(keepends=True)[1:]))
    undone(run, "evaluate/base/toxic/refusal_matching")
    with pytest.raises(
        UserError, match=r"replies\.jsonl: 1 replies are gone, .*; ?remove .*done\.json|1 replies are gone"
    ):
        go(recipe_file, run, *TRAIN, stages=("evaluate",))
    undone(run, "evaluate/base/toxic")
    go(recipe_file, run, *TRAIN, stages=("evaluate",))
    assert sorted(path.read_bytes().splitlines()) == sorted(before.splitlines())


# A training that diverged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tasft", "kto"])
def test_a_training_that_diverges_ends_with_what_to_do_and_keeps_its_last_good_checkpoint(
    recipe_file, whole, tmp_path, monkeypatch, method
):
    if method == "kto":
        pytest.importorskip("trl")
    run = tmp_path / "run"
    copied(whole, run)
    step = torch.optim.AdamW.step

    def explodes(self, *args, **arguments):
        found = step(self, *args, **arguments)
        self.param_groups[0]["steps"] = steps = self.param_groups[0].get("steps", 0) + 1
        if steps == 5:
            for weight in self.param_groups[0]["params"]:
                weight.data.mul_(1e30)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", explodes)
    settings = (*TRAIN, f"train.method={method}")
    for _ in range(2):  # And again when it goes on from there.
        with pytest.raises(
            UserError, match=r"train: (the loss|the gradient) of step \d is not a finite number.*: lower"
        ):
            go(recipe_file, run, *settings, stages=("harvest", "train"))
        assert [path.name for path in run.glob("train/checkpoint-*")] == ["checkpoint-4"]
        assert not (run / "train" / "adapter").exists()
        assert not (run / "train" / "done.json").exists()
    monkeypatch.undo()
    if method == "tasft":
        same_end(recipe_file, run, whole)


def test_a_training_in_which_no_gradient_is_left_ends_though_all_is_finite(recipe_file, tmp_path, monkeypatch):
    """Norms make 0 of what is too large: no loss is infinite, and nothing is learned any more."""
    compute_loss = TASFTTrainer.compute_loss

    def of_nothing(self, model, *args, **kwargs):
        # What weights that run away end in depends on the processor; so the norm makes 0 of all here.
        if self.state.global_step == 2:
            model.get_base_model().model.norm.weight.data.zero_()
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(TASFTTrainer, "compute_loss", of_nothing)
    with pytest.raises(
        UserError, match=r"no weight has a gradient at step 3, though the loss is 5.*; lower learning_rate"
    ):
        go(recipe_file, tmp_path / "run", "train.max_steps=8")
    assert not (tmp_path / "run" / "train" / "done.json").exists()


def test_weights_that_are_not_finite_are_neither_evaluated_nor_reported_nor_exported(recipe_file, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    stages = ("harvest", "train", "evaluate", "report")
    go(recipe_file, run, *TRAIN, stages=stages)
    weights = load_file(run / WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("inf")
    save_file(weights, run / WEIGHTS)
    undone(run, "report")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: weights that are not finite numbers: base_model"):
        go(recipe_file, run, *TRAIN, stages=("report",))
    assert not (run / "report" / "done.json").exists()
    with pytest.raises(UserError, match="the training diverged: lower its learning_rate"):
        export(run, tmp_path / "model")
    undone(run, "evaluate/final/toxic")
    with pytest.raises(UserError, match="not finite numbers"):
        go(recipe_file, run, *TRAIN, stages=("evaluate",))


# Marks of a step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{half", "[]", "null", '"key"', "\x00\x00", "3"])
@pytest.mark.parametrize("name", ["harvest/done.json", "harvest/begun.json", "manifest.json"])
def test_a_damaged_mark_is_named_and_nothing_is_lost_or_drawn_again(
    recipe_file, whole, tmp_path, monkeypatch, name, content
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    if "begun" in name:
        undone(run, "harvest")
    (run / name).write_text(content)
    before = (run / "harvest" / "replies.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"{name}: (not JSON|not a JSON object) any more; remove it"):
        go(recipe_file, run, *TRAIN, stages=("harvest", "train"))
    assert (run / "harvest" / "replies.jsonl").read_bytes() == before
    if "begun" in name:
        return  # What the folder was begun with is not known any more: it would be cleared.
    (run / name).unlink()

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(local.TransformersEngine, "_generate", never)
    same_end(recipe_file, run, whole)


def test_a_mark_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_json(path, {"key": "a"})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provenance.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"), writing(tmp_path):
        write_json(path, {"key": "b"})
    assert json.loads(path.read_text()) == {"key": "a"}
    assert [each.name for each in tmp_path.iterdir()] == ["done.json"]
