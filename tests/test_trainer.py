import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from tasft import TASFTConfig, TASFTTrainer
from tasft.core.errors import UserError
from tasft.data.rows import Example
from tasft.loss import PENALTIES, CostSpace
from tasft.train import trainer as trainer_module
from tasft.train.lower import LowerLayers
from tasft.train.sampler import StratifiedSampler

ROWS = [Example(f"Say {word}?", f"{word} it is" + "!" * index, True) for index, word in enumerate("abcdefghi")]
ROWS += [Example(f"Do {word}?", f"sure, {word}" + "." * index, False) for index, word in enumerate("xyz")]


def trainer(folder, rows=ROWS, model=None, lora=False, evaluate=None, **settings):
    settings = {"report_to": "none", "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True} | settings
    arguments = TASFTConfig(output_dir=str(folder), disable_tqdm=True, seed=3, **settings)
    return TASFTTrainer(
        model or tiny_model().double(),
        arguments,
        rows,
        evaluate,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def gradients(subject, batches):
    """Gradient of one optimizer step made of these micro-batches."""
    subject.model.zero_grad()
    collated = [subject.data_collator(batch) for batch in batches]
    counts = subject._get_num_items_in_batch(collated, torch.device("cpu"))
    for batch in collated:
        subject.compute_loss(subject.model, batch, num_items_in_batch=counts).backward()
    return torch.cat([p.grad.flatten() for p in subject.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("normalization", ["per_group", "shared"])
@pytest.mark.parametrize("penalty", [*PENALTIES])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(tmp_path, penalty, normalization):
    subject = trainer(tmp_path, penalty=penalty, normalization=normalization)
    rows = subject.train_dataset
    whole = gradients(subject, [rows])
    ones = gradients(subject, [[row] for row in rows])
    threes = gradients(subject, [rows[start::4][::-1] for start in range(4)])
    assert whole.abs().max() > 1e-3
    assert torch.allclose(ones, whole, atol=1e-10, rtol=0)
    assert torch.allclose(threes, whole, atol=1e-10, rtol=0)


def test_layers_below_the_first_adapted_one_keep_no_activations(tmp_path):
    kept = {}
    for layers in (None, [1]):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
        subject = trainer(tmp_path, model=get_peft_model(tiny_model(), lora))
        seen, saved = [], []
        subject.model.get_base_model().model.layers[1].register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].requires_grad)
        )
        batch = subject.data_collator(subject.train_dataset)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, saved=saved: saved.append(each.numel()), lambda _: _
        ):
            subject.compute_loss(subject.model, batch)
        kept[layers is None] = seen[-1], sum(saved)
    assert kept[True][0]
    assert not kept[False][0]
    assert kept[False][1] < 0.7 * kept[True][1]


