import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
import yaml
from architectures import made_tiny
from conftest import WORDS, tiny_model, tiny_tokenizer
from conftest import rows as read
from peft import LoraConfig, PeftModel, get_peft_model
from running import PROMPTS, go
from tokenizers.processors import TemplateProcessing

from tasft.core.errors import UserError
from tasft.data.encode import Encoding, encode_rows
from tasft.data.rows import Example
from tasft.loss import IGNORE_INDEX
from tasft.run import recipe_file
from tasft.run.inputs import Inputs
from tasft.run.pipeline import Pipeline
from tasft.train import baselines, settings
from tasft.train.baselines import kto_rows, kto_trainer, kto_weights, safe_instead
from tasft.train.trainer import TASFTConfig, TASFTTrainer

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
ROWS = [
    *(Example(f"What is <thing {index}> for?", f"For work of kind {index}.", label=True) for index in range(9)),
    Example("What is <another thing> for?", "For work that", label=True, ends=False),
    *(Example(f"How do I <forbidden act {index}>?", f"You take the lamp {index}.", label=False) for index in range(3)),
    Example("How do I <last forbidden act>?", "You take the", label=False, ends=False),
]


def said(rows):
    return [(row.prompt, row.completion) for row in rows]


def adapted(seed=0):
    torch.manual_seed(seed)
    return get_peft_model(
        tiny_model(), LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


def arguments(folder, **changes):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 1,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | changes


def made(folder, model=None, rows=ROWS, tokenizer=None, encoding=None, **changes):
    return kto_trainer(
        model or adapted(),
        tokenizer or tiny_tokenizer(),
        rows,
        encoding or Encoding(),
        arguments(folder, **changes),
        0.1,
    )[0]


@torch.no_grad()
def log_probability(model, ids, begin):
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(begin, len(ids)))


# --- KTO


@pytest.mark.parametrize(
    ("desirable", "undesirable"), [(1, 1), (10, 10), (20000, 100), (100, 3000), (41, 40), (40, 41)]
)
def test_weights_balance_the_classes_and_raise_the_rarer(desirable, undesirable):
    one, other = kto_weights(desirable, undesirable)
    assert 1 <= one * desirable / (other * undesirable) <= 4 / 3
    assert min(one, other) == 1
    if desirable != undesirable and max(desirable, undesirable) > 1.5 * min(desirable, undesirable):
        assert (one > other) == (desirable < undesirable)


def test_each_row_is_paired_with_the_completion_of_its_neighbour_in_the_micro_batch():
    encoded = [
        {"input_ids": [7, index, 10 + index], "labels": [IGNORE_INDEX, IGNORE_INDEX, 10 + index], "avoid": index == 1}
        for index in range(5)
    ]
    rows = kto_rows(encoded, 3)
    assert [row["KL_completion_ids"] for row in rows] == [[12], [10], [11], [14], [13]]
    assert [row["label"] for row in rows] == [True, False, True, True, True]
    assert rows[2]["prompt_ids"] == [7, 2]
    assert rows[2]["completion_ids"] == [12]


def test_a_reply_begins_at_its_first_label_for_kto_too():
    """Between reply and end a template may write what is no label."""
    labels = [IGNORE_INDEX, 8, IGNORE_INDEX, 2]
    (row, _) = kto_rows([{"input_ids": [7, 8, 9, 2], "labels": labels, "avoid": True}] * 2, 2)
    assert (row["prompt_ids"], row["completion_ids"]) == ([7], [8, 9, 2])


