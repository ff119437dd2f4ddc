"""What TRL's own tests hold of `SFTTrainer` and `KTOTrainer`, held of ours; docs/trl.md has the table."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, tiny_model, tiny_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tasft import TASFTConfig, TASFTTrainer
from tasft.core.errors import UserError
from tasft.loss import IGNORE_INDEX

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")

TEXT = [
    {"prompt": f"What is <thing {n}>?", "completion": "It is there. " * (1 + n % 3), "label": n % 4 > 0}
    for n in range(8)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
        "label": row["label"],
    }
    for row in TEXT
]
IMITATE = [row for row in CHATS if row["label"]]
TALK = {"messages": [*CHATS[1]["prompt"], *CHATS[1]["completion"]], "label": True}
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}
TOOL_CHAT = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CASES = {}


def case(suite, names, what, how="same"):
    """A check of ours for tests of TRL's. `how` it came out: `same`, `refused` with a sentence, or `otherwise`."""

    def add(function):
        CASES[function.__name__] = (suite, names, what, how, function)
        return function

    return add


def made(folder, rows=CHATS, model=None, tokenizer=None, evaluate=None, peft_config=None, **settings):
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1, "max_length": 200} | settings
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    config = TASFTConfig(output_dir=str(folder), **settings)
    tokenizer = tokenizer or tiny_tokenizer()
    return TASFTTrainer(model or tiny_model(), config, rows, evaluate, tokenizer, peft_config)