def test_the_loss_is_the_papers_formula_with_group_means(tmp_path):
    subject = trainer(tmp_path, penalty="emd", penalty_weight=0.7)
    model, batch = subject.model, subject.data_collator(subject.train_dataset)
    loss = subject.compute_loss(model, dict(batch), num_items_in_batch=None)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    unit = torch.nn.functional.normalize(model.get_output_embeddings().weight, dim=-1)
    nll, push = [], []
    for row, targets, avoid in zip(logits, labels, batch["avoid"][:, 0], strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target != -100:
                q = scores.softmax(-1)
                (push if avoid else nll).append(-((q @ unit - unit[target]) ** 2).sum() if avoid else -q[target].log())
    expected = torch.stack(nll).mean() + 0.7 * torch.stack(push).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


KEPT = [replace(row, retain=row.label and index % 2 == 0) for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("normalization", ["per_group", "shared"])
@pytest.mark.parametrize("nll", [False, True])
def test_with_retain_too_the_gradient_does_not_depend_on_how_a_step_is_cut(tmp_path, nll, normalization):
    subject = trainer(tmp_path, KEPT, lora=True, retain=2.0, retain_nll=nll, normalization=normalization)
    _move(subject)
    rows = subject.train_dataset
    whole, ones = gradients(subject, [rows]), gradients(subject, [[row] for row in rows])
    assert whole.abs().max() > 1e-3
    assert torch.allclose(ones, whole, atol=1e-10, rtol=0)


def _move(subject):
    """Give the adapter weights that change something."""
    torch.manual_seed(0)
    for parameter in subject.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_retain_is_the_mean_divergence_from_the_model_without_its_adapter(tmp_path, nll, padding_free):
    subject = trainer(tmp_path, KEPT, lora=True, penalty="none", retain=0.7, retain_nll=nll, padding_free=padding_free)
    _move(subject)
    model = subject.model.eval()
    loss = subject.compute_loss(model, subject.data_collator(subject.train_dataset))

    def predictions(row):
        return model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)

    apart, nlls = [], []
    for row in subject.train_dataset:
        now, labels = predictions(row), torch.tensor(row["labels"][1:])
        with model.disable_adapter():
            before = predictions(row)
        counts = labels != -100
        if row["retain"]:
            apart.append((before.exp() * (before - now)).sum(1)[counts])
        if nll or not row["retain"]:
            nlls.append(-now[counts].gather(1, labels[counts][:, None]))
    expected = torch.cat(nlls).mean() + 0.7 * torch.cat(apart).mean()
    assert torch.cat(apart).mean() > 0.01
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)


