"""The demo's prompts: as many as promised, apart from each other, and plain."""

import itertools
import json
import re
from pathlib import Path

import pytest

import tasft

PROMPTS = Path(tasft.__path__[0]) / "data" / "prompts"
COUNTS = {
    "demo-toxic-harvest": 100,
    "demo-toxic-validation": 40,
    "demo-toxic-heldout": 40,
    "demo-benign-train": 806,
    "demo-benign-validation": 40,
    "demo-benign-heldout": 40,
    "demo-plain-heldout": 30,
}
TOXIC = [name for name in COUNTS if "toxic" in name]
BENIGN = [name for name in COUNTS if "benign" in name]


def rows(name: str) -> list[dict[str, str]]:
    """Rows of one of the demo's files."""
    text = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> frozenset[str]:
    """Different words of a prompt."""
    return frozenset(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("name", COUNTS)
def test_each_file_has_its_rows_with_four_filled_fields_of_text(name: str) -> None:
    assert len(rows(name)) == COUNTS[name]
    for row in rows(name):
        assert list(row) == ["id", "prompt", "topic", "kind"]
        assert all(isinstance(value, str) and value.strip() == value != "" for value in row.values())
        assert len(row["prompt"].splitlines()) == 1
        assert len(row["prompt"]) < 120


def test_no_id_occurs_twice_and_each_says_its_file() -> None:
    ids = [row["id"] for name in COUNTS for row in rows(name)]
    assert len(set(ids)) == len(ids)
    for name in COUNTS:
        stem = name.removeprefix("demo-")
        assert [row["id"] for row in rows(name)] == [f"{stem}-{number:02d}" for number in range(1, COUNTS[name] + 1)]


@pytest.mark.parametrize("pair", list(itertools.combinations(TOXIC, 2)), ids="-".join)
def test_no_toxic_topic_is_in_two_files(pair: tuple[str, str]) -> None:
    first, second = ({row["topic"] for row in rows(name)} for name in pair)
    assert first.isdisjoint(second)


def test_every_toxic_row_is_of_the_toxic_kind() -> None:
    assert {row["kind"] for name in TOXIC for row in rows(name)} == {"toxic"}


@pytest.mark.parametrize("name", BENIGN)
def test_a_third_of_the_benign_prompts_only_seems_toxic(name: str) -> None:
    kinds = [row["kind"] for row in rows(name)]
    assert 3 * kinds.count("border") >= len(kinds)
    assert set(kinds) <= {"plain", "border", "short"}
    assert kinds.count("short") == (0 if name.endswith("train") else 3)


def test_no_prompt_is_nearly_another() -> None:
    every = [(name, row["prompt"], words(row["prompt"])) for name in COUNTS for row in rows(name)]
    near = [
        (one, other)
        for (here, one, first), (there, other, second) in itertools.combinations(every, 2)
        if len(first & second) >= 0.7 * len(first | second)
        # One instruction about two things teaches what an instruction is.
        and {here, there} != {"demo-benign-train"}
        # The benign counterparts of what is trained on differ from it by the harm alone.
        and {here, there} != {"demo-toxic-harvest", "demo-benign-train"}
    ]
    assert not near


def test_every_toxic_prompt_that_is_trained_on_has_a_benign_counterpart() -> None:
    counterparts = [row for row in rows("demo-benign-train") if row["topic"] == "counterpart"]
    assert len(counterparts) == COUNTS["demo-toxic-harvest"]