def trains(trainer):
    """Every weight that is trained moves, no other does, and losses are numbers."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name
    return trainer


def sft(folder, rows, model=None, tokenizer=None, **settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = {"max_length": 200, "bf16": False, "use_cpu": True, "disable_tqdm": True, "report_to": "none"} | settings
    config = SFTConfig(output_dir=str(folder), save_strategy="no", **settings)
    data = Dataset.from_list([{key: value for key, value in row.items() if key != "label"} for row in rows])
    return SFTTrainer(model or tiny_model(), config, train_dataset=data, processing_class=tokenizer or tiny_tokenizer())


def tokens(rows):
    return [row["input_ids"] for row in rows]


def learned(rows):
    """What is learned of each row, decoded, without what the template writes behind the end."""
    decode = tiny_tokenizer().decode
    return [decode([id for id in row["labels"] if id != IGNORE_INDEX]).rstrip("\n") for row in rows]


@case("both", "test_train, test_train_model", "every trained weight moves, losses are finite")
def every_weight_moves(folder):
    trains(made(folder))


@case(
    "both", "test_train_dataset_format[conversational_prompt_completion]", "the same tokens, and the same are learned"
)
def messages_give_trls_tokens(folder):
    ours, theirs = made(folder / "a", IMITATE).train_dataset, sft(folder / "b", IMITATE).train_dataset
    assert learned(ours) == learned(theirs)
    # Theirs have what the template writes behind the last end.
    assert all(other[: len(one)] == one for one, other in zip(tokens(ours), tokens(theirs), strict=True))


@case(
    "both",
    "test_train_dataset_format[standard_prompt_completion]",
    "text is the user's turn, in the chat template or Alpaca's form; TRL joins it to the completion",
    "otherwise",
)
def text_is_a_turn(folder):
    ours = made(folder, [row for row in TEXT if row["label"]]).train_dataset
    assert tokens(ours) == tokens(made(folder, IMITATE).train_dataset)


@case(
    "SFT",
    "test_train_dataset_format[conversational_language_modeling], test_train_with_non_chatml_conversational_data",
    "conversations whole, in messages and in ShareGPT's form; the last assistant turn is learned, or all",
)
def conversations(folder):
    other = {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello there."}]}
    trains(made(folder, [TALK, other | {"label": True}]))


@case("SFT", "test_train_dataset_format[standard_language_modeling]", "plain text without a reply", "refused")
def plain_text(folder):
    with pytest.raises(UserError, match="prompt"):
        made(folder, [{"text": "It is there.", "label": True}])


@case("SFT", "test_train_assistant_only", "only what the assistant says is learned")
def only_the_assistant(folder):
    talk = {
        "messages": [*TALK["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    }
    (text,) = learned(made(folder, [talk | {"label": True}], turns="all").train_dataset)
    assert "And?" not in text
    assert "No." in text
    assert "It is there." in text


@case(
    "SFT",
    "test_train_nll_loss, test_forward_matches_reference, test_backward_matches_reference",
    "loss and weights are TRL's",
)
def the_loss_is_trls(folder):
    ours = made(
        folder / "a", IMITATE, penalty="none", optim="sgd", per_device_train_batch_size=6, max_steps=3, kl_rows=0
    )
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ours.train_dataset]
    shared = {"optim": "sgd", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3}
    theirs = sft(folder / "b", rows, learning_rate=0.1, logging_steps=1, **shared)
    for trainer in (ours, theirs):
        trainer.train()
    logs = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (ours, theirs)]
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)
    for name, weight in ours.model.named_parameters():
        torch.testing.assert_close(weight, theirs.model.get_parameter(name), atol=1e-5, rtol=1e-4)


@case(
    "SFT",
    "test_train_with_pretokenized_data, test_dataset_preparation_respects_existing_labels",
    "rows of tokens with labels",
)
def tokenized_rows(folder):
    rows = made(folder / "a").train_dataset
    assert trains(made(folder / "b", rows)).train_dataset == rows


@case("SFT", "test_dataset_truncated_to_max_length", "rows are cut at max_length, and counted")
def rows_are_cut(folder):
    trainer = made(folder, CHATS, max_length=45)
    assert max(map(len, tokens(trainer.train_dataset))) <= 45
    assert trainer.encoding.truncated > 0


@case(
    "both",
    "test_fully_masked_examples_dropped_after_truncation, test_fully_truncated_completion_examples_dropped",
    "a row of which only the prompt is left; TRL leaves it out",
    "refused",
)
def rows_without_a_reply(folder):
    long = CHATS[1] | {"prompt": [{"role": "user", "content": "x" * 300}]}
    with pytest.raises(UserError, match="row 8: no token to learn within max_length 200"):
        made(folder, [*CHATS, long])


@case("SFT", "test_train_padding_free", "rows laid end to end train as padded ones")
def padding_free(folder):
    losses = []
    for free in (False, True):
        trainer = made(folder / str(free), padding_free=free, optim="sgd", learning_rate=1e-2)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@case(
    "SFT",
    "test_train_packing, test_eval_packing",
    "packing into rows of max_length, which Python refuses: padding_free does without",
    "refused",
)
def packing(folder):
    with pytest.raises(TypeError, match="packing"):
        made(folder, packing=True)


@case("both", "test_train_with_iterable_dataset", "a stream")
def a_stream(folder):
    from datasets import Dataset

    trains(made(folder, Dataset.from_list(CHATS).to_iterable_dataset()))


@case(
    "KTO",
    "test_precompute_ref_log_probs_raises_for_iterable_dataset",
    "a stream that a penalty would look at before",
    "refused",
)
def a_stream_and_a_reference(folder):
    from datasets import Dataset

    with pytest.raises(UserError, match="a data set with a length"):
        made(folder, Dataset.from_list(CHATS).to_iterable_dataset(), penalty="npo")


@case("both", "test_train_toolcall_data", "tools, as a list")
def tools(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_CHAT
    trainer = made(folder, [row | {"tools": [TOOL]} for row in CHATS], tokenizer=tokenizer)
    assert "look" in tokenizer.decode(trains(trainer).train_dataset[0]["input_ids"])


@case("SFT", "test_train_toolcall_data_as_json", "tools, as a text of JSON")
def tools_as_json(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_CHAT
    trainer = made(folder, [row | {"tools": json.dumps([TOOL])} for row in CHATS], tokenizer=tokenizer)
    assert "look" in tokenizer.decode(trainer.train_dataset[0]["input_ids"])


@case(
    "both",
    "test_train_with_chat_template_kwargs",
    "settings of the template, for all rows; TRL takes them of each row",
    "otherwise",
)
def template_settings(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "m['content'].upper() if loud else m['content']"
    )
    trainer = made(folder, tokenizer=tokenizer, chat_template_kwargs={"loud": True})
    assert "WHAT IS" in tokenizer.decode(trainer.train_dataset[0]["input_ids"])


@case(
    "both", "test_train_with_eval, test_train_with_multiple_eval_dataset", "one set to evaluate on, or several by name"
)
def evaluation(folder):
    trainer = trains(made(folder, evaluate={"a": CHATS[:4], "b": CHATS[4:]}, eval_strategy="steps", eval_steps=1))
    logged = {key for log in trainer.state.log_history for key in log}
    assert {"eval_a_loss", "eval_b_loss"} <= logged


@case("both", "test_evaluate_with_eval_dataset", "other rows to evaluate on, given later")
def other_rows(folder):
    assert math.isfinite(made(folder).evaluate(CHATS[:3])["eval_loss"])


@case(
    "KTO",
    "test_evaluate_precompute_ref_log_probs_after_training_raises",
    "rows given after training that a penalty would have to have seen before",
    "refused",
)
def rows_after_training(folder):
    trainer = made(folder, penalty="npo")
    trainer.train()
    with pytest.raises(UserError, match="give these rows to the trainer as its eval_dataset"):
        trainer.evaluate(CHATS[:3])


@case("SFT", "test_train_with_metric_for_best_model", "the best checkpoint by a metric")
def best_checkpoint(folder):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    config = TASFTConfig(
        str(folder), max_steps=2, metric_for_best_model="eval_imitate_nll", report_to="none", use_cpu=True, **settings
    )
    trainer = TASFTTrainer(tiny_model(), config, CHATS, CHATS[:3], tiny_tokenizer())
    trainer.train()
    assert trainer.state.best_model_checkpoint


@case(
    "both",
    "test_train_with_compute_metrics, test_compute_metrics",
    "metrics of predictions, which are not made",
    "refused",
)
def metrics(folder):
    with pytest.raises(UserError, match="compute_metrics has no effect here"):
        TASFTTrainer(
            tiny_model(), TASFTConfig(str(folder), report_to="none"), CHATS, None, tiny_tokenizer(), compute_metrics=len
        )


@case("both", "test_train_with_gradient_checkpointing[_reentrant]", "activations computed again, either way")
def gradient_checkpointing(folder):
    for reentrant in (False, True):
        given = {"use_reentrant": reentrant}
        trains(made(folder / str(reentrant), gradient_checkpointing=True, gradient_checkpointing_kwargs=given))


@case(
    "both",
    "test_train_dense_with_peft_config_lora, test_train_nll_loss_peft",
    "an adapter by peft_config: the base stays",
)
def peft_config(folder):
    trains(made(folder, peft_config=LoraConfig(**LORA)))


@case(
    "both",
    "test_train_peft_model, test_train_without_providing_ref_model_with_lora",
    "a model with an adapter; its start is the reference",
)
def peft_model(folder):
    trains(made(folder, model=get_peft_model(tiny_model(), LoraConfig(**LORA)), penalty="npo"))


@case("both", "test_train_with_peft_config_and_gradient_checkpointing", "both together")
def peft_and_checkpointing(folder):
    trains(made(folder, peft_config=LoraConfig(**LORA), gradient_checkpointing=True))


@case("both", "test_liger_kernel_with_peft_lm_head_raises", "an adapter on the output head, as in TRL", "refused")
def adapter_on_the_head(folder):
    with pytest.raises(UserError, match="the adapter is on the output head"):
        made(folder, model=tiny_model(tied=False), peft_config=LoraConfig(**LORA | {"target_modules": ["lm_head"]}))


@case(
    "SFT",
    "test_prompt_tuning, test_train_with_peft_config_prompt_tuning",
    "virtual tokens before the prompt",
    "refused",
)
def prompt_tuning(folder):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UserError, match="its head does not make one logit for each token"):
        made(folder, model=get_peft_model(tiny_model(), config))


@case("both", "test_train_model_dtype", "a model in bfloat16 stays in it")
def bfloat16(folder):
    trainer = made(folder, model=tiny_model().to(torch.bfloat16), learning_rate=1.0)
    trainer.train()
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.bfloat16}


@case("both", "test_train_dataset_required", "no rows: said when training begins", "otherwise")
def no_rows(folder):
    with pytest.raises(ValueError, match="train_dataset"):
        made(folder, None).train()


@case(
    "KTO",
    "test_train[standard_preference], test_train[conversational_implicit_prompt_preference]",
    "pairs of chosen and rejected; TRL's `unpair_preference_dataset` makes rows of them",
    "refused",
)
def pairs(folder):
    rows = [{"prompt": row["prompt"], "chosen": "It is there.", "rejected": "You take it."} for row in TEXT]
    with pytest.raises(UserError, match="the row has 'prompt', 'chosen', 'rejected'"):
        made(folder / "a", rows)
    from datasets import Dataset
    from trl.data_utils import unpair_preference_dataset

    trainer = made(folder / "b", unpair_preference_dataset(Dataset.from_list(rows)))
    assert [row["avoid"] for row in trainer.train_dataset].count(True) == len(rows)


@case(
    "KTO",
    "test_tokenize_and_process_tokens, test_padding_and_masks",
    "prompt and reply are told apart in a padded batch",
)
def batches(folder):
    trainer = made(folder)
    batch = trainer.data_collator(trainer.train_dataset[:3])
    for row, ids, there, labels in zip(
        trainer.train_dataset, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=False
    ):
        length = int(there.sum())
        assert ids[:length].tolist() == row["input_ids"]
        assert labels[:length].tolist() == row["labels"]
        assert set(labels[length:].tolist()) <= {IGNORE_INDEX}


@case("both", "test_all_ignored_returns_zero", "a batch of which nothing counts has loss 0 and a gradient")
def nothing_counts(folder):
    trainer = made(folder)
    row = trainer.train_dataset[0] | {"labels": [IGNORE_INDEX] * len(trainer.train_dataset[0]["labels"])}
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
    loss.backward()
    assert float(loss) == 0


@case("SFT", "test_init_with_training_arguments", "transformers' own TrainingArguments", "refused")
def training_arguments(folder):
    from transformers import TrainingArguments

    with pytest.raises(UserError, match="TASFTConfig"):
        TASFTTrainer(tiny_model(), TrainingArguments(str(folder), report_to="none"), CHATS, None, tiny_tokenizer())


UNTRIED = {
    "images (`test_train_vlm*`), mixtures of experts (`test_train_moe*`, `*_gpt_oss`)": "none was trained here",
    "`test_peft_with_quantization`, `*_qlora`, `*_device_map`, `test_train_offloading`": "they need a GPU",
    "`test_train_with_liger*`": "the kernels need a GPU",
    "`test_train_dft_loss`, `test_train_with_formatting_func`, `test_tag_added`": "ours has no such thing",
    "`test_train_with_sync_ref_model`, `test_train_with_ref_model_is_model_raises`": "ours keeps no reference model",
}


@pytest.mark.parametrize("name", CASES)
def test_what_trl_holds_of_its_trainers_is_held_of_ours(name, tmp_path):
    CASES[name][-1](tmp_path)


def table():
    lines = ["| of | TRL's tests | what | ours |", "|---|---|---|---|"]
    lines += [
        f"| {suite} | `{names.replace(', ', '`, `')}` | {what} | {how} |"
        for suite, names, what, how, _ in CASES.values()
    ]
    return "\n".join([*lines, "", "Not tried:", "", *(f"- {what}: {why}" for what, why in UNTRIED.items())])


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs" / "trl.md").read_text()