def _upper(tmp_path, model=None, upto=3, **more):
    """A trainer with an adapter on the upper layer of two, and how often the lower one is asked."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    torch.manual_seed(0)
    adapted = get_peft_model(model or tiny_model(), lora)
    subject = trainer(tmp_path, KEPT, adapted, retain=2.0, max_steps=upto, **more)
    asked = []
    adapted.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: asked.append(1))
    return subject, asked


def test_layers_below_the_adapter_are_computed_once_for_both_passes_of_a_step(tmp_path):
    weights, counts = {}, {}
    for shared in (True, False):
        subject, asked = _upper(tmp_path / str(shared))
        if not shared:
            subject._lower = LowerLayers([])
        subject.train()
        counts[shared] = len(asked)
        weights[shared] = torch.cat([each.flatten() for each in subject.model.parameters() if each.requires_grad])
    assert torch.equal(weights[True], weights[False])
    assert 2 * counts[True] == counts[False]


def test_a_model_that_hands_more_upwards_than_states_computes_all_its_layers(tmp_path):
    subject, _ = _upper(tmp_path)
    layers = subject.model.get_base_model().model.layers
    before = []
    # As layers do that take keys and values from layers below.
    layers[0].mlp.register_forward_hook(lambda *_: before.append(1))
    layers[1].register_forward_hook(lambda _, __, states: states + (before.pop() if before else 0))
    subject.compute_loss(subject.model, subject.data_collator(subject.train_dataset))
    assert subject._lower._serve is False


def test_a_model_whose_upper_layers_read_what_lower_ones_left_is_trained_all_the_same(tmp_path):
    subject, _ = _upper(tmp_path)
    layers = subject.model.get_base_model().model.layers
    left = {}
    # As in Gemma 4: each pass begins without the keys and values that are shared.
    layers[0].mlp.register_forward_hook(lambda *_: left.update(keys=0))
    layers[1].register_forward_hook(lambda _, __, states: states + left.pop("keys"))
    subject.train()
    assert subject._lower._serve is False


def test_a_lower_layer_that_does_something_else_in_training_is_not_left_out(tmp_path):
    assert _upper(tmp_path)[0]._lower.layers
    assert not _upper(tmp_path, neftune_noise_alpha=5.0)[0]._lower.layers
    model = tiny_model()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert not _upper(tmp_path, model)[0]._lower.layers


def test_a_forward_of_a_layers_own_comes_back(tmp_path):
    subject, _ = _upper(tmp_path, upto=1)
    layer = subject.model.get_base_model().model.layers[0]
    layer.forward = own = layer.forward
    subject.train()
    assert vars(layer)["forward"] is own


def test_retain_holds_benign_rows_where_the_model_was(tmp_path):
    rows = [
        Example("Say?", "good words", True),
        *(Example(f"Tell {x}?", f"{x} it is", True, retain=True) for x in "abc"),
    ]
    ends = {}
    for weight in (0.0, 5.0):
        subject = trainer(
            tmp_path, rows, tiny_model(), lora=True, penalty="none", retain=weight, max_steps=30, kl_rows=3,
            evaluate=rows[1:], per_device_train_batch_size=4,
        )  # fmt: skip
        subject.train()
        ends[weight] = subject.evaluate()["eval_kl"]
    assert ends[5.0] < 0.5 * ends[0.0]


def test_without_the_weight_a_row_to_retain_is_learned_as_any_other(tmp_path):
    plain, kept = (trainer(tmp_path, rows, lora=True) for rows in (ROWS, KEPT))
    _move(plain)
    _move(kept)
    assert torch.equal(*(gradients(each, [each.train_dataset]) for each in (plain, kept)))


def test_retain_needs_an_adapter_a_frozen_head_and_another_normalisation(tmp_path):
    with pytest.raises(UserError, match="adapter"):
        trainer(tmp_path, KEPT, retain=1.0)
    with pytest.raises(UserError, match="normalization"):
        trainer(tmp_path, KEPT, lora=True, retain=1.0, normalization="paper")
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UserError, match="output head"):
        trainer(tmp_path, KEPT, model, retain=1.0)


@pytest.mark.parametrize("normalization", ["per_group", "paper"])
def test_weights_that_add_up_to_less_than_1_give_the_weighted_mean(tmp_path, normalization):
    rows = [Example("Say?", "good words", True, weight=0.1), Example("Do?", "bad words", False, weight=0.15)]
    subject = trainer(tmp_path, rows, penalty="emd", normalization=normalization, penalty_weight=0.5)
    batch = subject.data_collator(subject.train_dataset)
    found = subject.compute_loss(subject.model, dict(batch))
    alike = trainer(
        tmp_path, [replace(row, weight=1.0) for row in rows], penalty="emd", normalization=normalization,
        penalty_weight=0.5,
    )  # fmt: skip
    batch = alike.data_collator(alike.train_dataset)
    # A weight that all rows of a kind have changes nothing.
    assert found.item() == pytest.approx(alike.compute_loss(alike.model, dict(batch)).item(), rel=1e-5)


def test_a_batch_of_one_kind_still_trains(tmp_path):
    subject = trainer(tmp_path)
    imitate = [row for row in subject.train_dataset if not row["avoid"]]
    avoid = [row for row in subject.train_dataset if row["avoid"]]
    assert gradients(subject, [imitate]).abs().max() > 0
    assert gradients(subject, [avoid]).abs().max() > 0
    assert gradients(subject, [imitate, avoid]).abs().max() > 0


def test_penalty_none_leaves_avoid_rows_out(tmp_path):
    subject = trainer(tmp_path, penalty="none")
    assert not any(row["avoid"] for row in subject.train_dataset)


def test_it_learns_one_row_and_leaves_the_other(tmp_path):
    rows = [Example("Say?", "good words", True), Example("Do?", "bad words", False)]
    subject = trainer(tmp_path, rows, tiny_model(), penalty="emd_exact", max_steps=60, per_device_train_batch_size=2)
    subject.train()
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["imitate_nll"] < 0.3 < 2 < log[0]["imitate_nll"]
    assert log[-1]["emd"] > log[0]["emd"] + 0.05
    assert {"step", "loss", "penalty", "entropy", "top1", "learning_rate", "tokens_per_s", "grad_norm"} <= log[
        -1
    ].keys()


def test_the_penalty_is_what_moves_the_avoid_tokens(tmp_path):
    rows = [Example("Say?", "good words", True), Example("Do?", "bad words", False)]
    ends = {}
    for weight in (0.0, 5.0):
        settings = {"penalty_weight": weight, "max_steps": 30, "per_device_train_batch_size": 2}
        subject = trainer(tmp_path, rows, tiny_model(), **settings)
        subject.train()
        ends[weight] = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["emd"]
    assert ends[5.0] > ends[0.0] + 0.05


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("penalty", ["emd_hinge", "emd_exact", "npo"])
def test_a_run_that_was_stopped_ends_where_the_undisturbed_one_does(tmp_path, penalty, lora):
    settings = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "penalty": penalty}
    settings |= {"lora": lora, "evaluate": ROWS[:4]}
    whole = trainer(tmp_path / "whole", model=tiny_model(), **settings)
    whole.train()
    cut = trainer(tmp_path / "cut", model=tiny_model(), **settings)
    cut.train()
    again = trainer(tmp_path / "cut", model=tiny_model(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, again.model.get_parameter(name)), name
    rows = [(tmp_path / side / "metrics.jsonl").read_text().splitlines() for side in ("whole", "cut")]
    keys = ("step", "loss", "imitate_nll", "penalty", "emd", "entropy", "top1", "kl", "grad_norm", "learning_rate")
    kept = [[{key: json.loads(line)[key] for key in keys} for line in side] for side in rows]
    assert kept[0] == kept[1]


def test_hinge_margins_are_those_of_the_model_at_step_0(tmp_path):
    subject = trainer(tmp_path, penalty="emd_hinge")
    row = next(row for row in subject.train_dataset if row["avoid"])
    logits = subject.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    unit = torch.nn.functional.normalize(subject.model.get_output_embeddings().weight, dim=-1)
    for position in range(len(row["input_ids"]) - 1):
        label = row["labels"][position + 1]
        if label != -100:
            q = logits[position].softmax(-1)
            cost = 1 - unit @ unit[label]
            others = torch.cat([q[:label], q[label + 1 :]]) / (1 - q[label])
            expected = others @ torch.cat([cost[:label], cost[label + 1 :]])
            assert row["margins"][position] == pytest.approx(expected.item(), abs=1e-6)


def test_npo_compares_with_the_model_at_step_0(tmp_path):
    subject = trainer(tmp_path, penalty="npo")
    row = next(row for row in subject.train_dataset if row["avoid"])
    log_q = subject.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    for position, label in enumerate(row["labels"][1:]):
        expected = 0.0 if label == -100 else log_q[position, label].item()
        assert row["reference"][position] == pytest.approx(expected, abs=1e-5)
    subject.train()
    (log, *_) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    # At step 0 nothing has moved, so each response costs 2/beta log 2 (up to the precision of the kept numbers).
    assert log["penalty"] == pytest.approx(20 * math.log(2), abs=1e-3)


def test_an_adapter_on_the_head_is_refused(tmp_path):
    arguments = TASFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(UserError, match="output head"):
        TASFTTrainer(
            tiny_model(tied=False),
            arguments,
            ROWS,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["lm_head"]),
        )


def test_an_adapter_on_embeddings_that_are_the_head_too_is_refused(tmp_path):
    arguments = TASFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    lora = LoraConfig(r=2, target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="embedding"):
        TASFTTrainer(tiny_model(tied=True), arguments, ROWS, processing_class=tiny_tokenizer(), peft_config=lora)
    # Of two matrices only the input's is adapted: nothing reads it past the adapter.
    TASFTTrainer(tiny_model(tied=False), arguments, ROWS, processing_class=tiny_tokenizer(), peft_config=lora)


@pytest.mark.parametrize("penalty", ["emd_hinge", "nlcl", "emd"])
def test_a_head_that_is_trained_beside_an_adapter_gets_its_gradient(tmp_path, penalty):
    """peft's modules_to_save puts a copy of the head in its place."""
    arguments = TASFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, penalty=penalty, max_steps=2)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    subject = TASFTTrainer(
        tiny_model(tied=False).double(), arguments, ROWS, processing_class=tiny_tokenizer(), peft_config=lora
    )
    before = subject._head().weight.detach().clone()
    assert subject._head().weight.requires_grad
    subject.train()
    assert not torch.equal(subject._head().weight, before)


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"padding_free": True}], ids=str)
def test_what_saves_memory_changes_nothing_that_is_learned(tmp_path, settings):
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "penalty": "emd_hinge", "lora": True}
    plain, saving = (trainer(tmp_path, model=tiny_model().double(), **common, **more) for more in ({}, settings))
    for subject in (plain, saving):
        subject.train()
    for name, weight in plain.model.named_parameters():
        torch.testing.assert_close(saving.model.get_parameter(name), weight, atol=1e-9, rtol=0)


