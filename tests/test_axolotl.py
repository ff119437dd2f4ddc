"""The plug-in, in axolotl's own classes where it is installed, else in stand-ins with their published interface.

The stand-ins follow axolotl 0.19.0: `integrations/base.py`, `prompt_strategies/chat_template.py` and
`core/trainers/base.py`, and what `core/builders/causal.py` and `train.py` do with them.
"""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from conftest import tiny_tokenizer
from test_losses_for import ROWS, STEPS, model_of, ours, packed, same, shared

from tasft.core.errors import UserError
from tasft.loss import IGNORE_INDEX, mark

pytest.importorskip("datasets")
from datasets import Dataset
from transformers import Trainer, TrainingArguments

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "axolotl-llama-factory.md"
(CONFIG,) = re.findall(r"```yaml title=axolotl.yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)


class ChatTemplateStrategy:
    def __init__(self, prompter, tokenizer, **params):
        self.tokenizer = tokenizer

    def tokenize_prompt(self, prompt):
        return self._tokenize_single_prompt(prompt)

    def _tokenize_single_prompt(self, prompt):
        asked, answer = (self.tokenizer(each["content"]).input_ids for each in prompt["messages"])
        ids = asked + answer
        return {
            "input_ids": ids,
            "labels": [IGNORE_INDEX] * len(asked) + answer,
            "attention_mask": [1] * len(ids),
        }


class StrategyLoader:
    def _get_strategy_cls(self, cfg):
        return type("MistralStrategy", (), {}) if cfg.tokenizer_use_mistral_common else ChatTemplateStrategy

    def __call__(self, tokenizer, cfg, ds_cfg=None, processor=None):
        return self._get_strategy_cls(cfg)(None, tokenizer=tokenizer)


STAND_INS = {
    "axolotl.integrations.base": {"BasePlugin": type("BasePlugin", (), {})},
    "axolotl.prompt_strategies.chat_template": {
        "ChatTemplateStrategy": ChatTemplateStrategy,
        "StrategyLoader": StrategyLoader,
    },
    "axolotl.core.training_args": {"AxolotlTrainingArguments": TrainingArguments},
    "axolotl.core.trainers.base": {"AxolotlTrainer": type("AxolotlTrainer", (Trainer,), {})},
}


@pytest.fixture
def plugin(monkeypatch):
    """The module, as axolotl imports it."""
    if find_spec("axolotl") is None:
        for name, values in STAND_INS.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                whole = ".".join(parts[:end])
                if whole not in sys.modules:
                    monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
            vars(sys.modules[name]).update(values)
    yield importlib.import_module("tasft.integrations.axolotl")
    del sys.modules["tasft.integrations.axolotl"]


class Config(SimpleNamespace):
    """A configuration of axolotl has None for what it does not say."""

    def __getattr__(self, name):
        return None

    def get(self, name, default=None):
        return vars(self).get(name, default)


def configured(plugin, text=CONFIG):
    """As axolotl does: the plug-in's fields are bases of its own model of a configuration."""
    said = yaml.safe_load(text)
    module, _, name = plugin.Plugin().get_input_args().rpartition(".")
    fields = getattr(importlib.import_module(module), name)
    return Config(**said | fields.model_validate({"tasft": said["tasft"]}).model_dump(exclude_none=True))


def trainer_of(plugin, folder, data, config, collator=None):
    made = plugin.Plugin()
    arguments = importlib.import_module("axolotl.core.training_args").AxolotlTrainingArguments
    trainer = made.get_trainer_cls(config)(
        model=model_of("adapter"),
        args=arguments(**shared(folder, 6), remove_unused_columns=False),
        train_dataset=Dataset.from_list(data),
        data_collator=collator,
    )
    made.post_trainer_create(config, trainer)
    return trainer


def test_packed_rows_are_trained_as_ours(plugin, tmp_path):
    settings = {"penalty": "emd_hinge", "penalty_weight": 2.0}
    trainer, rows = ours(tmp_path / "a", "adapter", settings)
    data = [
        {
            "input_ids": row["input_ids"],
            "position_ids": list(range(len(row["input_ids"]))),
            "labels": mark(row["labels"]) if row["avoid"] else row["labels"],
        }
        for row in rows
    ]
    assert len(data) == len(ROWS)
    other = trainer_of(plugin, tmp_path / "b", data, configured(plugin), packed)
    other.train()
    assert other.state.global_step == STEPS
    same(trainer, other)


def test_rows_of_its_type_are_those_of_the_chat_template_marked(plugin):
    source = importlib.import_module("axolotl.prompt_strategies.chat_template")
    config = Config(sequence_len=64, train_on_inputs=False, chat_template="tokenizer_default")
    row = {"messages": [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "this"}]}
    plain, avoid = (
        load(tiny_tokenizer(), config, {"path": "x"}).tokenize_prompt(row)
        for load in (source.StrategyLoader(), plugin.load)
    )
    assert avoid["input_ids"] == plain["input_ids"]
    assert avoid["labels"] == mark(plain["labels"])
    assert min(avoid["labels"]) < IGNORE_INDEX == max(avoid["labels"])


def test_what_cannot_work_is_said_before_the_first_step(plugin, tmp_path):
    row = {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]}
    with pytest.raises(UserError, match=r"no row is to be avoided.*type: tasft\.integrations\.axolotl"):
        trainer_of(plugin, tmp_path, [row], configured(plugin))
    with pytest.raises(UserError, match="penalty is 'emd_hing'"):
        trainer_of(plugin, tmp_path, [row | {"labels": mark([6, 7, 8])}], Config(tasft={"penalty": "emd_hing"}))
    with pytest.raises(ValueError, match="penalti"):
        configured(plugin, "tasft: {penalti: emd}")
    with pytest.raises(UserError, match="tokenizer_use_mistral_common"):
        plugin.load(tiny_tokenizer(), Config(tokenizer_use_mistral_common=True, sequence_len=64), {})