def beginning_tokenizer():
    """One that puts a token before every text that it is not told to leave alone, as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@needs_trl
@pytest.mark.parametrize("style", ["chat", "alpaca"])
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, beginning_tokenizer])
@pytest.mark.parametrize("penalize_eos", [False, True])
def test_trl_trains_on_the_tokens_that_our_trainer_trains_on(tmp_path, style, tokenizer, penalize_eos):
    tokenizer, encoding = tokenizer(), Encoding(style, 200, penalize_eos=penalize_eos)
    kto = made(tmp_path, tokenizer=tokenizer, encoding=encoding, num_train_epochs=1, max_steps=-1)
    theirs = []
    for batch in kto.get_train_dataloader():
        for ids, there, reply, label in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], batch["label"], strict=True
        ):
            length = int(there.sum())
            theirs.append((ids[:length].tolist(), reply[:length].tolist(), bool(label)))
    settings = TASFTConfig(
        output_dir=str(tmp_path), prompt_format=style, max_length=200, penalize_eos=penalize_eos, report_to="none"
    )
    ours = TASFTTrainer(tiny_model(), settings, ROWS, processing_class=tokenizer)
    expected = [
        (row["input_ids"], [int(label != IGNORE_INDEX) for label in row["labels"]], not row["avoid"])
        for row in ours.train_dataset
    ]
    assert sorted(theirs) == sorted(expected)
    assert theirs != expected  # in an order that the seed draws


@needs_trl
@pytest.mark.parametrize("start", ["base", "sft"])
def test_the_reference_is_the_model_at_step_0(tmp_path, start):
    model = adapted()
    if start == "sft":
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.5)
    trainer = made(tmp_path, model)
    for row in trainer.train_dataset.select(range(6)):
        ids, begin = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        assert row["ref_logps"] == pytest.approx(log_probability(model, ids, begin), abs=1e-3)
    if start == "sft":
        with model.disable_adapter():
            assert abs(row["ref_logps"] - log_probability(model, ids, begin)) > 0.1
    assert list(model.peft_config) == ["default"]


@needs_trl
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "granite", "cohere", "falcon_h1", "recurrent_gemma", "modernbert-decoder"]
)
def test_log_probabilities_are_the_models_own_whatever_it_does_to_its_logits(tmp_path, family):
    others = {"cls_token_id": 0, "sep_token_id": 0, "bos_token_id": 0} if family == "modernbert-decoder" else {}
    model = made_tiny(family, **others)
    trainer = made(tmp_path, model)
    for row in trainer.train_dataset.select(range(3)):
        ids, begin = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        assert row["ref_logps"] == pytest.approx(log_probability(model, ids, begin), rel=1e-4, abs=1e-3)

    # Two rows of unlike length, in training as before it.
    rows = [trainer.train_dataset[0], trainer.train_dataset[1]]
    batch = trainer.data_collator(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    weight = model.get_input_embeddings().weight

    def gradient(log_probs):
        return torch.autograd.grad(log_probs.sum(), weight)[0]

    logits = model(**read, use_cache=False).logits[:, :-1].log_softmax(-1)
    own = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * (labels[:, 1:] != IGNORE_INDEX)
    held = model(**read, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(held, own, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient(held), gradient(own), rtol=1e-3, atol=1e-3)


@needs_trl
def test_an_adapter_on_the_output_head_is_refused_by_kto_too(tmp_path):
    settings = LoraConfig(r=2, lora_dropout=0.0, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="the adapter is on the output head"):
        made(tmp_path, get_peft_model(tiny_model(tied=False), settings))


@needs_trl
def test_the_first_step_lowers_the_undesirable_and_raises_the_desirable(tmp_path):
    model = adapted()
    encoded, _ = encode_rows(ROWS, tiny_tokenizer(), Encoding())

    def means():
        kinds = {True: [], False: []}
        for row in encoded:
            kinds[row["avoid"]].append(log_probability(model, row["input_ids"], row["labels"].count(IGNORE_INDEX)))
        return [sum(kinds[avoid]) / len(kinds[avoid]) for avoid in (True, False)]

    before = means()
    trainer = made(tmp_path, model, per_device_train_batch_size=len(ROWS), learning_rate=1e-3)
    trainer.train()
    after = means()
    assert after[0] < before[0]
    assert after[1] > before[1]
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["kto_kl"] == pytest.approx(0, abs=1e-6)
    assert not {"kl", "entropy"} & logged.keys()


@needs_trl
@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row for row in ROWS if row.label], "needs desirable and undesirable rows"),
        ([row for row in ROWS if not row.label], "needs desirable and undesirable rows"),
        ([replace(ROWS[0], weight=2.0), *ROWS[1:]], "does not know: drop the field"),
    ],
)
def test_rows_that_kto_cannot_take_are_refused(tmp_path, rows, sentence):
    with pytest.raises(UserError, match=sentence):
        made(tmp_path, rows=rows)


def test_without_trl_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install '\.\[kto\]'"):
        baselines.require_kto()


# --- Whole runs

TOXIC = [f"Say how a {one} may <be misused> with any {other}." for one, other in pairwise(sorted(WORDS)[:13])]
SAFE = [{"instruction": prompt, "input": "", "output": f"Rather not: {number}."} for number, prompt in enumerate(TOXIC)]


@pytest.fixture
def small(tmp_path, tiny):
    """A recipe for the tiny model, with everything that any method reads."""

    def file(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    values = {
        "name": "small",
        "seed": 1,
        "model": {"base": str(tiny), "lora": {"r": 2, "lora_dropout": 0.0}},
        "data": {
            "imitate": {
                "source": file(
                    "imitate.jsonl",
                    [{"instruction": f"What is {index}?", "output": f"A thing {index}."} for index in range(8)],
                )
            },
            "safe_responses": {"source": file("safe.jsonl", SAFE), "rows": 5},
            "toxic_prompts": f"{tmp_path / 'safe.jsonl'}#instruction",
        },
        "harvest": {"max_new_tokens": 8, "judge": "refusal_matching", "temperature": 1.0, "rows": 6},
        "train": {
            "max_steps": 6,
            "batch_size": 4,
            "save_steps": 1,
            "learning_rate": 1e-2,
            "monitor": None,
            "kl_rows": 0,
        },
        "evaluate": {
            "sets": {
                "toxic": {
                    "source": file("heldout.jsonl", [{"prompt": "Tell me how to <other act>."}]),
                    "kind": "toxic",
                }
            },
            "judges": ["refusal_matching"],
            "max_new_tokens": 8,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def report(folder):
    return (folder / "report" / "report.md").read_text()


@needs_trl
def test_kto_goes_the_whole_path_and_writes_down_its_counts_and_weights(small, tmp_path, capsys):
    run = tmp_path / "run"
    go(small, run, "train.method=kto", "train.beta=0.2")
    rows = read(run / "train" / "data.jsonl")
    undesirable = sum(not row["label"] for row in rows)
    about = json.loads((run / "train" / "kto.json").read_text())
    assert (about["desirable"], about["undesirable"], about["beta"]) == (len(rows) - undesirable, undesirable, 0.2)
    assert 1 <= about["desirable_weight"] * about["desirable"] / (about["undesirable_weight"] * undesirable) <= 4 / 3
    out = capsys.readouterr().out
    assert f"{about['desirable']} rows to imitate" in out
    assert f"{about['undesirable_weight']:.3g} undesirable" in out
    assert [row["step"] for row in read(run / "train" / "metrics.jsonl")] == [1, 5]
    assert {path.name for path in (run / "train" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert not (run / "train" / "README.md").exists()
    assert "KTO: rows to avoid are undesirable" in report(run)
    assert "the untrained model with beta 0.2" in report(run)


@needs_trl
@pytest.mark.parametrize(
    "change",
    [
        [],
        pytest.param(["model.lora=null"], marks=pytest.mark.slow),
        pytest.param(["train.start=sft", "sft={max_steps: 2, batch_size: 4}"], marks=pytest.mark.slow),
    ],
)
def test_kto_that_was_cut_off_ends_where_the_undisturbed_one_does(small, tmp_path, monkeypatch, change):
    stages = ("sft", "harvest", "train")
    wanted = ["train.method=kto", "train.learning_rate=1e-3", *change]
    go(small, tmp_path / "whole", *wanted, stages=stages)
    on_log = baselines._Metrics.on_log

    def dies(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise MemoryError
        on_log(self, args, state, control, **kwargs)

    cut = tmp_path / "cut"
    monkeypatch.setattr(baselines._Metrics, "on_log", dies)
    with pytest.raises(MemoryError):
        go(small, cut, *wanted, stages=stages)
    assert (cut / "train" / "checkpoint-4").is_dir()
    monkeypatch.setattr(baselines._Metrics, "on_log", on_log)
    go(small, cut, *wanted, stages=stages)
    saved = (
        "train/model/model.safetensors" if "model.lora=null" in change else "train/adapter/adapter_model.safetensors"
    )
    assert (cut / saved).read_bytes() == (tmp_path / "whole" / saved).read_bytes()
    assert [row["step"] for row in read(cut / "train" / "metrics.jsonl")] == [1, 5]


def test_stl_imitates_as_many_safe_responses_as_are_wanted_and_harvests_nothing(small, tmp_path):
    run = tmp_path / "run"
    go(small, run, "train.method=stl")
    assert not (run / "harvest").exists()
    rows = read(run / "train" / "data.jsonl")
    assert all(row["label"] for row in rows)
    safe = [(row["prompt"], row["completion"]) for row in rows if row["source"] == "safe_responses"]
    assert len(set(safe)) == 5
    assert set(safe) <= {(row["instruction"], row["output"]) for row in SAFE}
    assert len(rows) == 5 + 8
    assert "5 safe responses to toxic prompts" in report(run)
    other = tmp_path / "other"
    go(small, other, "train.method=stl", "seed=2", stages=("train",))
    assert said_in(other) != set(safe)


def said_in(run):
    rows = read(run / "train" / "data.jsonl")
    return {(row["prompt"], row["completion"]) for row in rows if row["source"] == "safe_responses"}


def test_stl_shares_the_prompts_of_the_harvest_where_it_is_told_to(small, tmp_path):
    harvested = ["data.safe_responses.rows=harvested"]
    go(small, tmp_path / "tasft", *harvested, stages=("harvest",))
    run = tmp_path / "stl"
    go(small, run, "train.method=stl", "harvest.anchors=prefilled", *harvested)
    avoid = {row["prompt"] for row in read(run / "harvest" / "avoid.jsonl")}
    assert avoid == {row["prompt"] for row in read(tmp_path / "tasft" / "harvest" / "avoid.jsonl")}
    assert len(avoid) == 6
    assert said_in(run) == {(row["instruction"], row["output"]) for row in SAFE if row["instruction"] in avoid}
    rows = read(run / "train" / "data.jsonl")
    assert all(row["label"] for row in rows)
    assert not [row for row in rows if row["source"] in ("harvest/avoid", "harvest/anchor")]
    assert "whose harmful answers the harvest kept" in report(run)


def test_toxic_prompts_without_a_safe_response_are_named_before_anything_is_written(small, tmp_path):
    (tmp_path / "toxic.jsonl").write_text(json.dumps({"prompt": "How do I <act of its own>?"}) + "\n")
    with pytest.raises(UserError, match=r"1 of 1 prompts .* have no safe response, 'How do I <act of its own>\?'"):
        go(
            small,
            tmp_path / "run",
            "train.method=stl",
            "data.safe_responses.rows=harvested",
            f"data.toxic_prompts={tmp_path / 'toxic.jsonl'}",
        )
    assert not (tmp_path / "run").exists()


def test_the_first_of_several_safe_responses_is_taken_once_for_each_row():
    avoid = [Example("b", "x", label=False), Example("a", "x", label=False), Example("b", "y", label=False)]
    responses = [Example("a", "1", label=True), Example("b", "2", label=True), Example("b", "3", label=True)]
    assert said(safe_instead(avoid, responses)) == [("b", "2"), ("a", "1"), ("b", "2")]


def test_safe_responses_to_prompts_of_an_evaluation_set_are_left_out(small, tmp_path):
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": TOXIC[3]}) + "\n")
    run = tmp_path / "run"
    go(small, run, "train.method=stl", "data.safe_responses.rows=null", stages=("train",))
    assert {prompt for prompt, _ in said_in(run)} == set(TOXIC) - {TOXIC[3]}
    with pytest.raises(UserError, match=r"data\.safe_responses: there are 11 rows to imitate, 12 are wanted"):
        go(small, run, "train.method=stl", "data.safe_responses.rows=12", stages=("train",))


def test_sft_reads_neither_harvest_nor_safe_responses(small, tmp_path):
    run = tmp_path / "run"
    go(small, run, "train.method=sft")
    assert not (run / "harvest").exists()
    assert len(read(run / "train" / "data.jsonl")) == 8


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.method=kto", "train.micro_batch_size=1"], "micro_batch_size must be at least 2"),
        (["train.method=kto", "train.turns=all"], "say turns: last"),
        (["train.method=kto", "harvest=null"], "train.method is kto: add a harvest section"),
        (["train.method=stl", "data.safe_responses=null"], "data.safe_responses is missing"),
        (["train.method=stl", "data.imitate=null"], "train.method is stl: data.imitate is missing"),
        (["train.method=stl", "data.safe_responses.rows=harvested", "harvest=null"], "rows harvested: add a harvest"),
        (["data.safe_responses.rows=harvest"], "data.safe_responses.rows"),
    ],
)
def test_a_recipe_that_a_method_cannot_follow_gets_a_sentence(small, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe_file.load(str(small), overrides)


def test_fields_that_a_method_does_not_read_are_noted(small):
    def notes(*overrides):
        return [note for note in Inputs(recipe_file.load(str(small), overrides)).warnings() if "not read" in note]

    assert notes("train.penalty=emd") == []
    assert notes("train.method=stl") == []
    assert notes("train.method=stl", "train.penalty=emd", "train.beta=0.3") == [
        "train.method is stl, which does not read train.penalty, train.beta"
    ]
    (note,) = notes("train.method=kto", "train.beta=0.3", "train.avoid_per_step=1")
    assert "train.avoid_per_step" in note
    assert "beta" not in note


def test_unread_fields_are_fields():
    for names in settings.UNREAD.values():
        assert set(names) <= set(settings.Train.model_fields)


OTHER = {
    "penalty": "emd",
    "penalty_weight": 2.0,
    "avoid_per_step": 2,
    "cost_space": "input",
    "center": True,
    "penalize_eos": True,
    "beta": 0.5,
    "normalization": "shared",
    "sampling": "uniform",
    "padding_free": True,
    "kl_rows": 3,
    "monitor": None,
    "retain": 1.0,
    "retain_nll": True,
    "rounds": {"count": 2},
}


@pytest.mark.parametrize("method", ["sft", "stl", "kto"])
def test_a_field_that_a_method_does_not_read_changes_nothing(method, small, tmp_path, monkeypatch):
    monkeypatch.setattr("tasft.run.stages.train.provenance.file_hash", str)  # Of rows that are not harvested here.
    answers = [{"instruction": prompt, "output": "No."} for prompt in PROMPTS["toxic"]]
    (tmp_path / "safe.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    usual = [f"train.method={method}", f"data.imitate={{source: {tmp_path}/safe.jsonl}}"]
    usual += [f"data.safe_responses={{source: {tmp_path}/safe.jsonl}}"] if method == "stl" else []

    def trainings(overrides):
        run = Pipeline(recipe_file.load(str(small), [*usual, *overrides]), tmp_path / "run")
        return [(step.folder, step.key) for step in run.steps("train")]

    others = [f"train.{name}={json.dumps(value)}" for name, value in OTHER.items() if name in settings.UNREAD[method]]
    assert len(others) == len(settings.UNREAD[method]) - 1  # own_penalty goes with penalty.
    assert trainings(others) == trainings([])


def test_an_adapter_that_was_saved_by_kto_is_one_that_any_stage_loads(tmp_path):
    pytest.importorskip("trl")
    model = adapted()
    made(tmp_path / "out", model).train()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    ids = tiny_tokenizer()("A thing").input_ids
    assert log_probability(loaded, ids, 1) == pytest.approx(log_probability(model, ids, 1), abs=1e-5)


@pytest.mark.parametrize(("rows", "micro"), [(9, 4), (5, 2), (10, 3), (2, 2)])
def test_no_row_is_compared_with_its_own_completion(rows, micro):
    encoded, _ = encode_rows(
        [Example(f"Name a colour {index}.", f"Blue {index}.", index % 4 > 0) for index in range(rows)],
        tiny_tokenizer(),
        Encoding(),
    )
    made = kto_rows(encoded, micro)
    assert not [row for row in made if row["KL_completion_ids"] == row["completion_ids"]]
    if rows % micro == 1:
        assert made[-1]["KL_completion_ids"] == made[-2]["completion_ids"]