def test_bf16_trains_close_to_full_precision(tmp_path):
    common = {"max_steps": 4, "per_device_train_batch_size": 12, "penalty": "emd_hinge", "lora": True}
    logs = []
    for settings in ({}, {"bf16": True}):
        folder = tmp_path / str(bool(settings))
        trainer(folder, model=tiny_model(), **common, **settings).train()
        logs.append(metrics(folder))
    for plain, narrow in zip(*logs, strict=True):
        assert narrow["loss"] == pytest.approx(plain["loss"], rel=0.02)
        assert narrow["penalty"] == pytest.approx(plain["penalty"], abs=0.02)


def test_a_merged_model_gives_the_adapters_logits(tmp_path):
    subject = trainer(tmp_path, model=tiny_model().double(), lora=True, max_steps=3)
    subject.train()
    ids = torch.tensor([subject.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        adapted = subject.model.eval()(input_ids=ids).logits
        merged = subject.model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-12, rtol=0)
    assert not torch.allclose(adapted, tiny_model().double()(input_ids=ids).logits, atol=1e-3)


def test_an_unknown_penalty_and_bad_rows_are_named(tmp_path):
    with pytest.raises(UserError, match="emd_hinge"):
        trainer(tmp_path, penalty="emdd")
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, max_length=8)
    assert len(caught.value.faults) == len(ROWS)


