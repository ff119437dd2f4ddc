import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasft.core import provenance
from tasft.core.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, min_size=2, max_size=4))
def test_a_content_hash_does_not_depend_on_the_order_of_keys(value):
    turned = dict(reversed(value.items()))
    assert provenance.content_hash(turned) == provenance.content_hash(value)


def test_a_content_hash_tells_values_apart():
    values = [{"a": 1}, {"a": "1"}, {"a": [1]}, {"a": None}, {}, "a", "\ud800"]
    assert len({provenance.content_hash(value) for value in values}) == len(values)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    provenance.write_json(path, {"old": True})

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(provenance.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        provenance.write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=())), cut=st.integers(1, 40))
def test_rows_with_any_text_come_back_and_a_torn_one_is_dropped(tmp_path_factory, text, cut):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    provenance.append_jsonl(path, [{"text": "first"}])
    whole = path.read_bytes()
    provenance.append_jsonl(path, [{"text": text}])
    row = provenance.resume_jsonl(path)[1]
    # A lone surrogate has no UTF-8: it is written as its escape.
    assert row["text"].encode("utf-8", "backslashreplace") == text.encode("utf-8", "backslashreplace")
    torn = path.read_bytes()[: len(whole) + min(cut, len(path.read_bytes()) - len(whole) - 1)]
    path.write_bytes(torn)
    assert provenance.resume_jsonl(path) == [{"text": "first"}]
    assert path.read_bytes() == whole


def test_a_damaged_document_is_named(tmp_path):
    (tmp_path / "done.json").write_text("{half")
    with pytest.raises(UserError, match=r"done\.json: not JSON any more"):
        provenance.read_json(tmp_path / "done.json")
    assert provenance.read_json(tmp_path / "none.json") is None
