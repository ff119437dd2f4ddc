"""A tiny run that is killed three times ends as the undisturbed one, and no reply that was on disk is gone."""

import json
import random
import sys
from pathlib import Path

import forked
import kills
import yaml

NAMES = ("toxic", "benign", "heldout", "everyday")


def tiny_recipe(folder, tiny):
    for name in NAMES:
        rows = [{"prompt": f"Say something of <{name} {index}>."} for index in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"heldout": "toxic", "everyday": "benign"}
    values = {
        "name": "killed",
        "seed": 1,
        "model": {"base": str(tiny), "lora": {"r": 2, "lora_dropout": 0.0}},
        "data": {"toxic_prompts": str(folder / "toxic.jsonl"), "benign_prompts": str(folder / "benign.jsonl")},
        "harvest": {"max_new_tokens": 8, "judge": "refusal_matching", "temperature": 1.0},
        "train": {"max_steps": 20, "batch_size": 4, "avoid_per_step": 1, "save_steps": 3, "learning_rate": 1e-2},
        "evaluate": {
            "sets": {name: {"source": str(folder / f"{name}.jsonl"), "kind": kind} for name, kind in kinds.items()},
            "judges": ["refusal_matching"],
            "max_new_tokens": 8,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_that_is_killed_three_times_ends_as_the_undisturbed_one(tiny, tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    options = ["--kills", "3", "--out", str(tmp_path / "out"), "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["kills.py", str(tiny_recipe(tmp_path, tiny)), *options])
    forked.ready()
    kills.main()
    found = json.loads(result.read_text())
    assert (found["differ"], found["replies_gone"]) == ([], 0)
    assert found["kills"] == 3
    assert found["replies"] > 100
    assert found["moments"][-1]["replies"] > 0


def test_the_moments_are_spread_over_the_time_of_the_undisturbed_run():
    timeline = [(0.0, 0), (10.0, 5), (20.0, 6), (100.0, 7)]
    drawn = kills.moments(timeline, 2000, seed=3)
    assert [count for count, _ in drawn] == sorted(count for count, _ in drawn)
    shares = [sum(count == wanted for count, _ in drawn) / 2000 for wanted in (0, 5, 6)]
    assert all(abs(share - expected) < 0.03 for share, expected in zip(shares, (0.1, 0.1, 0.8), strict=True))
    assert max(delay for count, delay in drawn if count == 6) > 60
    assert drawn == kills.moments(timeline, 2000, seed=3)


def test_another_weight_verdict_or_missing_reply_is_named(tmp_path):
    for side in ("one", "other"):
        for name in ("train/adapter/adapter_model.safetensors", "evaluate/final/toxic/refusal_matching/verdicts.jsonl"):
            path = tmp_path / side / name
            path.parent.mkdir(parents=True)
            rows = [b"a\n", b"b\n"]
            random.Random(side).shuffle(rows)
            path.write_bytes(b"".join(rows) if "jsonl" in name else b"ab")
    one, other = tmp_path / "one", tmp_path / "other"
    assert kills.different(kills.result(one), kills.result(other)) == []
    (other / "train/adapter/adapter_model.safetensors").write_bytes(b"aB")
    (other / "evaluate/final/toxic/refusal_matching/verdicts.jsonl").write_bytes(b"a\nc\n")
    found = kills.different(kills.result(one), kills.result(other))
    assert found == ["evaluate/final/toxic/refusal_matching/verdicts.jsonl", "weights"]
    replies = Path(one, "harvest", "replies.jsonl")
    replies.parent.mkdir()
    replies.write_bytes(b'{"id": "1"}\n{"id": "2"}\n{"id"')
    known = kills.replies(one)
    assert len(known) == 2
    replies.write_bytes(b'{"id": "2"}\n')
    assert {line for _, line in known - kills.replies(one)} == {b'{"id": "1"}'}
