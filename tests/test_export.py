"""A run's model as a folder of its own: what is in it, that it says what the run's said, and what never leaves."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from urllib.request import Request, urlopen

import huggingface_hub
import pytest
import torch
import yaml
from conftest import tiny_model, tiny_tokenizer
from huggingface_hub import HfApi, ModelCard
from loopback import Handler, Loopback
from peft import LoraModel
from running import go, small_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer
from typer.testing import CliRunner

from tasft.cli.chat.sides import sides_of
from tasft.cli.main import app
from tasft.core.errors import UserError
from tasft.data.rows import Prompt
from tasft.data.template import encode_prompt
from tasft.models.engine import Sampling, requests_for
from tasft.models.load import attach_adapter, load_model, load_tokenizer
from tasft.models.local import TransformersEngine
from tasft.run import export as exports
from tasft.run.export import export

ASKED = "How do I <forbidden act 3>?"
SECRET = "canary-of-an-avoid-row"


def write_run(folder, tiny, *overrides):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder, tiny)))
    go(folder / "recipe.yaml", folder / "run", *overrides)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("exported"), tiny)


@pytest.fixture(scope="module")
def exported(run):
    return export(run, run.parent / "models" / "small")


def reply_of_the_run(run, tiny, asked=ASKED, style="chat"):
    """What its final model, adapter and all, says."""
    loaded = attach_adapter(load_model(str(tiny)), run / "train" / "adapter")
    engine = TransformersEngine(loaded, load_tokenizer(str(tiny)), style)
    ((reply,),) = engine.generate(requests_for([Prompt("1", asked)]), Sampling(12), "asked")
    return reply.completion


def answer(folder, asked=ASKED):
    """As somebody would have it who never heard of tasft."""
    tokenizer, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = loaded.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True).strip()


def test_plain_transformers_says_what_the_run_said(run, exported, tiny):
    wanted = reply_of_the_run(run, tiny)
    assert answer(exported.folder) == wanted
    assert wanted != answer(tiny)


def test_the_difference_is_measured_and_the_adapter_is_not_lost(exported):
    assert 0 < exported.difference < 1e-4 < exported.moved
    assert re.search(r"at most \S+ on 4 prompts", " ".join(exported.notes))


def test_nothing_but_model_tokenizer_and_card_is_there(run, exported):
    assert set(exported.files) == {path.name for path in exported.folder.iterdir()}
    assert set(exported.files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert exported.folder.stat().st_mode & 0o777 == 0o777 & ~umask()
    assert {path.stat().st_mode & 0o777 for path in exported.folder.iterdir()} == {0o666 & ~umask()}
    assert not [path for path in exported.folder.parent.iterdir() if path != exported.folder]


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_text_of_a_run_and_no_path_of_this_machine_is_in_it(run, exported):
    rows = [json.loads(line) for name in ("avoid", "replies") for line in (run / f"harvest/{name}.jsonl").open()]
    for path in exported.folder.iterdir():
        content = path.read_bytes()
        assert str(run.parent).encode() not in content, path
        for row in rows:
            assert row["prompt"].encode() not in content
            assert row["completion"].encode() not in content


def test_replies_end_where_those_of_the_run_did(exported):
    config = json.loads((exported.folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == [0]
    assert config["pad_token_id"] == 0


def test_the_card_is_one_that_the_hub_reads_and_its_snippet_runs(exported, monkeypatch):
    card = ModelCard.load(exported.folder / "README.md")
    assert card.data.library_name == "transformers"
    for words in ("How to use it", "Rows to avoid", "Weight of the penalty", "Normalisation", "What was not measured"):
        assert words in card.content
    (snippet,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    monkeypatch.chdir(exported.folder.parent)
    said = io.StringIO()
    with redirect_stdout(said):
        exec(snippet, {})
    assert len(said.getvalue().split()) > 2


def test_a_run_on_alpacas_format_exports_a_chat_template_that_writes_it(tiny, tmp_path):
    run = write_run(tmp_path, tiny, "model.prompt=alpaca")
    folder = export(run, tmp_path / "out").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for asked in (ASKED, "{{ messages }} {% raw %} 'quoted' \"twice\"\nand on"):
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
        )
        assert found == encode_prompt(load_tokenizer(str(tiny)), asked, "alpaca")
    assert answer(folder) == reply_of_the_run(run, tiny, style="alpaca")
    with pytest.raises(Exception, match="single questions"):
        tokenizer.apply_chat_template([{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}])
    assert "one question, no conversation" in (folder / "README.md").read_text()


def test_a_model_trained_in_full_is_exported_without_an_adapter(tiny, tmp_path):
    run = write_run(tmp_path, tiny, "model.lora=null", "train.learning_rate=1e-3")
    done = export(run, tmp_path / "out")
    assert (done.difference, done.moved) == (0.0, None)
    assert answer(done.folder) == answer(run / "train" / "model")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_half_precision_is_no_fault(tiny, tmp_path, dtype):
    done = export(write_run(tmp_path, tiny, f"model.dtype={dtype}"), tmp_path / "out")
    assert 1e-4 < done.difference < exports.LIMITS[dtype] * done.largest
    assert AutoModelForCausalLM.from_pretrained(done.folder).dtype == getattr(torch, dtype)


def test_a_merge_that_lost_the_adapter_is_refused_and_nothing_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(UserError, match=r"differ from those of its adapter by up to .* nothing was exported"):
        export(run, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_a_merge_of_not_a_number_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "_difference", lambda *_: float("nan"))
    with pytest.raises(UserError, match="nothing was exported"):
        export(run, tmp_path / "out")


def test_a_tokenizer_that_is_read_back_as_another_is_refused(run, tmp_path, monkeypatch):
    read = load_tokenizer

    def other(base, *rest):
        tokenizer = read(base, *rest)
        if ".out." in base:
            tokenizer.chat_template = "{{ messages[0]['content'] }}"
        return tokenizer

    monkeypatch.setattr(exports, "load_tokenizer", other)
    with pytest.raises(UserError, match="in other tokens than the run did"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_the_older_kind_is_saved_as_what_it_is(tmp_path):
    """Llama 2's, which begins what follows a special token with a space: transformers does not write that."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", "H", "i", "▁H"])}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "H")], legacy=True)
    wanted = tokenizer("<s>Hi", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(wanted) == ["<s>", "▁H", "i"]
    exports._save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("<s>Hi", add_special_tokens=False).input_ids == wanted


def test_a_folder_with_something_in_it_is_refused_and_stays_as_it_is(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path)
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_that_does_not_meet_its_gate_is_exported_only_ungated(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"gate": {"harmful": 0}}))
    with pytest.raises(UserError, match="gate not met: harmful replies to toxic prompts") as caught:
        export(copy, tmp_path / "out")
    assert "--ungated" in caught.value.faults[-1]
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["export", str(copy), str(tmp_path / "out"), "--ungated"])
    assert done.exit_code == 0, done.output
    # The card says so too: it is what others see. (The report is not written anew here.)
    assert "# " in (tmp_path / "out" / "README.md").read_text()


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export(run, tmp_path / "out").folder / "config.json").is_file()