def test_dictionaries_in_the_unpaired_preference_format_are_rows(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "label": True, "other": 1},
        {"prompt": "c", "completion": "d", "label": False},
    ]
    subject = trainer(tmp_path, rows)
    assert [row["avoid"] for row in subject.train_dataset] == [False, True]


def order(sampler, epochs=1):
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yield list(sampler)


def test_each_step_holds_its_avoid_rows_and_an_epoch_each_imitate_row_once():
    avoid = [False] * 25 + [True] * 7
    sampler = StratifiedSampler(avoid, [1] * 32, step_size=8, avoid_per_step=2, seed=0)
    (rows,) = order(sampler)
    assert len(rows) == len(sampler)
    steps = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    assert all(sum(avoid[row] for row in step) == 2 for step in steps)
    assert sorted(row for row in rows if not avoid[row]) == list(range(25))


def test_avoid_rows_are_used_up_before_one_comes_again_across_epochs():
    avoid = [False] * 12 + [True] * 5
    sampler = StratifiedSampler(avoid, [1] * 17, step_size=4, avoid_per_step=1, seed=0)
    drawn = [row for rows in order(sampler, 5) for row in rows if avoid[row]]
    assert all(sorted(drawn[start : start + 5]) == [12, 13, 14, 15, 16] for start in range(0, 20, 5))
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:15]


def test_the_order_is_a_function_of_seed_and_epoch():
    def build(seed):
        return list(order(StratifiedSampler([False] * 20 + [True] * 4, [1] * 24, 5, 1, seed), 3))

    assert build(1) == build(1) != build(2)
    assert build(1)[0] != build(1)[1]


def test_a_step_without_room_to_imitate_is_refused():
    with pytest.raises(UserError, match="nothing to imitate"):
        StratifiedSampler([False, True], [1, 1], step_size=2, avoid_per_step=2, seed=0)


