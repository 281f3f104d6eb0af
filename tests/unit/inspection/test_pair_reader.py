"""The pairs of records, by the columns that their dataset has."""

import pytest

from oddsmith.errors import UserError
from oddsmith.inspection.pair_reader import PairReader
from oddsmith.sources.records import Record


def records(*rows):
    return [Record(row, "rows.jsonl", "line", index + 1) for index, row in enumerate(rows)]


ROW = {"question": "a b", "chosen": "c", "rejected": "d", "hint": "very short"}


def test_recognised_and_named_columns(log):
    reader = PairReader({}, "rows.jsonl")
    pair = {"prompt": "a b", "chosen": "c", "rejected": "d", "hint": "very short"}
    assert reader.read(records(ROW, ROW)) == [pair, pair]
    assert reader.read(records(ROW)) == [pair]
    assert log.text.count("rows.jsonl: question is the prompt;") == 1
    assert reader.notes.unused == ("hint",)
    named = PairReader({"hint": "prompt", "question": "tools"}, "rows.jsonl")
    assert named.read(records(ROW)) == [
        {"prompt": "very short", "chosen": "c", "rejected": "d", "tools": "a b"}
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "rows.jsonl line 2: cut off"),
        ({"chosen": "c"}, "rows.jsonl line 2: no field rejected; its fields are chosen"),
    ],
)
def test_records_without_a_pair(row, message):
    damaged = Record(row, "rows.jsonl", "line", 2, None if row else "cut off")
    with pytest.raises(UserError, match=message):
        PairReader({}, "rows.jsonl").read([*records(ROW), damaged])
