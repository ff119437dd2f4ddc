"""What a recipe, a model, a file of rows or a server must not be able to do, and what is kept from other eyes."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, tiny_model, tiny_tokenizer
from loopback import Handler, Loopback, completion
from running import go, small_recipe
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from tasft.cli.main import main
from tasft.core import provenance, redact
from tasft.core.errors import UserError
from tasft.data.rows import read_prompts
from tasft.evaluate.quality import annotator_config
from tasft.judges import JudgeSettings, load_judge
from tasft.models.load import add_lora, attach_adapter, load_model
from tasft.run import launch, recipe_file, sweep
from tasft.run.checks import check_inputs
from tasft.run.inputs import Inputs

KEY = "planted-7c1e4f0b9a52d386"
TOKEN = "hf_plantedA1b2C3d4E5f6G7h8"
PASSWORD = "planted-password"


# Code in data: pickles, models with code of their own, YAML tags, archives.


def test_no_module_reads_pickles_unpacks_archives_or_evaluates_text():
    modules = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile"}
    calls = {
        *("eval", "exec", "os.system", "os.popen", "shutil.unpack_archive", "tempfile.mktemp"),
        *("torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "np.load", "numpy.load"),
    }
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(name.name for name in node.names)]
                assert not modules & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{path}:{node.lineno}"
                assert getattr(node.func, "attr", "") not in ("extract", "extractall"), f"{path}:{node.lineno}"
                shell = [word.arg for word in node.keywords if word.arg == "shell"]
                assert not shell, f"{path}:{node.lineno}"


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def set_trap(path, canary):
    """A pickle that makes the canary when somebody reads it without care."""
    torch.save({"weight": Trap(canary)}, path)
    torch.load(path, weights_only=False)
    assert canary.exists()
    canary.unlink()


def test_pickled_weights_in_a_folder_are_refused_and_not_read(tmp_path, tiny):
    canary = tmp_path / "canary"
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny, pickled)
    (pickled / "model.safetensors").unlink()
    set_trap(pickled / "pytorch_model.bin", canary)
    with pytest.raises(UserError, match="is a pickle"):
        load_model(str(pickled))

    adapter = tmp_path / "adapter"
    adapted = add_lora(tiny_model(), r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"])
    adapted.save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    set_trap(adapter / "adapter_model.bin", canary)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file"):
        attach_adapter(tiny_model(), adapter)

    judge = tmp_path / "judge"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = DebertaV2Config(vocab_size=len(tiny_tokenizer()), num_labels=1, **sizes)
    DebertaV2ForSequenceClassification(config).save_pretrained(judge)
    tiny_tokenizer().save_pretrained(judge)
    (judge / "model.safetensors").unlink()
    set_trap(judge / "pytorch_model.bin", canary)
    with pytest.raises(UserError, match=r"pickle|does not load"):
        load_judge("j", {"j": JudgeSettings(kind="stl_deberta", model=str(judge))}).judge([])
    assert not canary.exists()


def test_a_resumed_training_runs_nothing_that_its_checkpoint_holds(small, tmp_path):
    run, canary = tmp_path / "run", tmp_path / "canary"
    go(small, run, stages=("harvest", "train"))
    (checkpoint,) = (run / "train").glob("checkpoint-*")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        assert (checkpoint / name).is_file()
        kept = (checkpoint / name).read_bytes()
        set_trap(checkpoint / name, canary)
        (run / "train" / "done.json").unlink(missing_ok=True)
        with suppress(Exception):  # What becomes of such a run is not said here.
            go(small, run, stages=("train",))
        assert not canary.exists(), name
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(kept)


def with_code(tiny, folder, canary, *, tokenizer):
    """A model folder whose configuration, or whose tokenizer, names a module beside it."""
    shutil.copytree(tiny, folder)
    (folder / "own.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'unheard'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokens(PreTrainedTokenizerFast):\n    pass\n"
    )
    name = "tokenizer_config.json" if tokenizer else "config.json"
    told = json.loads((folder / name).read_text())
    if tokenizer:
        told |= {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "own.Tokens"]}}
    else:
        auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        told |= {"model_type": "unheard", "auto_map": auto}
    (folder / name).write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("tokenizer", [False, True])
def test_code_that_comes_with_a_model_runs_only_where_its_field_says_so(tmp_path, tiny, small, monkeypatch, tokenizer):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to trust it"))
    canary = tmp_path / "canary"
    folder = str(with_code(tiny, tmp_path / "model", canary, tokenizer=tokenizer))
    spec = recipe_file.load(str(small), [f"model.base={folder}"])
    with suppress(UserError):  # A tokenizer can be read without the code.
        check_inputs(Inputs(spec))
        load_model(folder)
    for kind in ("llm_judge", "stl_deberta", "harmbench"):
        with suppress(UserError):
            load_judge("j", {"j": JudgeSettings(kind=kind, model=folder)}).judge([])
    assert not canary.exists()
    if not tokenizer:
        with pytest.raises(UserError, match="code of its own"):
            load_model(folder)

    trusted = recipe_file.load(str(small), [f"model.base={folder}", "model.trust_remote_code=true"])
    check_inputs(Inputs(trusted))
    assert canary.exists()
    if not tokenizer:
        assert type(load_model(folder, trust_remote_code=True)).__name__ == "Model"


def test_no_other_code_is_trusted_by_a_setting(tmp_path):
    with pytest.raises(UserError, match="trust_remote_code"):
        annotator_config("alpaca_eval_vllm_llama3_70b_fn", None)
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("trust_remote_code") != "True", f"{path}:{node.lineno}"
                # Without a word transformers asks whoever sits there.
                if ast.unparse(node.func).startswith("Auto") and node.func.attr == "from_pretrained":
                    assert "trust_remote_code" in given, f"{path}:{node.lineno}"


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir ['{}']", "object/new:os.mkdir ['{}']", "name:os.mkdir"])
def test_a_tag_in_yaml_runs_nothing(tmp_path, small, tag):
    planted = f"!!python/{tag.format(tmp_path / 'canary')}"
    varied = tmp_path / "sweep.yaml"
    varied.write_text(f"name: s\nbase: recipe.yaml\ngrid: {{seed: [{planted}]}}\n")
    with pytest.raises(UserError, match="not YAML"):
        sweep.load(str(varied))
    with pytest.raises(UserError, match="not YAML"):
        recipe_file.load(str(small), [f"name={planted}"])
    small.write_text(f"name: {planted}\n")
    with pytest.raises(UserError, match="not YAML"):
        recipe_file.load(str(small))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["rows.zip", "rows.jsonl.zip", "rows.json", "rows.csv"])
def test_an_archive_is_no_file_of_rows_and_is_not_unpacked(tmp_path, name):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("../escaped.jsonl", '{"prompt": "What is <thing 1>?"}\n')
        archive.writestr("rows.jsonl", '{"prompt": "What is <thing 1>?"}\n')
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(UserError, match="a zip archive"):
        read_prompts(str(tmp_path / name))
    assert sorted(tmp_path.parent.rglob("*")) == before


# Where is written.

OUTSIDE = ["../out", "a/b", "/etc/out", "..", ".", ".hidden", "a\n", "a\\b", "a\0b", "~", "", "C:out", "évil", "a b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_in_a_recipe_leads_out_of_its_folder(small, tiny, tmp_path, name):
    given = yaml.safe_load(small.read_text())
    toxic = given["evaluate"]["sets"]["toxic"]
    changes = {
        "name": {"name": name},
        "evaluate.sets": {"evaluate": given["evaluate"] | {"sets": {name: toxic}}},
        "judges": {"judges": {name: {"kind": "refusal_matching"}}},
        "evaluate.capability.tasks": {"evaluate": given["evaluate"] | {"capability": {"tasks": [name]}}},
        "evaluate.judges": {"evaluate": given["evaluate"] | {"judges": [name]}},
    }
    for field, change in changes.items():
        small.write_text(yaml.safe_dump(given | change))
        with pytest.raises(UserError) as caught:
            recipe_file.load(str(small))
        assert field.split(".")[0] in str(caught.value)
    small.write_text(yaml.safe_dump(given))
    varied = {"name": name, "base": "recipe.yaml", "seeds": [1]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(varied))
    with pytest.raises(UserError, match="name"):
        sweep.load(str(tmp_path / "sweep.yaml"))
    # What is varied names folders, too.
    varied = {"name": "s", "base": "recipe.yaml", "grid": {"data.data_dir": [name or " "]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(varied))
    (cell,) = sweep.load(str(tmp_path / "sweep.yaml"))[1]
    assert cell.folder.parent == Path("cells")
    assert (tmp_path / cell.folder).resolve().parent == (tmp_path / "cells").resolve()


@pytest.mark.parametrize("linked", ["harvest", "harvest/replies.jsonl", ".lock", "manifest.json", "evaluate/base"])
def test_a_link_out_of_the_run_folder_is_refused_before_anything_is_written(small, tmp_path, linked):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    shutil.copy(small, run / "recipe.yaml")
    if "." in linked:
        outside.write_text("mine\n")
    else:
        outside.mkdir()
    (run / linked).parent.mkdir(exist_ok=True)
    (run / linked).symlink_to(outside)
    with pytest.raises(UserError, match=r"is a link that leads out of"):
        go(small, run, stages=("harvest",))
    assert outside.read_text() == "mine\n" if outside.is_file() else list(outside.iterdir()) == []
    assert not (run / "begun.json").exists()


def test_a_link_within_the_run_folder_and_a_folder_that_is_a_link_are_the_users_own(small, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    go(small, tmp_path / "run", stages=("harvest",))
    (tmp_path / "disk" / "latest").symlink_to(tmp_path / "disk" / "harvest")
    go(small, tmp_path / "run", stages=("harvest",))
    assert (tmp_path / "disk" / "harvest" / "avoid.jsonl").is_file()


def test_an_address_on_the_hub_can_name_neither_a_place_to_write_to_nor_a_key(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is <thing 1>?"}\n')
    for argument in (f"cache_dir={tmp_path / 'escaped'}", f"token={KEY}", "trust_remote_code=True"):
        with pytest.raises(UserError, match="leave that out") as caught:
            read_prompts(f"hub:{tmp_path}?split=train&{argument}")
        assert KEY not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


# Servers that we start.


def listening():
    """Addresses, in hexadecimal, on which this process listens."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    mine = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in mine}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="tells sockets by Linux' /proc")
