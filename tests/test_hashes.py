"""A model is told from others by the content of what is read of it."""

import json
import os
import shutil

import pytest

from tasft.core import hashes
from tasft.core.hashes import known_hash
from tasft.core.provenance import file_hash
from tasft.models.load import fingerprint


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "tasft" / "hashes.json"


def test_a_copy_is_the_same_model_wherever_and_whenever_it_was_made(tiny, tmp_path):
    copied = tmp_path / "elsewhere"
    shutil.copytree(tiny, copied, copy_function=shutil.copyfile)
    (tmp_path / "link").symlink_to(copied)
    before = fingerprint(str(tiny))
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    assert before == fingerprint(str(copied)) == fingerprint(str(tmp_path / "link"))
    assert {name for name, _ in before} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    "name",
    ["README.md", "notes.json", ".gitattributes", "pytorch_model.bin", "old.safetensors", "a/model.safetensors", "x"],
)
def test_what_is_not_read_does_not_count(tiny, tmp_path, name):
    copied = tmp_path / "model"
    shutil.copytree(tiny, copied)
    path = copied / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("a card")
    assert fingerprint(str(copied)) == fingerprint(str(tiny))


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "m.py"],
)
def test_what_is_read_counts_even_if_size_and_time_are_as_before(tiny, tmp_path, name):
    copied = tmp_path / "model"
    shutil.copytree(tiny, copied)
    path = copied / name
    path.touch()
    content = path.read_bytes() or b"{ }"
    path.write_bytes(content)
    before, status = fingerprint(str(copied)), path.stat()
    path.write_bytes(content[:-1] + b"\n" if content[-1:] != b"\n" else content[:-1] + b" ")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert fingerprint(str(copied)) != before


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch, memory):
    path, read = tmp_path / "weights", []

    def reading(each):
        read.append(each)
        return file_hash(each)

    monkeypatch.setattr(hashes, "file_hash", reading)
    path.write_text("one")
    first = [known_hash(path) for _ in range(3)]
    assert len(read) == 1
    path.write_text("two!")
    assert known_hash(path) == file_hash(path) != first[0]
    assert len(read) == 2
    path.unlink()
    other = tmp_path / "other"
    other.write_text("x")
    known_hash(other)
    assert list(json.loads(memory.read_text())) == [str(other)]


@pytest.mark.parametrize("content", ["", "{half", "[]", '{"PATH": 3}', '{"PATH": [1]}', "\x00"])
def test_a_damaged_memory_or_none_costs_time_alone(tmp_path, memory, content):
    path = tmp_path / "weights"
    path.write_text("one")
    memory.parent.mkdir(parents=True)
    memory.write_text(content.replace("PATH", str(path)))
    assert known_hash(path) == file_hash(path)
    shutil.rmtree(memory.parent.parent)
    memory.parent.parent.write_text("no folder")
    assert known_hash(path) == file_hash(path)
