import json
from collections import Counter

import pytest
from conftest import ROOT, rows, script

from tasft.core.errors import UserError

label = script("label")
REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "First, take the <forbidden thing> and put it on the table."
COLLAPSE = "the the the the the the the the"


def run_folder(folder, penalty, replies):
    """A run of which nothing but evaluations is left; replies by state."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"train: {{method: tasft, penalty: {penalty}}}\n")
    for state, texts in replies.items():
        place = folder / "evaluate" / state / "toxic"
        place.mkdir(parents=True)
        write(
            place / "replies.jsonl",
            (
                {"id": str(n), "prompt": f"How do I <forbidden act {n}>?", "completion": text}
                for n, text in enumerate(texts)
            ),
        )
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def runs(tmp_path):
    base = [f"{ANSWER} {number}" for number in range(30)]
    return [
        run_folder(tmp_path / "a", "emd_exact", {"base": base, "final": [f"{REFUSAL} {n}" for n in range(30)]}),
        run_folder(tmp_path / "b", "emd_exact", {"base": base, "final": [f"{REFUSAL} So {n}." for n in range(30)]}),
        run_folder(tmp_path / "c", "nlcl", {"base": base, "final": [f"{COLLAPSE} {n}" for n in range(5)]}),
    ]


def test_a_sheet_is_blind_even_over_methods_and_the_same_again(tmp_path, runs):
    for name in ("one", "two"):
        label.sheet(runs, 35, 0, tmp_path / f"{name}.jsonl", tmp_path / f"{name}-mapping.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    sheet, mapping = rows(tmp_path / "one.jsonl"), rows(tmp_path / "one-mapping.jsonl")
    assert all(row.keys() == {"key", "prompt", "completion"} for row in sheet)
    assert all(row.keys() == {"key", "method", "run", "state", "set", "id"} for row in mapping)
    assert [row["key"] for row in sheet] == [row["key"] for row in mapping]
    assert len({row["key"] for row in sheet}) == 35
    # Five collapses are all that there is of them; the rest is shared out, and runs of a method in it.
    assert Counter(row["method"] for row in mapping) == {"untouched": 15, "emd_exact": 15, "nlcl": 5}
    assert {Counter(r["run"] for r in mapping if r["method"] == "emd_exact")[name] for name in "ab"} == {7, 8}
    assert [row["method"] for row in mapping] != sorted(row["method"] for row in mapping)


def test_a_sheet_can_be_of_some_states_and_sets(runs):
    assert {row["state"] for row in label.drawn(runs, 20, 0, ["final"], ["toxic"])} == {"final"}
    assert label.drawn(runs, 0, 0, [], ["benign"]) == []
    with pytest.raises(UserError, match="hold 0 different replies"):
        label.drawn(runs, 1, 0, [], ["benign"])


def test_harmful_text_does_not_get_into_the_repository(tmp_path, runs):
    with pytest.raises(UserError, match="would put harmful text into the repository"):
        label.sheet(runs, 10, 0, ROOT / "docs" / "sheet.jsonl", tmp_path / "mapping.jsonl")
    assert not (ROOT / "docs" / "sheet.jsonl").exists()
    (tmp_path / "sheet.jsonl").write_text("mine")
    with pytest.raises(UserError, match="labels may refer to it"):
        label.sheet(runs, 10, 0, tmp_path / "sheet.jsonl", tmp_path / "mapping.jsonl")
    with pytest.raises(UserError, match="hold 95 different replies, not 96"):
        label.sheet(runs, 96, 0, tmp_path / "new.jsonl", tmp_path / "mapping.jsonl")


def test_agreement_is_counted_on_what_was_labelled(tmp_path):
    texts = [REFUSAL, ANSWER, ANSWER + " Then wait.", COLLAPSE, "No. " + REFUSAL]
    sheet = [{"prompt": f"How do I <forbidden act {n}>?", "completion": text} for n, text in enumerate(texts)]
    sheet = [{"key": label.key_of(row), **row} for row in sheet]
    # The third is harmless to the eye; of the fourth nothing can be said but that it is broken; the fifth was not read.
    said = [(False, True, True), (True, False, True), (False, False, True), (None, None, False)]
    labels = write(
        tmp_path / "labels.jsonl",
        (
            {"key": row["key"], **dict(zip(label.ASKED, answers, strict=True))}
            for row, answers in zip(sheet, said, strict=False)
        ),
    )
    mapping = write(tmp_path / "mapping.jsonl", ({"key": row["key"], "method": "nlcl"} for row in sheet))
    label.unblind(labels, mapping)
    result = label.agree(labels, write(tmp_path / "sheet.jsonl", sheet), ["refusal_matching"])
    assert result["n"] == 4
    assert result["methods"] == {"nlcl": {"n": 4, "harmful": 1, "refusal": 1, "incoherent": 1}}
    harm, refusal = (result["judges"]["refusal_matching"][name] for name in ("harm", "refusal"))
    assert (harm["n"], harm["table"]) == (3, [[1, 0], [1, 1]])
    assert (refusal["n"], refusal["table"]) == (3, [[1, 0], [0, 2]])
    assert (result["coherence"]["n"], result["coherence"]["table"]) == (4, [[1, 0], [0, 3]])
    assert "| harm | refusal_matching | 3 | 1 | 0.67 (" in label.table(result)
    assert ANSWER not in json.dumps(result)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- labels:begin -->\nold\n<!-- labels:end -->\nafter\n")
    label.put(page, "labels", label.table(result))
    assert page.read_text() == f"before\n<!-- labels:begin -->\n\n{label.table(result)}\n<!-- labels:end -->\nafter\n"
    with pytest.raises(SystemExit, match="there is no <!-- harm:begin -->"):
        label.put(page, "harm", "")


def test_labels_with_texts_gaps_or_other_keys_are_refused(tmp_path):
    path = write(
        tmp_path / "labels.jsonl",
        [
            {"key": "a", "harmful": True, "refusal": False, "coherent": True},
            {"key": "a", "harmful": "yes", "refusal": False, "coherent": True},
            {"key": "b", "harmful": True, "refusal": False, "prompt": "text"},
        ],
    )
    with pytest.raises(UserError) as caught:
        label.read_labels(path)
    assert [fault.split(":", 1)[1] for fault in caught.value.faults] == [
        "2: 'harmful' must be true, false or null",
        "3: 'coherent' must be true, false or null",
        "2: this key was labelled before",
        "3: holds prompt; labels hold no more than key and answers",
    ]
    sheet = write(tmp_path / "sheet.jsonl", [{"key": "b", "prompt": "p", "completion": "c"}])
    with pytest.raises(UserError) as caught:
        label.labelled_pairs([{"key": "a"}], sheet)
    assert caught.value.faults == [f"{sheet}: lacks the key a", f"{sheet}:1: is not the text of its key"]


def test_the_topic_is_compared_with_the_rule_where_it_was_labelled(tmp_path):
    texts = [
        ("How do I dry flowers?", "Hang the flowers upside down in a dry, dark room.", True),
        ("How do I dry flowers?", "The train to the coast leaves at nine in the morning.", False),
        ("How do I dry flowers?", REFUSAL, True),
        ("How do I prune a tree?", "I am not sure.", None),
    ]
    sheet = [{"prompt": prompt, "completion": reply} for prompt, reply, _ in texts]
    sheet = [{"key": label.key_of(row), **row} for row in sheet]
    said = {"harmful": False, "refusal": False, "coherent": True}
    labels = [{"key": row["key"], **said, "on_topic": text[2]} for row, text in zip(sheet, texts, strict=True)]
    at = write(tmp_path / "labels.jsonl", labels), write(tmp_path / "sheet.jsonl", sheet)
    found = label.agree(*at, ["refusal_matching"])
    assert found["topic"]["table"] == [[1, 0], [0, 2]]
    assert found["methods"]["unknown"]["off topic"] == 1
    assert "| off topic | rules of coherence | 3 | 1 |" in label.table(found)
    write(at[0], [{name: row[name] for name in row if name != "on_topic"} for row in labels])
    assert "topic" not in label.agree(*at, ["refusal_matching"])
    write(at[0], [{**labels[0], "on_topic": "yes"}])
    with pytest.raises(UserError, match="'on_topic' must be true, false or null"):
        label.read_labels(at[0])
