"""What a run tells a tracker: both terms of the loss, and the rates of each state at its step. And .gguf files."""

from dataclasses import replace

import pytest
import yaml
from conftest import tasft_here
from running import go, small_recipe

import tasft
from tasft.core.errors import UserError
from tasft.run import export as exports
from tasft.run import trackers


def scalars(folder):
    """Of TensorBoard's files: name -> step -> value."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.rglob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_a_run_tells_tensorboard_its_terms_and_its_rates(tmp_path, tiny):
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path, tiny)))
    fields = ("train.report_to=[tensorboard]", "evaluate.checkpoints=true", "train.save_steps=2")
    go(path, tmp_path / "run", *fields)
    told = scalars(tmp_path / "run" / "train")
    assert {"train/imitate_nll", "train/penalty", "train/loss"} <= told.keys()
    rates = tasft.results(tmp_path / "run")
    for state, step in {"base": 0, "checkpoint-2": 2, "final": 4}.items():
        (row,) = [
            row for row in rates[rates.measure == "refusal"].itertuples() if (row.state, row.set) == (state, "toxic")
        ]
        assert told["toxic/refusal_matching/refusal"][step] == pytest.approx(row.value)
    # A tracker changes nothing: without it the run is as it was.
    before = (tmp_path / "run" / "train" / "done.json").stat().st_mtime_ns
    go(path, tmp_path / "run", *fields[1:])
    assert (tmp_path / "run" / "train" / "done.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tensorbord", "transformers knows no tracker 'tensorbord'"),
        ("tensorbord", "did you mean tensorboard?"),
        ("neptune", "the package of neptune is not installed: pip install neptune"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_refused_before_work_begins(tmp_path, tiny, name, sentence):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path, tiny)))
    done = tasft_here("check", tmp_path / "recipe.yaml", f"train.report_to=[{name}]", cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_tracker_that_fails_loses_nothing(tmp_path, monkeypatch):
    from accelerate import tracking

    class Broken:
        requires_logging_directory = False

        def __init__(self, name):
            raise RuntimeError("no way\nthere")

    class Record:
        before, checkpoints = "base", {}

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    monkeypatch.setattr(trackers, "read_run", lambda _: Record)
    monkeypatch.setattr(trackers, "rows", lambda _: [])
    with pytest.raises(UserError, match=r"wandb did not take the rates \(RuntimeError: no way there\)"):
        trackers.tell_rates(tmp_path, ["wandb", "neptune"], "small")


# --- llama.cpp's converter, or what stands for it

CONVERTER = "import sys, pathlib\nfolder, _, out = sys.argv[1:]\npathlib.Path(out).write_bytes(b'GGUF')\n"


def exported(folder):
    folder.mkdir()
    return exports.Exported(folder, {"model.safetensors": 1}, 0.0, None, 1.0, [])


def test_the_converter_writes_into_the_export(tmp_path, monkeypatch):
    (tmp_path / exports.CONVERTER).write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    made = exported(tmp_path / "mine")
    assert exports.add_gguf(made) == replace(made, files={"model.safetensors": 1, "mine.gguf": 4})
    assert (tmp_path / "mine" / "mine.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (None, "git clone https://github.com/ggml-org/llama.cpp, and name that folder in LLAMA_CPP"),
        (
            "import sys; open(sys.argv[3], 'w'); sys.exit('first\\nModel X is not supported')",
            "ended with 1 (Model X is not supported); the model is exported",
        ),
        ("pass", "ended with 0"),
    ],
)
def test_without_a_converter_or_where_it_fails_the_model_stays(tmp_path, monkeypatch, code, sentence):
    (tmp_path / "llama").mkdir()
    if code is not None:
        (tmp_path / "llama" / exports.CONVERTER).write_text(code)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama"))
    made = exported(tmp_path / "mine")
    with pytest.raises(UserError) as caught:
        exports.add_gguf(made)
    assert sentence in str(caught.value)
    assert not list(made.folder.iterdir())
