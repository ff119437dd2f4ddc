"""The loss in trainers of TRL: step for step that of ours."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

import tasft
from tasft.core.errors import UserError
from tasft.loss import IGNORE_INDEX, unmark
from tasft.train.config import TASFTConfig
from tasft.train.trainer import TASFTTrainer

pytest.importorskip("trl", reason="TRL is not installed")
from datasets import Dataset
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

ROWS = [
    *({"prompt": f"What is <thing {n}>?", "completion": "It is there. " * (n + 1), "label": True} for n in range(9)),
    *({"prompt": f"How do I <act {n}>?", "completion": "You take it. " * (n + 1), "label": False} for n in range(3)),
]
STEPS = 3


class Avoiding(tasft.Avoiding):
    def __init__(self, *args, settings, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = tasft.losses_for(self.model, **settings)

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset  # Tokens of ours, to be compared.


class AvoidingSFT(Avoiding, SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        lay = self.data_collator
        self.data_collator = lambda rows: lay(rows) | {"avoid": torch.tensor([not row["label"] for row in rows])}


class AvoidingKTO(Avoiding, KTOTrainer):
    pass


def model_of(kind):
    if kind == "full":
        return tiny_model()
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), lora)


def shared(folder, micro):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": len(ROWS) // micro,
        "max_steps": STEPS,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }


def ours(folder, kind, settings):
    config = TASFTConfig(**shared(folder, 4), max_length=200, kl_rows=0, **settings)
    trainer = TASFTTrainer(model_of(kind), config, ROWS, processing_class=tiny_tokenizer())
    rows = trainer.train_dataset
    trainer.train()
    return trainer, rows


def theirs(folder, kind, settings, rows, cls=AvoidingSFT, micro=6):
    model = model_of(kind)
    if cls is AvoidingSFT:
        data = [{"input_ids": row["input_ids"], "labels": row["labels"], "label": not row["avoid"]} for row in rows]
        config = SFTConfig(**shared(folder, micro), remove_unused_columns=False, gradient_checkpointing=False)
    else:
        data = []
        for row in rows:
            begin = row["labels"].count(IGNORE_INDEX)
            ids = row["input_ids"]
            data.append({"prompt_ids": ids[:begin], "completion_ids": ids[begin:], "label": not row["avoid"]})
        config = KTOConfig(**shared(folder, micro), gradient_checkpointing=False, loss_type="apo_zero_unpaired")
    if kind == "full" and settings["penalty"] in ("emd_hinge", "npo", "npo_mean"):
        settings = settings | {"reference": copy.deepcopy(model)}
    # KTO would look for one on the hub.
    others = {"ref_model": copy.deepcopy(model)} if kind == "full" and cls is AvoidingKTO else {}
    trainer = cls(
        model,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
        settings=settings,
        **others,
    )
    trainer.train()
    return trainer


def same(one, other):
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert len(losses[0]) == STEPS
    trained = {name: weight for name, weight in one.model.named_parameters() if weight.requires_grad}
    there = dict(other.model.named_parameters())
    moved = dict(model_of("full" if len(there) == len(trained) else "adapter").named_parameters())
    assert max(float((weight.detach() - moved[name].detach()).abs().max()) for name, weight in trained.items()) > 1e-3
    for name, weight in trained.items():
        torch.testing.assert_close(weight, there[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("penalty", sorted(tasft.PENALTIES))
def test_a_subclass_of_trls_sft_trainer_trains_as_ours(tmp_path, penalty):
    settings = {"penalty": penalty, "penalty_weight": 0.5}
    trainer, rows = ours(tmp_path / "a", "adapter", settings)
    same(trainer, theirs(tmp_path / "b", "adapter", settings, rows))


@pytest.mark.parametrize(
    ("kind", "cls", "micro", "settings"),
    [
        ("full", AvoidingSFT, 3, {"penalty": "emd_hinge", "penalty_weight": 2.0, "center": True}),
        ("full", AvoidingSFT, 12, {"penalty": "npo", "beta": 0.3}),
        ("full", AvoidingKTO, 4, {"penalty": "emd", "cost_space": "input"}),
        ("adapter", AvoidingKTO, 12, {"penalty": "emd_hinge"}),
    ],
)
def test_so_do_all_weights_and_a_subclass_of_trls_kto_trainer(tmp_path, kind, cls, micro, settings):
    trainer, rows = ours(tmp_path / "a", kind, settings)
    same(trainer, theirs(tmp_path / "b", kind, settings, rows, cls, micro))


def batch(**changes):
    ids = torch.tensor([[7, 8, 9, 10, 11], [7, 8, 12, 13, 14]])
    labels = ids.clone()
    labels[:, :2] = IGNORE_INDEX
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return found | {"avoid": torch.tensor([False, True])} | changes


def test_terms_of_hidden_states_are_those_of_the_loss():
    model = tiny_model()
    losses = tasft.losses_for(model, "emd_hinge", reference=copy.deepcopy(model))
    loss = losses(model, batch())
    hidden = model(batch()["input_ids"], output_hidden_states=True).hidden_states[-1]
    terms = losses.terms(hidden, batch())
    parts = {name: float(term.total / term.count) for name, term in terms.items()}
    assert losses.parts == pytest.approx(parts, abs=1e-5)
    assert float(loss) == pytest.approx(sum(parts.values()), abs=1e-5)
    assert losses.counts([batch(), batch()]).tolist() == [6, 6]


def padded(rows):
    fill = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORE_INDEX}
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [fill[name]] * (longest - len(row[name])) for row in rows]) for name in rows[0]
    }


def packed(rows, size=2):
    """Rows laid end to end, as collators of others do that know nothing of marks."""
    pairs = [rows[at : at + size] for at in range(0, len(rows), size)]
    names = ("input_ids", "position_ids", "labels")
    return padded([{name: [each for row in pair for each in row[name]] for name in names} for pair in pairs])


def marked_rows():
    chance = torch.Generator().manual_seed(3)
    for length, begin, avoid in ((9, 3, True), (5, 2, True), (7, 4, False), (8, 1, True), (6, 2, False), (9, 8, True)):
        ids = torch.randint(4, 200, (length,), generator=chance).tolist()
        labels = [IGNORE_INDEX] * begin + ids[begin:]
        row = {"input_ids": ids, "attention_mask": [1] * length, "position_ids": list(range(length))}
        yield row | {"labels": labels}, row | {"labels": tasft.mark(labels) if avoid else labels}, avoid


@pytest.mark.parametrize("penalty", sorted(tasft.PENALTIES))
def test_marked_labels_padded_or_packed_are_rows_to_avoid(penalty):
    rows, marked, avoid = zip(*marked_rows(), strict=True)
    model = model_of("adapter")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    plain, reads = (tasft.losses_for(model, penalty, penalty_weight=0.7, marked=marks) for marks in (False, True))
    said = padded(rows) | {"avoid": torch.tensor(avoid)}
    loss = plain(model, said)
    assert plain.parts["penalty"] != 0
    for batch_ in (padded(marked), packed(marked)):
        assert reads.counts([batch_]).tolist() == plain.counts([said]).tolist()
        assert float(reads(model, batch_)) == pytest.approx(float(loss), abs=2e-5)
        assert reads.parts == pytest.approx(plain.parts, abs=2e-5)


def test_marks_are_read_as_they_were_written():
    labels = [IGNORE_INDEX, 0, 5, IGNORE_INDEX, 151_935]
    marked = tasft.mark(labels)
    assert max(marked[1], marked[2], marked[4]) < IGNORE_INDEX
    assert tasft.mark(marked) == marked
    read, avoided = unmark(torch.tensor([labels, marked]))
    assert read.tolist() == [labels, labels]
    assert avoided.tolist() == [[False] * 5, [label >= 0 for label in labels]]


def test_a_trainer_evaluates_by_the_same_loss(tmp_path):
    settings = {"penalty": "unlikelihood"}
    _, rows = ours(tmp_path / "a", "adapter", settings)
    trainer = theirs(tmp_path / "b", "adapter", settings, rows)
    trainer.model.eval()
    some = [{name: row[name] for name in ("input_ids", "labels")} | {"label": not row["avoid"]} for row in rows]
    found = trainer.evaluate(Dataset.from_list(some[:6]))["eval_loss"]
    assert found == pytest.approx(float(trainer.losses(trainer.model, trainer.data_collator(some[:6]))), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model: tasft.losses_for(model, "nclc"), "penalty is 'nclc'; use none"),
        (lambda model: tasft.losses_for(model, "none"), "none is plain fine-tuning"),
        (lambda model: tasft.losses_for(model, cost_space="outputs"), "use output or input"),
        (lambda model: tasft.losses_for(model, "emd_hinge"), "train an adapter, or give reference"),
        (lambda model: tasft.losses_for(model)(model, batch(avoid=torch.tensor([True]))), "padding_free to False"),
        (
            lambda model: tasft.losses_for(model)(model, {k: v for k, v in batch().items() if k != "avoid"}),
            "let the collator add avoid",
        ),
        (lambda model: tasft.losses_for(model)(model, batch(avoid=torch.tensor([True]))), "say marked=True"),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(tiny_model())


def test_a_penalty_that_is_given_rows_says_what_to_do():
    """In a process without the checks of shapes that tests have."""
    code = (
        "import torch, tasft\nfrom tasft.loss import Head\n"
        "ids = torch.ones(2, 3, dtype=torch.long)\n"
        "try: tasft.PENALTIES['unlikelihood'].fn(torch.ones(2, 3, 4), Head(torch.ones(5, 4)), ids)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "flatten both, hidden.flatten(0, 1) and shift(labels).flatten(), or use tasft.losses_for" in done.stdout
