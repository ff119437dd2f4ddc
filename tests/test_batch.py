import torch

from tasft.loss import IGNORE_INDEX
from tasft.train.collate import collate

ROWS = [
    {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3], "avoid": False, "weight": 1.0, "margins": [0.0, 0.5, 0.0]},
    {"input_ids": [4, 5], "labels": [IGNORE_INDEX, 5], "avoid": True, "weight": 2.0, "margins": [0.25, 0.0]},
]


def test_padded_rows_stand_side_by_side():
    batch = collate(ROWS, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3], [IGNORE_INDEX, 5, IGNORE_INDEX]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["avoid"].tolist() == [[False] * 3, [True, True, False]]
    assert batch["segments"].tolist() == [[0, 0, 0], [1, 1, -1]]
    assert batch["weight"].tolist() == [[1, 1, 1], [2, 2, 0]]
    assert batch["margins"].tolist() == [[0, 0.5, 0], [0.25, 0, 0]]
    assert "position_ids" not in batch


def test_rows_without_padding_stand_end_to_end():
    batch = collate(ROWS, pad_token_id=9, layout="end_to_end")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["avoid"].tolist() == [[False] * 3 + [True] * 2]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1]]
    assert "attention_mask" not in batch


def test_what_rows_lack_the_batch_lacks():
    rows = [{name: row[name] for name in ("input_ids", "labels", "avoid")} for row in ROWS]
    batch = collate(rows, pad_token_id=9)
    assert batch.keys() == {"input_ids", "labels", "avoid", "segments", "attention_mask"}
    assert batch["avoid"].dtype == torch.bool


def test_what_all_rows_begin_with_stands_once():
    begin = list(range(10, 80))
    rows = [
        {"input_ids": begin + row["input_ids"], "labels": [IGNORE_INDEX] * 70 + row["labels"], "avoid": False}
        for row in ROWS
    ]
    batch = collate(rows, pad_token_id=9, layout="shared")
    assert batch["input_ids"].tolist() == [[*begin, 1, 2, 3, 4, 5]]
    assert batch["position_ids"][0, 70:].tolist() == [70, 71, 72, 70, 71]
    assert batch["segments"][0, 69:].tolist() == [0, 0, 0, 0, 1, 1]
    looks = batch["attention_mask"][0, 0]
    assert looks[:73, :73].equal(torch.ones(73, 73, dtype=torch.bool).tril())
    assert looks[73:].long().tolist() == [[1] * 70 + [0, 0, 0, 1, 0], [1] * 70 + [0, 0, 0, 1, 1]]


def test_a_beginning_that_is_learned_or_short_is_not_shared():
    begin = list(range(10, 80))
    rows = [{"input_ids": begin + row["input_ids"], "labels": begin + row["labels"], "avoid": False} for row in ROWS]
    assert "attention_mask" not in collate(rows, pad_token_id=9, layout="shared")
    assert "attention_mask" not in collate(ROWS, pad_token_id=9, layout="shared")
