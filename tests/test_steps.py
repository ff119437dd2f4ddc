"""A step that several runs share is done once, whoever comes when."""

import os
import threading
import time
from pathlib import Path

import pytest

from tasft.core.provenance import append_jsonl
from tasft.core.step import Step

NAME = Path("harvest")


def step(run, work, keeps=None, **reads):
    return Step(run / NAME, {"keeps": keeps, **reads}, work, keeps)


def write(did):
    def work(folder):
        did.append(folder)
        time.sleep(0.05)
        append_jsonl(folder / "rows.jsonl", [{"n": len(did)}])
        (folder / "weights").write_text("heavy")

    return work


def test_of_many_runs_at_once_one_does_the_work_and_all_have_its_files(tmp_path):
    did, took = [], []
    runs = [tmp_path / f"run{number}" for number in range(6)]

    def share(run):
        took.append(step(run, write(did), seed=1).share(tmp_path / "shared", NAME))

    threads = [threading.Thread(target=share, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(did) == 1
    assert sorted(seconds is None for seconds in took) == [False] + [True] * 5
    assert all(step(run, write(did), seed=1).is_done for run in runs)
    assert {(run / NAME / "weights").stat().st_ino for run in runs} == {(did[0] / "weights").stat().st_ino}
    assert {(run / NAME / "rows.jsonl").stat().st_nlink for run in runs} == {1}


def test_other_inputs_are_other_work(tmp_path):
    did = []
    for seed in (1, 2, 1):
        step(tmp_path / "run", write(did), seed=seed).share(tmp_path / "shared", NAME)
    assert len(did) == 2
    assert (tmp_path / "run" / NAME / "rows.jsonl").read_text() == '{"n": 1}\n'


def test_what_is_kept_is_drawn_in_one_place_and_a_finished_result_is_not_made_again(tmp_path):
    did = []
    for rows in (25, 100, 25):
        step(tmp_path / f"run{rows}", write(did), keeps={"model": 1}, rows=rows).share(tmp_path / "shared", NAME)
    assert len(did) == 2
    assert did[0] == did[1]
    assert (tmp_path / "run100" / NAME / "rows.jsonl").read_text() == '{"n": 1}\n{"n": 2}\n'
    assert (tmp_path / "run25" / NAME / "rows.jsonl").read_text() == '{"n": 1}\n'
    step(tmp_path / "other", write(did), keeps={"model": 2}, rows=25).share(tmp_path / "shared", NAME)
    assert did[2] != did[0]


def test_work_that_failed_with_other_inputs_has_undone_what_was_there(tmp_path):
    def fails(folder):
        (folder / "rows.jsonl").write_text("")
        raise RuntimeError("nothing was kept")

    did, keeps = [], {"prompts": 1}
    first = step(tmp_path, write(did), keeps, judge=1)
    first.run()
    with pytest.raises(RuntimeError, match="nothing"):
        step(tmp_path, fails, keeps, judge=2).run()
    assert not first.is_done
    first.run()
    assert len(did) == 2


@pytest.mark.parametrize("keeps", [None, {"model": 1}])
def test_work_that_was_interrupted_is_taken_up_by_the_next_run(tmp_path, keeps):
    folders = []

    def dies(folder):
        folders.append(folder)
        append_jsonl(folder / "rows.jsonl", [{"n": 0}])
        if len(folders) == 1:
            raise MemoryError

    with pytest.raises(MemoryError):
        step(tmp_path / "one", dies, keeps).share(tmp_path / "shared", NAME)
    assert not (tmp_path / "one" / NAME).exists()
    assert step(tmp_path / "two", dies, keeps).share(tmp_path / "shared", NAME) is not None
    assert (tmp_path / "two" / NAME / "rows.jsonl").read_text() == '{"n": 0}\n' * 2


def test_half_a_copy_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    did = []
    step(tmp_path / "one", write(did)).share(tmp_path / "shared", NAME)

    def full(source, target):
        raise KeyboardInterrupt

    other = step(tmp_path / "two", write(did))
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        with pytest.raises(KeyboardInterrupt):
            other.share(tmp_path / "shared", NAME)
    assert not other.is_done
    other.share(tmp_path / "shared", NAME)
    assert other.is_done
    assert (other.folder / "weights").is_file()
    assert len(did) == 1


def test_storage_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    step(tmp_path / "run", write([])).share(tmp_path / "shared", NAME)
    assert (tmp_path / "run" / NAME / "weights").read_text() == "heavy"


# What was paid for -----------------------------------------------------------------------------------------------


def test_what_other_inputs_gave_is_said_and_kept_aside_each_time(tmp_path, capsys):
    did, run = [], tmp_path / "run"
    (run / "evaluate").mkdir(parents=True)
    (run / ".lock.json").touch()
    for rate in (1, 2, 3):
        Step(run / "evaluate" / "toxic", {"train": {"rate": rate, "steps": 4}}, write(did)).run()
    earlier = run / "earlier" / "evaluate"
    assert [(earlier / f"toxic.{n}" / "rows.jsonl").read_text() for n in (1, 2)] == ['{"n": 1}\n', '{"n": 2}\n']
    assert (run / "evaluate" / "toxic" / "rows.jsonl").read_text() == '{"n": 3}\n'
    said = capsys.readouterr().out.splitlines()
    place, kept = run / "evaluate" / "toxic", earlier / "toxic.1"
    assert said[0] == f"note: {place} was made with other train.rate: what it held is kept as {kept}"
    assert len(said) == 2


def test_finished_work_says_what_would_have_it_redone(tmp_path):
    def step(**train):
        return Step(tmp_path / "train", {"train": {"penalty": "emd", "weight": 1.0} | train, "rows": "ab"}, write([]))

    assert step().outdated_by == []
    step().run()
    assert step().outdated_by == []
    assert step(penalty="nlcl", weight=2.0).outdated_by == ["train.penalty", "train.weight"]


def test_half_of_a_work_is_kept_aside_too_and_a_mark_alone_is_not(tmp_path, capsys):
    def dies(folder):
        append_jsonl(folder / "replies.jsonl", [{"n": 1}])
        raise MemoryError

    def dies_at_once(folder):
        raise MemoryError

    for work, seed in ((dies_at_once, 1), (dies, 2), (write([]), 3)):
        try:
            step(tmp_path, work, seed=seed).run()
        except MemoryError:
            continue
    assert [path.name for path in (tmp_path / "earlier").iterdir()] == ["harvest.1"]
    assert (tmp_path / "earlier" / "harvest.1" / "replies.jsonl").read_text() == '{"n": 1}\n'
    assert "other seed: " in capsys.readouterr().out


def test_what_costs_nothing_is_not_kept(tmp_path):
    for seed in (1, 2):
        Step(tmp_path / "report", {"seed": seed}, write([]), costs_nothing=True).run()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_result_that_is_in_no_store_is_kept_when_a_shared_one_takes_its_place(tmp_path):
    run, store = tmp_path / "run", tmp_path / "shared"
    step(run, write([]), seed=1).run()
    for seed in (2, 3, 2):
        step(run, write([]), seed=seed).share(store, NAME)
    assert [path.name for path in (run / "earlier").iterdir()] == ["harvest.1"]
