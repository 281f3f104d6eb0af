"""Parsing of fields; units and the results of their rows."""

import pytest

from oddsmith.errors import UserError
from oddsmith.prepare.formats import ReadOptions, read_units
from oddsmith.prepare.pair import (
    BadRow,
    Pair,
    Unit,
    assistant,
    messages_of,
    number_of,
    per_record,
    required,
    shown,
    text_of,
    text_or_messages,
    user,
)
from oddsmith.sources.records import Record


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        ("2.5", 2.5),
        (" -1e2 ", -100.0),
        (None, None),
        ("", None),
        (" n/a ", None),
        ("NA", None),
        (float("nan"), None),
        ("nan", None),
    ],
)
def test_numbers(value, number):
    assert number_of(value, "score") == number


@pytest.mark.parametrize("value", [True, "high", [1], {}])
def test_texts_that_are_not_numbers(value):
    with pytest.raises(BadRow, match="field score is .* must be a number"):
        number_of(value, "score")


def test_names_of_other_collections():
    theirs = [
        {"from": "system", "value": "Be"},
        {"from": "human", "value": "Hi", "id": 7},
        {"role": "bot", "content": "Hello"},
        {"role": "tool", "content": "42"},
    ]
    assert messages_of(theirs, "chosen") == [
        {"role": "system", "content": "Be"},
        user("Hi"),
        assistant("Hello"),
        {"role": "tool", "content": "42"},
    ]
    assert text_or_messages("plain", "chosen") == "plain"
    assert text_or_messages(theirs[1:2], "chosen") == [user("Hi")]


def test_texts():
    assert text_of("é 🦀", "chosen") == "é 🦀"
    with pytest.raises(BadRow, match=r"field chosen is 3 \(int\); must be a string"):
        text_of(3, "chosen")
    with pytest.raises(BadRow, match="half a surrogate pair at character 2"):
        text_of("a\udc00", "chosen")


def test_required_fields():
    assert required({"a": 0}, "a") == 0
    with pytest.raises(BadRow, match="field b is missing; the fields are a"):
        required({"a": 1}, "b")
    with pytest.raises(BadRow, match="field a is null; the fields are a, c"):
        required({"a": None, "c": 2}, "a")


def test_long_values_are_shortened():
    assert shown([1, 2]) == "[1, 2] (list)"
    text = shown("x" * 100)
    assert text == "'" + "x" * 56 + "... (str)"


def test_the_row_of_a_unit_is_kept_if_one_of_its_pairs_is():
    pair = Pair("q", "a", "b")
    assert list(Unit("x", [pair, pair], rows=3).fates(["both poor", None])) == [(None, 3)]
    dropped = Unit("x", [pair, pair]).fates(["both poor", "duplicate prompt"])
    assert list(dropped) == [("both poor", 1)]
    assert list(Unit("x", reason="no prompt", rows=2).fates([])) == [("no prompt", 2)]


def test_bad_rows_stop_or_are_counted():
    records = [
        Record({"n": 1}, "f.jsonl", "line", 1),
        Record(None, "f.jsonl", "line", 2, "not JSON"),
        Record({}, "f.jsonl", "line", 3),
        Record({"n": -1}, "f.jsonl", "line", 4),
    ]

    def parse(fields):
        number = required(fields, "n")
        return [Pair("q", "a", "b")] if number > 0 else Unit("", reason="no prompt")

    units = list(per_record(records, parse, stop=False))
    assert [(unit.where, unit.reason, len(unit.pairs)) for unit in units] == [
        ("f.jsonl line 1", None, 1),
        ("f.jsonl line 2", "bad row", 0),
        ("f.jsonl line 3", "bad row", 0),
        ("f.jsonl line 4", "no prompt", 0),
    ]
    with pytest.raises(UserError) as error:
        list(per_record(records, parse, stop=True))
    assert str(error.value) == (
        "f.jsonl line 2: not JSON (--bad_rows drop skips such rows and counts them)"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen_response": "a", "rejected_response": "b"},
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "q", "completion": "a", "label": True},
    ],
)
@pytest.mark.parametrize("images", [{"images": ["a.png"]}, {"image": "a.png"}])
def test_rows_with_images_are_refused_in_every_format(row, images):
    records = [Record({**row, **images}, "x", "line", 1), Record(row, "x", "line", 2)]
    with pytest.raises(UserError, match="x line 1: the row has images"):
        list(read_units(records, ReadOptions())[1])
    _, units = read_units(records, ReadOptions(stop_at_bad_rows=False))
    assert sum(unit.rows for unit in units if unit.reason == "bad row") == 1
