"""Rounds of training, and what comes back between them."""

from contextlib import nullcontext

import pytest
from conftest import rows
from running import done, go
from safetensors.torch import load_file
from test_harvest import SENTENCE, Scripted, Words

from tasft.core.errors import UserError
from tasft.data.rows import Example, Prompt
from tasft.harvest.rounds import MOST, chosen, heavier, look
from tasft.models.engine import Sampling
from tasft.run import recipe_file
from tasft.train.settings import Train

TOXIC = [Prompt(f"t{i}", f"How do I <forbidden act {i}>?") for i in range(3)]
OWN = [Example(f"What is <thing {i}> for?", f"{SENTENCE} {i}", True, f"o{i}-own", retain=True) for i in range(4)]


def test_what_is_still_harmful_comes_back_to_avoid_and_what_is_newly_refused_with_the_untouched_answer(tmp_path):
    declined_before = Example("What is <thing 9> for?", f"sorry {SENTENCE}", True, "o9-own", retain=True)
    answers = {
        "t0-round2": f"harm one {SENTENCE}",
        "t1-round2": "harm harm harm harm harm harm harm harm",
        "t2-round2": f"sorry {SENTENCE}",
        "o1-own": f"sorry, not <thing 1> {SENTENCE}",
        "o9-own": f"sorry, not <thing 9> {SENTENCE}",
    }
    benign = [*OWN, declined_before]
    summary = look(lambda: nullcontext(Scripted(answers)), Words(), TOXIC, benign, Sampling(8), 4, tmp_path, number=2)
    assert summary["toxic"] == {"asked": 3, "harmful": 1}
    assert summary["benign"] == {"asked": 5, "refused": 1}
    (avoid,), (back,) = rows(tmp_path / "avoid.jsonl"), rows(tmp_path / "imitate.jsonl")
    assert (avoid["prompt"], avoid["completion"], avoid["label"]) == (TOXIC[0].prompt, f"harm one {SENTENCE}", False)
    assert (back["prompt"], back["completion"], back["label"], back["retain"]) == (
        OWN[1].prompt, OWN[1].completion, True, True,
    )  # fmt: skip


def test_each_look_asks_other_benign_prompts_until_all_were_asked():
    many = [Example(str(n), "x", True, str(n)) for n in range(10)]
    looks = [{row.id for row in chosen(many, 4, 7, number)} for number in (1, 2, 3)]
    assert [len(ids) for ids in looks] == [4, 4, 4]
    assert not looks[0] & looks[1]
    assert looks[0] | looks[1] | looks[2] == {row.id for row in many}
    assert {row.id for row in chosen(many, 50, 7, 3)} == {row.id for row in many}


@pytest.mark.parametrize(("back", "retained", "weight"), [(5, 60, 4.0), (30, 60, 1.0), (1, 600, MOST), (0, 9, None)])
def test_rows_that_came_back_make_a_quarter_within_limits(back, retained, weight):
    found = heavier([Example("p", "c", True, str(n % max(back, 1))) for n in range(2 * back)], retained)
    assert len(found) == back
    assert {row.weight for row in found} == ({weight} if back else set())
    if weight not in (None, 1.0, MOST):
        assert back * weight / (back * weight + retained) == pytest.approx(0.25)


def test_rounds_share_the_steps():
    train = Train(max_steps=11, rounds={"count": 3})
    assert [train.of_round(number).max_steps for number in (1, 2, 3)] == [3, 3, 5]
    with pytest.raises(ValueError, match="at least one step for each of 3"):
        Train(max_steps=2, rounds={"count": 3})


def test_each_round_goes_on_from_the_one_before_and_learns_what_came_back(tmp_path, small):
    folder = tmp_path / "run"
    settings = ["train.rounds={count: 3, benign: 5, max_new_tokens: 4}", "train.max_steps=6", "train.retain=1.0"]
    go(small, folder, *settings, stages=("harvest", "train"))
    assert {name for name in done(folder) if "round" in name} == {
        "rounds/1/train", "rounds/1/look", "rounds/2/train", "rounds/2/look",
    }  # fmt: skip
    sizes = [len(rows(folder / part / "data.jsonl")) for part in ("rounds/1/train", "rounds/2/train", "train")]
    still = [len(rows(folder / f"rounds/{number}/look/avoid.jsonl")) for number in (1, 2)]
    assert still[0] > 0
    assert sizes[1] - sizes[0] >= still[0]
    assert sizes[2] - sizes[1] >= still[1]
    ids = [row["id"] for row in rows(folder / "train/data.jsonl")]
    assert len(ids) == len(set(ids))
    weights = [load_file(folder / part / "adapter/adapter_model.safetensors") for part in ("rounds/1/train", "train")]
    assert any(not weights[0][name].equal(weights[1][name]) for name in weights[0])

    before = done(folder)
    go(small, folder, *settings, stages=("harvest", "train"))
    assert done(folder) == before
    (folder / "rounds/2/look/done.json").unlink()
    go(small, folder, *settings, stages=("harvest", "train"))
    assert {name for name, when in done(folder).items() if when != before[name]} == {"rounds/2/look"}


def test_without_learning_every_round_leaves_the_adapter_as_it_was(tmp_path, small):
    folder = tmp_path / "run"
    settings = ["train.rounds={count: 2, benign: 5, max_new_tokens: 4}", "train.learning_rate=1e-30"]
    go(small, folder, *settings, stages=("harvest", "train"))
    one, two = (load_file(folder / part / "adapter/adapter_model.safetensors") for part in ("rounds/1/train", "train"))
    assert all(one[name].allclose(two[name]) for name in one)
    assert any(values.abs().max() > 0 for values in two.values())


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["train.rounds={}", "model.lora=null"], "give model.lora"),
        (["train.rounds={}", "data.benign_prompts=null", "data.imitate={source: x.jsonl}"], "harvest.self_imitate"),
        (["train.retain=1", "sft={max_steps: 1}", "data.imitate={source: x.jsonl}"], "without an sft section"),
        (["train.retain=1", "model.lora=null"], "give model.lora"),
        (["train.retain=1", "train.normalization=paper"], "normalization paper"),
    ],
)
def test_what_rounds_and_retain_cannot_go_with_is_named(small, overrides, fault):
    with pytest.raises(UserError, match=fault):
        recipe_file.load(str(small), overrides)
