"""Adapters that other trainers saved: evaluated, compared and exported as ours are."""

import json
import shutil

import pytest
import torch
from conftest import rows, tasft_here, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasft.core.errors import UserError
from tasft.models.load import attach_adapter, base_of, load_model
from tasft.run.export import export_adapter

ELSEWHERE = "/home/somebody/models/llama"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What the trainers' own defaults give, as their documentation and source have it.
KINDS = {
    "unsloth": {"target_modules": LINEAR, "lora_alpha": 4},
    "axolotl": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "llama-factory": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
}


def trained(tiny, folder, base=ELSEWHERE, added=(), **settings):
    """A folder as a trainer leaves it, and the model as it was when it was saved."""
    torch.manual_seed(1)
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny)
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": [*added]}, replace_extra_special_tokens=False)
        model.resize_token_embeddings(len(tokenizer))
        # As axolotl's ChatML: the template writes what was added.
        tokenizer.chat_template = tokenizer.chat_template.replace("{% for m", added[0] + "{% for m", 1)
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, task_type="CAUSAL_LM", **settings))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight) if "lora" in name else 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    # Fields of an earlier or later PEFT, too.
    config |= {"base_model_name_or_path": str(base), "of_another_version": None, "auto_mapping": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (folder / "training_args.bin").write_bytes(b"")
    return model.eval()


def logits(model):
    return model(input_ids=torch.tensor([[1, 40, 41, 42, 2, 50]])).logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_said_and_what_is_exported_says_it_too(tiny, tmp_path, kind):
    wanted = logits(trained(tiny, tmp_path / "adapter", **KINDS[kind]))
    assert float((logits(AutoModelForCausalLM.from_pretrained(tiny)) - wanted).abs().max()) > 0.1
    torch.testing.assert_close(logits(attach_adapter(load_model(str(tiny)), tmp_path / "adapter")), wanted)
    done = export_adapter(tmp_path / "adapter", tmp_path / "merged", str(tiny))
    assert done.difference < 1e-3
    assert done.moved > 0.1
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=1e-3, rtol=1e-3
    )
    assert str(tmp_path) not in (tmp_path / "merged" / "README.md").read_text()


def test_tokens_that_a_trainer_added_are_there(tiny, tmp_path):
    modules = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = trained(tiny, tmp_path / "adapter", added=["<|tool|>", "<|think|>"], **modules)
    found = attach_adapter(load_model(str(tiny)), tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(model))
    export_adapter(tmp_path / "adapter", tmp_path / "merged", str(tiny))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer("<|think|>").input_ids) == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_commands_evaluate_compare_and_export_it(tiny, tmp_path):
    trained(tiny, tmp_path / "adapter", **KINDS["llama-factory"])
    asked = ("--sets", "try-toxic", "--judge", "refusal_matching", "--max-new-tokens", "6")
    for name, words in {"one": ("adapter", "--base", tiny), "other": (tiny,)}.items():
        done = tasft_here("evaluate", *words, "--out", name, *asked, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    said = [
        [row["completion"] for row in rows(tmp_path / name / "try-toxic" / "replies.jsonl")]
        for name in ("one", "other")
    ]
    assert said[0] != said[1]
    done = tasft_here("compare", "other", "one", "--out", "page", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = tasft_here("export", "adapter", "merged", "--base", tiny, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = tasft_here("evaluate", "merged", "--out", "third", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_model_that_it_names_and_that_is_here_is_taken(tiny, tmp_path):
    trained(tiny, tmp_path / "adapter", base=tiny, **KINDS["unsloth"])
    assert base_of(tmp_path / "adapter") == str(tiny)
    assert isinstance(attach_adapter(load_model(str(tiny)), tmp_path / "adapter"), PeftModel)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("evaluate", "adapter", "--sets", "try-toxic"),
            f"its model is {ELSEWHERE}, which is not here: name the model by --base",
        ),
        (("export", "adapter", "merged"), f"its model is {ELSEWHERE}, which is not here: name the model by --base"),
        (("evaluate", "{tiny}", "--base", "{tiny}", "--sets", "try-toxic"), "is no adapter: leave it out"),
        (("export", "run", "merged", "--base", "{tiny}"), "--base and --prompt are for an adapter alone"),
        (("export", "adapter", "adapter", "--base", "{tiny}"), "adapter is there and not empty"),
        (
            ("evaluate", "pickled", "--base", "{tiny}", "--sets", "try-toxic"),
            "adapter_model.bin is a pickle, which may run code",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(tiny, tmp_path, words, sentence):
    trained(tiny, tmp_path / "adapter", **KINDS["unsloth"])
    shutil.copytree(tmp_path / "adapter", tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    before = sorted(path for path in tmp_path.rglob("*") if "runs" not in path.parts)
    done = tasft_here(*(str(word).format(tiny=tiny) for word in words), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if "runs" not in path.parts) == before


def test_an_adapter_that_cannot_be_merged_is_said_to_be_one(tiny, tmp_path):
    trained(tiny, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match="cannot be merged"):
        export_adapter(tmp_path / "adapter", tmp_path / "merged", str(tiny))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_for_another_model_is_refused(tiny, tmp_path):
    from conftest import tiny_model

    tiny_model().save_pretrained(tmp_path / "other")
    trained(tiny, tmp_path / "adapter", **KINDS["axolotl"])
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"hidden_size": 64, "head_dim": 8}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        export_adapter(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "other"))


def test_an_adapter_of_a_run_is_exported_with_its_run(tiny, tmp_path):
    trained(tiny, tmp_path / "run" / "train" / "adapter", target_modules=["q_proj"])
    for name in ("recipe.yaml", "manifest.json"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(UserError, match=r"is of the run .*: export the run"):
        export_adapter(tmp_path / "run" / "train" / "adapter", tmp_path / "merged", str(tiny))
    assert not (tmp_path / "merged").exists()
