"""Tasks of lm-eval on a model in memory, with rows from files and without a network."""

import json
import math
import socket
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from lm_eval import simple_evaluate
from torch.nn import functional as F

from tasft.core.errors import UserError
from tasft.evaluate import capability

REAL = Path(__file__).parents[1].parent / "shared/data/multiple_choice"

BOOLQ = [
    {"question": f"is <thing {k}> a thing", "title": "Things", "answer": ["True", "False"][k % 2], "passage": "<text>"}
    for k in range(9)
]
OPENBOOKQA = [
    {"question": f"<thing {k}> is ", "options": "A. red\nB. very heavy\nC. a bird\nD. lost", "answer": "B. very heavy"}
    for k in range(4)
]
PIQA = [{"goal": f"use <thing {k}>", "sol1": "turn it", "sol2": "eat it all", "label": k % 2} for k in range(5)]


@pytest.fixture
def local(tmp_path):
    """A folder with files of three tasks, one of them deeper."""
    files = {"boolq_validation": BOOLQ, "deeper/openbookqa_test": OPENBOOKQA, "piqa_validation": PIQA}
    for name, rows in files.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def measured(task, local, tmp_path, **settings):
    folder = tmp_path / "out" / task
    summary = capability.measure(
        tiny_model(), tiny_tokenizer(), task, folder, {"commit": "x"}, data_dir=str(local), **settings
    )
    assert json.loads((folder / "summary.json").read_text()) == summary
    return summary, [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


@torch.inference_mode()
def log_likelihood(context, choice):
    """log P(choice | context), computed here."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (context, choice))
    ids = torch.tensor([before + after])
    return -float(F.cross_entropy(model(ids).logits[0, len(before) - 1 : -1], ids[0, len(before) :], reduction="sum"))


def test_what_is_scored_is_the_likelihood_of_each_choice_after_lm_evals_prompt(local, tmp_path):
    prompts = {
        "boolq": [
            ([f"Things -- <text>\nQuestion: {row['question']}?\nAnswer:"], ["no", "yes"], row["answer"] == "True")
            for row in BOOLQ
        ],
        "openbookqa": [([row["question"].strip()], ["red", "very heavy", "a bird", "lost"], 1) for row in OPENBOOKQA],
        "piqa": [([f"Question: {row['goal']}\nAnswer:"], [row["sol1"], row["sol2"]], row["label"]) for row in PIQA],
    }
    for task, expected in prompts.items():
        summary, items = measured(task, local, tmp_path)
        right = []
        for item, ((context,), choices, label) in zip(items, expected, strict=True):
            scores = [log_likelihood(context, f" {choice}") for choice in choices]
            assert [reply[0] for reply in item["replies"]] == pytest.approx(scores, abs=1e-4)
            right.append(scores.index(max(scores)) == label)
            assert item["acc"] == right[-1]
        p, n = sum(right) / len(right), len(right)
        assert (summary["acc"]["value"], summary["acc"]["n"]) == (p, n)
        assert summary["acc"]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
        assert summary["acc"]["low"] <= p <= summary["acc"]["high"]


def test_figures_are_those_of_lm_evals_own_run_on_the_same_rows(local, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # It runs pip, for seconds.
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (local / "piqa_train.jsonl").write_text((local / "piqa_validation.jsonl").read_text())
    own = tmp_path / "own.yaml"
    rows = {split: str(local / f"piqa_{split}.jsonl") for split in ("train", "validation")}
    values = {"include": str(capability._index().task_index["piqa"].yaml_path), "dataset_path": "json"}
    own.write_text(json.dumps(values | {"dataset_kwargs": {"data_files": rows, "cache_dir": str(tmp_path)}}))
    for shots in (0, 2):
        found = simple_evaluate(
            "hf",
            model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
            tasks=[str(own)],
            num_fewshot=shots,
            batch_size=4,
            device="cpu",
            task_manager=capability._index(),
        )
        summary, items = measured("piqa", local, tmp_path, num_fewshot=shots, batch_size=4)
        for metric in ("acc", "acc_norm"):
            assert summary[metric]["value"] == found["results"]["piqa"][f"{metric},none"]
            assert summary[metric]["stderr"] == found["results"]["piqa"][f"{metric}_stderr,none"]
        for item, sample in zip(items, found["samples"]["piqa"], strict=True):
            assert item["replies"] == [list(reply) for reply in sample["filtered_resps"]]
            assert item["doc_hash"] == sample["doc_hash"]


def test_only_the_first_items_are_taken_when_there_is_a_limit(local, tmp_path):
    _, all_of_them = measured("boolq", local, tmp_path)
    summary, items = measured("boolq", local, tmp_path, limit=4)
    assert [item["id"] for item in items] == [f"boolq/{k}" for k in range(4)]
    assert summary["acc"]["n"] == summary["limit"] == 4
    assert [item["doc_hash"] for item in items] == [item["doc_hash"] for item in all_of_them[:4]]


def test_examples_come_before_an_item_when_they_are_wanted(local, tmp_path):
    (local / "boolq_train.jsonl").write_text((local / "boolq_validation.jsonl").read_text())
    plain, _ = measured("boolq", local, tmp_path)
    shown, items = measured("boolq", local, tmp_path, num_fewshot=1, limit=3)
    assert (plain["num_fewshot"], shown["num_fewshot"]) == (0, 1)
    zero = measured("boolq", local, tmp_path, limit=3)[1]
    assert all(one["replies"] != other["replies"] for one, other in zip(items, zero, strict=True))


def test_no_socket_is_opened_when_the_data_is_local(local, tmp_path, monkeypatch):
    tried = []  # Libraries may pass over what their requests raise.

    def remembered(self, address):
        tried.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", remembered)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    capability.check(["piqa"], 0, str(local))
    measured("piqa", local, tmp_path)
    assert tried == []


def test_without_a_file_the_hub_is_asked_and_what_to_do_is_said(local, tmp_path):
    with pytest.raises(UserError, match=r"arc_easy_test.jsonl .* data.data_dir"):
        measured("arc_easy", local, tmp_path)


def test_every_fault_of_tasks_and_files_is_named_at_once(local):
    (local / "boolq_validation.jsonl").write_text(
        '{"question": "q", "title": "t", "answer": "maybe", "passage": "p"}\n'
    )
    (local / "deeper" / "openbookqa_test.jsonl").write_text(json.dumps(OPENBOOKQA[0] | {"answer": "B. light"}) + "\n")
    (local / "piqa_validation.jsonl").rename(local / "piqa_test.jsonl")
    with pytest.raises(UserError) as caught:
        capability.check(["boolq", "openbookqa", "piqa", "opnbookqa"], 2, str(local))
    faults = "\n".join(caught.value.faults)
    for said in (
        "boolq_validation.jsonl:1: no question, passage, label for task boolq can be made of 'question'",
        "openbookqa_test.jsonl:1: no question_stem, choices, answerKey",
        "piqa is evaluated on piqa_validation.jsonl: not there",
        "lm-eval has no task 'opnbookqa'; did you mean openbookqa",
        "num_fewshot 2 needs boolq_train.jsonl",
    ):
        assert said in faults, faults
    with pytest.raises(UserError, match="is not a folder"):
        capability.check(["boolq"], 0, str(local / "nowhere"))


def test_rows_that_have_the_hubs_fields_are_left_as_they_are(local):
    rows = [{"question": "q", "passage": "T -- p", "label": 1, "idx": 3}]
    path = local / "boolq_validation.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
    assert capability.read_local("boolq", path) == rows


def test_other_metrics_have_the_interval_of_their_standard_error():
    items = [{"filter": "none", "score": value} for value in (0.5, 1.5)]
    found = capability._estimates({"alias": "t", "score,none": 1.0, "score_stderr,none": 0.5}, items)
    assert found == {"score": {"value": 1.0, "low": 1 - 0.979982, "high": 1 + 0.979982, "n": 2, "stderr": 0.5}}
    found = capability._estimates({"em,strict": 0.5, "em_stderr,strict": "N/A"}, [])
    assert found == {"em,strict": {"value": 0.5, "low": None, "high": None, "n": 0, "stderr": None}}


@pytest.mark.skipif(not REAL.is_dir(), reason="the public files are not here")
def test_every_row_of_the_public_files_can_be_read():
    counts = {"boolq_validation": 3270, "piqa_validation": 1838, "openbookqa_test": 500}
    for name, count in counts.items():
        assert len(capability.read_local(name.split("_")[0], REAL / f"{name}.jsonl")) == count
