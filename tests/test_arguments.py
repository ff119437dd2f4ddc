"""transformers' arguments: each is heeded or refused by name, and rows come as they do with its own trainer."""

import json
from collections import Counter
from dataclasses import fields

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainingArguments

from tasft import TASFTConfig, TASFTTrainer
from tasft.core.errors import UserError
from tasft.train.arguments import HEEDED, REFUSED
from tasft.train.sampler import StratifiedSampler

ROWS = [
    {"prompt": f"Name a colour {index}.", "completion": "Blue. " * (1 + index % 5), "label": index % 4 > 0}
    for index in range(16)
]


def trainer(folder, rows=ROWS, evaluate=None, arguments=(), **settings):
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | settings
    config = TASFTConfig(output_dir=str(folder), max_steps=2, **settings)
    return TASFTTrainer(tiny_model(), config, rows, evaluate, processing_class=tiny_tokenizer(), **dict(arguments))


WRONG = {
    "sampling": "unifrom",
    "normalization": "per_grp",
    "cost_space": "inptu",
    "penalty_weight": -1.0,
    "beta": 0.0,
    "retain": -1.0,
    "kl_rows": -3,
    "avoid_per_step": 0,
    "penalize_eos": "no",
    "padding_free": "no",
    "turns": "al",
    "prompt_format": "alpcaa",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_no_recipe_may_have_is_refused_in_python_too(tmp_path, name):
    """`sampling="unifrom"` would be taken for stratified, `penalize_eos="no"` for yes."""
    with pytest.raises(UserError, match=f"{'style' if name == 'prompt_format' else name} is {WRONG[name]!r}"):
        trainer(tmp_path, **{name: WRONG[name]})


# Each argument ---------------------------------------------------------------------------------------------------


def test_of_each_argument_of_transformers_it_is_known_whether_it_is_heeded():
    names = {field.name for field in fields(TrainingArguments)}
    assert names == HEEDED | REFUSED.keys()
    assert not HEEDED & REFUSED.keys()


OTHERS = {
    "label_smoothing_factor": 0.5,
    "average_tokens_across_devices": False,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "torch_compile": True,
    "use_cache": True,
    "auto_find_batch_size": True,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "tokens",
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "label_names": ["labels"],
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_an_argument_that_would_not_be_heeded_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=rf"^{name}=.* has no effect here: .*; leave it out$"):
        trainer(tmp_path, **{name: OTHERS[name]})


def test_no_argument_that_is_refused_is_left_untried():
    assert OTHERS.keys() == REFUSED.keys() - {"parallelism_config"}  # That one cannot be made on one process.


def test_an_argument_that_a_later_transformers_adds_is_refused_until_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("tasft.train.arguments.HEEDED", HEEDED - {"weight_decay"})
    with pytest.raises(UserError, match=r"weight_decay=0\.1 has no effect here: transformers .* does not know it"):
        trainer(tmp_path, weight_decay=0.1)


def test_masks_are_not_counted_where_rows_lie_end_to_end(tmp_path):
    with pytest.raises(UserError, match=r"include_num_input_tokens_seen='non_padding' counts masks, .*; use all$"):
        trainer(tmp_path, padding_free=True, include_num_input_tokens_seen="non_padding")


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler"])
def test_what_accelerate_would_do_to_batches_is_refused_by_name(tmp_path, name):
    value = name in ("split_batches", "dispatch_batches")
    with pytest.raises(UserError, match=f"accelerator_config: {name}={value} has no effect here"):
        trainer(tmp_path, accelerator_config={name: value})


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_a_function_that_would_never_be_called_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} has no effect here"):
        trainer(tmp_path, arguments={name: lambda *_: {}})


def test_the_seed_of_the_data_is_heeded(tmp_path):
    def order(**settings):
        sampler = trainer(tmp_path, seed=1, **settings)._get_train_sampler()
        assert isinstance(sampler, StratifiedSampler)
        return list(sampler)

    assert order() == order(data_seed=1) != order(data_seed=2)
    assert sorted(trainer(tmp_path, sampling="uniform", data_seed=2)._get_train_sampler()) == list(range(16))


def test_one_process_works_on_one_device(tmp_path):
    config = TASFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    config._n_gpu = 2
    assert config.n_gpu == 2
    made = TASFTTrainer(tiny_model(), config, ROWS, processing_class=tiny_tokenizer())
    assert (made.args.n_gpu, made.args.train_batch_size) == (1, config.per_device_train_batch_size)


# A step that is not finite ---------------------------------------------------------------------------------------


class Diverges(TASFTTrainer):
    """At step 4 the loss, or the gradient of one weight, is no number."""

    where = "loss"

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 3 and self.model.training:
            head = self.model.get_output_embeddings().weight
            # The second has a derivative of 0 / 0 and the value 0.
            loss = loss * float("nan") if self.where == "loss" else loss + head.sub(head.detach()).square().sum().sqrt()
        return loss


@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_training_before_it_reaches_the_weights(tmp_path, monkeypatch, where, norm):
    monkeypatch.setattr(Diverges, "where", where)
    config = TASFTConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=6, save_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=norm, kl_rows=0,
    )  # fmt: skip
    made = Diverges(tiny_model(), config, ROWS, processing_class=tiny_tokenizer())
    with pytest.raises(UserError, match=rf"the {where} of step 4 is not a finite number, .*: lower learning_rate"):
        made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    again = tiny_model().from_pretrained(tmp_path / "checkpoint-3")
    for name, weight in again.named_parameters():
        assert torch.equal(weight, made.model.get_parameter(name)), name
        assert weight.isfinite().all()