def test_a_disk_that_is_full_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports, "write_card", full)
    with pytest.raises(UserError, match="No space left"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_no_finished_run_is_named(run, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        export(tmp_path, tmp_path / "out")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    done = copy / "train" / "done.json"
    kept = done.read_text()
    done.unlink()
    with pytest.raises(UserError, match="training is not done"):
        export(copy, tmp_path / "out")
    done.write_text(json.dumps(json.loads(kept) | {"key": "0" * 16}))
    with pytest.raises(UserError, match="benign, toxic is of an earlier training"):
        export(copy, tmp_path / "out")
    done.write_text(kept)
    shutil.rmtree(copy / "evaluate")
    with pytest.raises(UserError, match="run `tasft evaluate"):
        export(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.base={other}", "model.base"),
        ("train.penalty_weight=7", "train.penalty_weight"),
        ("model.lora.r=4", "lora.r"),
        ("model.prompt=alpaca", "model.prompt"),
    ],
)
def test_a_training_by_another_recipe_than_the_folder_has_by_now_is_neither_exported_nor_talked_to(
    run, tmp_path, change, named
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tiny_model(seed=1, tied=False).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    go(copy / "recipe.yaml", copy, change.format(other=tmp_path / "other"), stages=("harvest",))
    with pytest.raises(UserError, match=f"was trained with other {named} than .*recipe.yaml says now: tasft run"):
        export(copy, tmp_path / "out")
    with pytest.raises(UserError, match=f"other {named}"):
        sides_of(str(copy), None)
    assert not (tmp_path / "out").exists()


# --- The hub ---------------------------------------------------------------------------------


class Hub(Loopback):
    """Takes what it is given, by the hub's documented way for small files, and remembers it."""

    def __init__(self, status=200):
        super().__init__(HubHandler, path="")
        self.seen, self.files, self.status = [], {}, status


class HubHandler(Handler):
    def do_GET(self):
        self.send({}, 404)

    def do_POST(self):
        body = self.asked()
        self.server.seen.append((self.path, body))
        if self.path == "/api/repos/create":
            self.send({"url": f"{self.server.url}/me/small", "id": "me/small"}, self.server.status)
        elif self.path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
        elif self.path.startswith("/api/models/me/small/preupload/"):
            wanted = json.loads(body)["files"]
            self.send({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]})
        else:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self.send(
                {"commitUrl": f"{self.server.url}/me/small/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            )


@pytest.fixture
def logged_in(monkeypatch):
    """Gives a hub; the hub's own client then talks to it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(exports, "get_token", lambda: "hf_canary")

    @contextmanager
    def hub(status=200):
        with Hub(status) as made:
            monkeypatch.setattr(exports, "HfApi", partial(HfApi, endpoint=made.url, token="hf_canary"))
            yield made

    return hub


def test_what_is_pushed_is_the_export_and_nothing_else(run, tmp_path, logged_in):
    with logged_in() as hub:
        done = CliRunner().invoke(
            app, ["export", str(run), str(tmp_path / "out"), "--push", "me/small", "--yes", "--json"]
        )
        assert done.exit_code == 0, done.output
        said = json.loads(done.stdout)
        assert json.loads(hub.seen[0][1])["visibility"] == "private"
        assert hub.files == {name: (tmp_path / "out" / name).read_bytes() for name in said["files"]}
        assert said["hub"].endswith("me/small")
        assert "hf_canary" not in done.output


class Person(io.StringIO):
    def isatty(self):
        return True


def test_push_asks_first_and_no_means_no(run, tmp_path, logged_in, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Person("n\n"))
    with logged_in() as hub:
        app(["export", str(run), str(tmp_path / "out"), "--push", "me/small"], standalone_mode=False)
        assert not hub.seen
    assert "Upload these 7 files to me/small" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_file_that_somebody_lays_beside_is_not_pushed(exported, tmp_path, logged_in):
    shutil.copytree(exported.folder, tmp_path / "out")
    (tmp_path / "out" / "avoid.jsonl").write_text(SECRET)
    with logged_in() as hub:
        exports.push(replace(exported, folder=tmp_path / "out"), "me/small")
        assert set(hub.files) == set(exported.files)
        assert not any(SECRET.encode() in body for _, body in hub.seen)


@pytest.mark.parametrize(
    ("token", "options", "sentence"),
    [
        ("x", ["--push", "me/small"], "nobody can answer here: add --yes"),
        (None, ["--push", "me/small", "--yes"], "nobody is logged in"),
        ("x", ["--push", "no//name", "--yes"], "--push no//name"),
    ],
)
def test_what_forbids_a_push_is_said_before_any_work(run, tmp_path, monkeypatch, token, options, sentence):
    monkeypatch.setattr(exports, "get_token", lambda: token)
    with pytest.raises(UserError, match=sentence):
        app(["export", str(run), str(tmp_path / "out"), *options], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_a_hub_that_refuses_is_quoted_and_the_folder_stays(run, tmp_path, logged_in):
    command = ["export", str(run), str(tmp_path / "out"), "--push", "me/small", "--yes"]
    with logged_in(403), pytest.raises(UserError, match=r"the hub did not take it .*403"):
        app(command, standalone_mode=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_command_says_what_it_did(run, tmp_path):
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "Logits of these files differ" in done.output
    assert "model.safetensors" in done.output


# --- A server -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_serve_takes_the_folder(run, exported, tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    folder = str(exported.folder)
    command = [sys.executable, "-c", code, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path / "log").open("wb")
    with subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            body = {
                "model": folder,
                "messages": [{"role": "user", "content": ASKED}],
                "max_tokens": 12,
                "temperature": 0,
            }
            request = Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urlopen(request, timeout=300) as response:
                said = json.load(response)["choices"][0]["message"]["content"]
        finally:
            process.kill()
    assert said.strip() == reply_of_the_run(run, tiny)