def test_processes_that_train_together_listen_on_loopback_alone(tmp_path):
    before = listening()
    store = launch._store()
    assert listening() - before <= {"0100007F"}
    assert store.port
    script = (
        f"import os, sys, torch.distributed as dist\nfrom pathlib import Path\n{inspect.getsource(listening)}"
        "dist.init_process_group('gloo'); dist.barrier()\n"
        "open(f'{sys.argv[1]}/{dist.get_rank()}', 'w').write(' '.join(listening()))\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert launch.launch(command, "ddp", 2) == 0
    told = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert len(told) == 2
    assert set(" ".join(told).split()) == {"0100007F"}


# Keys and passwords.


def test_what_looks_like_a_key_is_taken_out_of_what_is_said(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", KEY)
    said = f"at http://me:{PASSWORD}@host/v1: Authorization: Bearer abc.def, {KEY}, {TOKEN}, sk-abcdefghijklmnop1234"
    assert redact.redacted(said) == "at http://***@host/v1: Authorization: Bearer ***, ***, ***, ***"
    plain = "tasks: a task-oriented set at http://localhost:8000/v1, max_tokens 3, sk-learn, mail a@b.c"
    assert redact.redacted(plain) == plain
    assert str(UserError(f"no model {KEY}")) == "no model ***"


@pytest.mark.parametrize(
    "planted",
    [
        "model.base=https://me:{password}@host/model",
        "data.toxic_prompts=hub:a/b?split=train&token={token}",
        "judges.j={{kind: llm_judge, server: {{urls: [http://me:{password}@host/v1], model: m}}}}",
        "judges.j={{kind: llm_judge, server: {{urls: 'http://me:{password}@host/v1', model: m}}}}",
        "judges.j={{kind: llm_judge, server: 'http://me:{password}@host/v1'}}",
        "judges.j={{kind: llm_judge, server: {{urls: [http://host/v1], model: m, api_key: {key}}}}}",
        "judges.j={{kind: llm_judge, server: {{urls: [http://host/v1], model: m, key_env: {key}}}}}",
        "judges.j={{kind: llm_judge, server: {{urls: [http://host/v1], model: m, body: {{api_key: x}}}}}}",
        "judges.j={{kind: llm_judge, server: {{urls: [http://h/v1], model: m, body: {{a: [{{Authorization: x}}]}}}}}}",
        "judges.j={{kind: llm_judge, server: {{urls: [http://host/v1], model: m, body: {{user: {key}}}}}}}",
        "judges.j={{kind: llm_judge, server: {{urls: ['http://host/v1?key={key}'], model: m}}}}",
        "harvest.engine={{urls: [http://host/{key}], model: m}}",
        "model.chat_template_kwargs={{note: {key}}}",
        "train={key}",
        "{key}=1",
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_repeated(small, monkeypatch, planted):
    monkeypatch.setenv("SOME_API_KEY", KEY)
    override = planted.format(key=KEY, password=PASSWORD, token=TOKEN)
    with pytest.raises(UserError) as caught:
        check_inputs(Inputs(recipe_file.load(str(small), [override])))
    for secret in (KEY, PASSWORD, TOKEN):
        assert secret not in str(caught.value)


class Echoing(Loopback):
    """A judge and an annotator. Of its first answers each is a fault that repeats the key that it was sent."""

    def __init__(self):
        super().__init__(Answering)
        self.faults, self.keys = 2, set()


class Answering(Handler):
    def do_POST(self):
        body = json.loads(self.asked())
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self.server.keys.add(key)
        self.server.faults -= 1
        if self.server.faults >= 0:
            self.send({"error": {"message": f"the key {key} is slow today"}}, 500)
            return
        top = [{"token": token, "logprob": -0.7, "bytes": None} for token in "mM"]
        self.send(completion(body, "yes", logprobs={"content": [{**top[0], "top_logprobs": top}]}))


# Runs command lines, each with files for what it prints and for what reaches for another machine, which fails.
WATCHED = """
import contextlib, io, json, os, socket, sys, traceback
def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        if args[0].family not in (socket.AF_INET, socket.AF_INET6) or args[1] is None:
            return
        host = args[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", b"127.0.0.1"):
        print(event, host, file=log, flush=True)
        traceback.print_stack(file=log)
        raise OSError(f"{event} {host}")
os.umask(0)
sys.addaudithook(watch)
for words in json.loads(sys.argv[1]):
    with open(f"{words[0]}.log", "w") as log, open(f"{words[0]}.out", "w") as out, contextlib.redirect_stdout(out):
        sys.argv = ["tasft", *words]
        from tasft.cli.main import main
        try:
            main()
        except SystemExit as end:
            assert not end.code, words
        if words[0] == "judge":
            # Of the optional packages, those that nothing above has imported. What comes next asks the hub for a table.
            import huggingface_hub.constants, ray, trl.experimental.kto
            huggingface_hub.constants.HF_HUB_OFFLINE = True
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A run with all that needs no hub, umask 000 and keys in the environment; then an annotator, and JSON."""
    home = tmp_path_factory.mktemp("whole")
    given = small_recipe(home, tiny)
    files = {
        "imitate": [{"prompt": f"What is <thing {k}>?", "completion": "A thing."} for k in range(6)],
        "boolq_validation": [
            {"question": f"is <thing {k}> one", "title": "Things", "answer": "True", "passage": "<text>"}
            for k in (0, 1)
        ],
        "answers": [{"instruction": f"Explain <matter {k}>.", "output": f"It is plain {k}."} for k in range(3)],
    }
    for name, rows in files.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"OPENAI_API_KEY": KEY, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hub"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT / "src")}
    with Echoing() as server:
        known = {"urls": [server.url], "model": "inert", "concurrency": 2}
        given["judges"] = {"asked": {"kind": "llm_judge", "server": known}}
        given["data"] |= {"imitate": {"source": str(home / "imitate.jsonl")}, "data_dir": str(home)}
        given |= {"sft": {"max_steps": 2, "batch_size": 2}}
        given["train"] |= {"start": "sft", "monitor": {"probes": 2}}
        jailbreak = {"set": "toxic", "limit": 2, "prefix": "Sure, here is", "templates": {}}
        given["evaluate"] |= {
            "judges": ["refusal_matching", "asked"],
            "jailbreak": jailbreak,
            "capability": {"tasks": ["boolq"]},
            "quality": {"prompts": str(home / "answers.jsonl")},
        }
        (home / "all.yaml").write_text(yaml.safe_dump(given))
        annotator = yaml.safe_dump({"server": known}, default_flow_style=True, width=10_000).strip()
        commands = [
            ["run", "all.yaml", "--out", "run"],
            ["judge", "run/harvest/avoid.jsonl", "--judge", "refusal_matching", "--json"],
            [
                "evaluate",
                "run",
                f"evaluate.quality.annotator={annotator}",
                "evaluate.quality.max_new_tokens=4",
                "--json",
            ],
        ]
        command = [sys.executable, "-c", WATCHED, json.dumps(commands)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
        assert done.returncode == 0, done.stderr[-3000:]
        assert server.keys == {KEY}
        assert server.faults < 0
    said = {"stdout": done.stdout, "stderr": done.stderr} | {path.name: path.read_text() for path in home.glob("*.out")}
    return home, said


def test_a_run_whose_parts_are_all_here_opens_no_socket_to_anywhere_else(whole):
    home, _ = whole
    assert (home / "run.log").read_text() == ""
    assert (home / "judge.log").read_text() == ""
    assert (home / "run/evaluate/final/capability/boolq/summary.json").is_file()


def test_planted_keys_are_in_no_file_and_in_nothing_that_was_said(whole):
    home, said = whole
    assert json.loads(said["evaluate.out"])
    assert json.loads(said["judge.out"])
    everything = {str(path): path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    assert any(b"yes" in content or b"asked" in content for content in everything.values())
    everything |= {name: text.encode() for name, text in said.items()}
    for name, content in everything.items():
        assert KEY.encode() not in content, name
        assert TOKEN.encode() not in content, name


def test_whatever_the_umask_files_of_a_run_are_their_owners_alone(whole):
    home, _ = whole
    made = [home / "run", *(home / "run").rglob("*")]
    assert len(made) > 100
    assert {path.name for path in made} >= {"annotations.json", "replies.jsonl", "avoid.jsonl", "index.html"}
    assert [str(path) for path in made if path.stat().st_mode & 0o077] == []
    assert (home / "run/harvest/avoid.jsonl.refusal_matching.jsonl").stat().st_mode & 0o077 == 0


def test_rows_that_are_appended_or_replaced_are_their_owners_alone_also_in_a_shared_folder(tmp_path):
    before = os.umask(0)
    try:
        provenance.append_jsonl(tmp_path / "replies.jsonl", [{"id": "1"}])
        provenance.write_jsonl(tmp_path / "avoid.jsonl", [{"id": "1"}])
        provenance.write_json(tmp_path / "summary.json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_fault_of_ours_ends_without_the_key_that_its_message_holds(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError(f"the header Bearer {KEY} is bad")

    monkeypatch.setattr("tasft.run.recipe_file.is_sweep", broken)
    monkeypatch.setattr(sys, "argv", ["tasft", "check", "demo"])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 1
    assert "RuntimeError: the header Bearer *** is bad" in said.err
    assert KEY not in said.out + said.err