def test_weights_that_the_last_step_broke_are_neither_saved_nor_given_back(tmp_path):
    made = trainer(tmp_path, learning_rate=3e38, save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
    with pytest.raises(UserError, match="after step 1 weights are not finite numbers: lower learning_rate"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# Rows to evaluate on ---------------------------------------------------------------------------------------------


def test_any_rows_can_be_evaluated_on_as_with_transformers(tmp_path):
    made = trainer(tmp_path, evaluate=ROWS[:8], kl_rows=4)
    own, other, same = made.evaluate(), made.evaluate(ROWS[8:]), made.evaluate(ROWS[:8])
    assert own["eval_loss"] == pytest.approx(same["eval_loss"], abs=1e-6)
    assert abs(other["eval_loss"] - own["eval_loss"]) > 1e-4
    # Of these rows nobody has looked at the model at step 0.
    assert "eval_kl" in own
    assert "eval_kl" not in other
    assert made.predict(ROWS[8:]).metrics["test_loss"] == pytest.approx(other["eval_loss"], abs=1e-6)


def test_persistent_workers_do_not_give_the_rows_that_were_evaluated_before(tmp_path):
    made = trainer(tmp_path, evaluate=ROWS[:8], dataloader_num_workers=1, dataloader_persistent_workers=True)
    own, other = made.evaluate(), made.evaluate(ROWS[8:])
    assert abs(other["eval_loss"] - own["eval_loss"]) > 1e-4


def test_several_sets_are_evaluated_each_under_its_name(tmp_path):
    sets = {"a": ROWS[:8], "b": ROWS[8:]}
    made = trainer(tmp_path, evaluate=sets, eval_strategy="steps", eval_steps=1, kl_rows=4)
    found = made.evaluate()
    for name, rows in sets.items():
        alone = trainer(tmp_path, evaluate=rows).evaluate()
        assert found[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"], abs=1e-6)
        assert found[f"eval_{name}_kl"] == pytest.approx(0.0, abs=1e-5)
    made.train()
    last = made.evaluate()
    assert last["eval_a_kl"] > 0
    assert last["eval_a_kl"] != last["eval_b_kl"]
    assert made.encoding.imitate == 12  # Of the rows to train on, whatever was evaluated.


def test_a_penalty_of_step_0_takes_other_rows_before_training_alone(tmp_path):
    made = trainer(tmp_path, penalty="emd_hinge", evaluate=ROWS[:8])
    before = made.evaluate(ROWS[:8])["eval_penalty"]
    assert before == pytest.approx(made.evaluate()["eval_penalty"], abs=1e-6)
    made.train()
    made.evaluate()
    with pytest.raises(UserError, match="compares each row with the model at step 0"):
        made.evaluate(ROWS[:8])


@pytest.mark.parametrize("value", [True, False])
def test_unused_columns_are_passed_over_whatever_is_said_of_them(tmp_path, value):
    rows = [row | {"note": "mine"} for row in ROWS]
    made = trainer(tmp_path, rows, remove_unused_columns=value)
    made.train()
    assert {"input_ids", "labels", "avoid", "segments"} <= next(iter(made.get_train_dataloader())).keys()


# Streams ---------------------------------------------------------------------------------------------------------


class Plain:
    def __iter__(self):
        return iter(ROWS)


class Torchs(IterableDataset):
    """Says nothing of workers."""

    def __iter__(self):
        return iter(ROWS)


class Sharing(IterableDataset):
    """Shares its rows out among workers by itself, as torch advises."""

    def __iter__(self):
        worker = get_worker_info()
        return iter(ROWS[worker.id :: worker.num_workers] if worker else ROWS)


def shards(count):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset(count)


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
@pytest.mark.parametrize("source", [Plain, Torchs, Sharing, lambda: shards(1), lambda: shards(3)])
def test_a_stream_gives_each_row_once_in_each_epoch_however_many_workers(tmp_path, source, duplicates):
    for settings in ({}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}):
        made = trainer(
            tmp_path, source(), penalty="emd", duplicates=duplicates, per_device_train_batch_size=4, **settings
        )
        loader = made.get_train_dataloader()
        for _ in range(2):
            rows = Counter(tuple(row[row >= 0].tolist()) for batch in loader for row in batch["input_ids"])
            assert rows.total() == len(ROWS), (settings, rows)
            assert set(rows.values()) == {1}


def test_a_row_of_a_stream_is_named_by_its_number_whichever_worker_reads_it(tmp_path):
    rows = [*ROWS[:5], {"prompt": "x"}, *ROWS]
    made = trainer(tmp_path, iter(rows), penalty="emd", dataloader_num_workers=2)
    with pytest.raises(UserError, match="row 5: "):
        list(made.get_train_dataloader())


def test_a_stream_that_is_shuffled_comes_in_another_order_in_each_epoch(tmp_path):
    stream = shards(1).shuffle(seed=1, buffer_size=16)
    made = trainer(tmp_path, stream, penalty="emd", per_device_train_batch_size=4)
    loader = made.get_train_dataloader()
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append(json.dumps([row.tolist() for batch in loader for row in batch["input_ids"]]))
    assert orders[0] != orders[1]


def test_a_padding_token_that_the_model_does_not_know_pads_all_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    settings = {"output_dir": str(tmp_path), "max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    config = TASFTConfig(save_strategy="no", **settings)
    found = TASFTTrainer(tiny_model(), config, ROWS, processing_class=tokenizer).train().training_loss
    assert found == trainer(tmp_path).train().training_loss