def test_the_trainer_moves_the_sampler_to_the_next_epoch(tmp_path):
    subject = trainer(tmp_path, model=tiny_model(), num_train_epochs=2, per_device_train_batch_size=4)
    seen = []
    collator = subject.data_collator
    subject.data_collator = lambda rows: (seen.extend(len(row["input_ids"]) for row in rows), collator(rows))[1]
    subject.train()
    half = len(seen) // 2
    assert seen[:half] != seen[half:]


def test_reference_margin_never_exceeds_the_range_of_a_cost(tmp_path):
    subject = trainer(tmp_path, penalty="emd_hinge")
    values = [margin for row in subject.train_dataset for margin in row["margins"]]
    assert all(0 <= value <= 2 and math.isfinite(value) for value in values)
    assert any(values)


def test_a_head_that_is_trained_gets_a_copy_as_cost_space(tmp_path):
    subject = trainer(tmp_path)
    assert isinstance(subject._space(), CostSpace)
    assert subject._space().matrix.data_ptr() != subject.model.get_output_embeddings().weight.data_ptr()
    frozen = trainer(tmp_path, model=tiny_model(), lora=True)
    assert frozen._space().matrix.data_ptr() == frozen.model.get_output_embeddings().weight.data_ptr()


def test_imitate_rows_come_in_the_same_order_with_and_without_rows_to_avoid():
    """So that a run without a penalty is a control: it differs in nothing else."""
    lengths = [5, 3, 9, 1] * 5
    (both,) = order(StratifiedSampler([False] * 12 + [True] * 5, lengths, step_size=4, avoid_per_step=1, seed=0))
    (alone,) = order(StratifiedSampler([False] * 12, lengths, step_size=3, avoid_per_step=1, seed=0))
    assert [row for row in both if row < 12] == alone


def test_within_a_step_rows_stand_by_length():
    lengths = [7, 3, 9, 1, 8, 2, 6, 4]
    (rows,) = order(StratifiedSampler([False] * 6 + [True] * 2, lengths, step_size=4, avoid_per_step=1, seed=0))
    for step in (rows[:4], rows[4:]):
        assert [lengths[row] for row in step] == sorted(lengths[row] for row in step)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_evaluation_gives_means_over_all_rows_whatever_the_batches(tmp_path):
    seen = []
    for size in (1, 5, 12):
        subject = trainer(tmp_path, penalty="nlcl", penalty_weight=0.7, evaluate=ROWS, per_device_eval_batch_size=size)
        found = subject.evaluate()
        seen.append({key: found[f"eval_{key}"] for key in ("loss", "imitate_nll", "penalty", "emd", "entropy", "top1")})
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-6)
    first = seen[0]
    assert first["loss"] == pytest.approx(first["imitate_nll"] + 0.7 * first["penalty"], rel=1e-6)
    assert 0 < first["top1"] < 1


def test_the_divergence_from_step_0_is_zero_there_and_grows(tmp_path):
    subject = trainer(tmp_path, evaluate=ROWS, max_steps=8, kl_rows=4, per_device_train_batch_size=4)
    assert subject.evaluate()["eval_kl"] == 0
    subject.train()
    kl = [row["kl"] for row in metrics(tmp_path)]
    assert 0 < kl[0] < kl[-1]
    # Against the definition, by the model of step 0 itself.
    rows = [row for row in subject.eval_dataset if not row["avoid"]][:4]
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            now, before = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (subject.model, tiny_model().double()))
        counted = torch.tensor([*row["labels"][1:], -100]) != -100
        found.append((before.exp() * (before - now)).sum(1)[counted])
    assert subject.evaluate()["eval_kl"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)


def test_without_rows_to_evaluate_on_no_divergence_is_logged(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    assert "kl" not in metrics(tmp_path)[0]


def test_the_gradient_norm_of_each_term_is_that_of_its_gradient(tmp_path):
    settings = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    subject = trainer(tmp_path, log_term_gradients=True, penalty_weight=0.7, avoid_per_step=3, **settings)
    batches = [subject.train_dataset[:3], subject.train_dataset[3:9], subject.train_dataset[9:]]
    imitate, penalty = (
        gradients(trainer(tmp_path, penalty_weight=0.7, **settings), rows).norm().item()
        for rows in (batches[:2], batches[2:])
    )
    subject.train()
    (row, *_) = metrics(tmp_path)
    assert row["imitate_nll_grad_norm"] == pytest.approx(imitate, rel=1e-6)
    assert row["penalty_grad_norm"] == pytest.approx(penalty, rel=1e-6)


def test_tokens_of_each_kind_and_memory_are_logged(tmp_path):
    trainer(tmp_path, num_train_epochs=1, per_device_train_batch_size=12, avoid_per_step=3).train()
    (row,) = metrics(tmp_path)
    subject = trainer(tmp_path)
    assert row["imitate_tokens"] == subject.encoding.imitate_tokens
    assert row["avoid_tokens"] == subject.encoding.avoid_tokens
    assert row["peak_mib"] > 10


def test_what_is_only_watched_is_looked_at_in_logged_steps_alone(tmp_path, monkeypatch):
    looked = []
    original = trainer_module.avoid_statistics
    monkeypatch.setattr(trainer_module, "avoid_statistics", lambda *a, **k: looked.append(1) or original(*a, **k))
    trainer(tmp_path, max_steps=6, logging_steps=3, per_device_train_batch_size=4).train()
    assert len(looked) == 2
    assert all("entropy" in row for row in metrics(tmp_path))


class Endless:
    """A stream: no length, no index."""

    def __iter__(self):
        while True:
            yield from (vars(row) for row in ROWS)


def test_a_stream_is_encoded_as_it_comes(tmp_path):
    subject = trainer(tmp_path, rows=Endless(), max_steps=3, per_device_train_batch_size=6, penalty="emd_exact")
    subject.train()
    assert len(metrics(tmp_path)) == 3
    assert all({"imitate_nll", "penalty"} <= row.keys() for row in metrics(tmp_path)[1::2])


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_of_a_stream_that_the_model_cannot_read_ends_training_with_a_sentence(tmp_path, packed):
    longest = {"prompt": "Hi", "completion": "a" * 600, "label": True}
    stream = RowsWithoutLength([*(vars(row) for row in ROWS[:3]), longest])
    subject = trainer(tmp_path, rows=stream, max_steps=3, max_length=1024, padding_free=packed)
    with pytest.raises(UserError, match=r"1 of . rows have more than the 512 tokens that the model reads"):
        subject.train()


class RowsWithoutLength:
    """A stream that ends."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_gives_no_reference(tmp_path):
    with pytest.raises(UserError, match="step 0"):
        trainer(tmp_path, rows=Endless(), max_steps=3, penalty="emd_hinge")


def test_rows_that_are_cut_or_dropped_are_counted(tmp_path):
    subject = trainer(tmp_path, rows=[*ROWS, ROWS[0]], max_length=22, duplicates="drop")
    assert subject.encoding.dropped_duplicates == 1
    assert subject.encoding.truncated > 0
    assert subject.encoding.rows == len(subject.train_dataset) == len(ROWS)


OLD = """
from importlib import metadata

version = metadata.version
metadata.version = lambda name: "5.17.0" if name == "transformers" else version(name)
from tasft import TASFTTrainer
"""


def test_an_older_transformers_is_refused_at_import():
    """5.17 passes over `loss_is_scaled_for_ga`: gradients would be too small by the number of micro-batches."""
    run = subprocess.run([sys.executable, "-c", OLD], capture_output=True, text=True)
    assert run.returncode != 0
    assert "UserError: transformers 5.17.0 is too old for tasft: pip install 'transformers>=5.23'" in run.stderr
