"""Lines, objects and arrays of JSON; tests/property/test_readers.py compares whole files with `datasets`."""

import io

import pytest

from oddsmith.sources import json_records
from oddsmith.sources.json_records import Array, NotARow, lines, row_of_line


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
def test_ends_of_lines(piece, monkeypatch):
    monkeypatch.setattr(json_records, "_PIECE", piece)
    text = b"a\r\nbc\rd\n\n\r\r\ne\x0bf\x85g"
    assert list(lines(io.BufferedReader(io.BytesIO(text)))) == [
        b"a\r\n", b"bc\r", b"d\n", b"\n", b"\r", b"\r\n", b"e\x0bf\x85g"
    ]  # fmt: skip


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_a_line_may_be_as_long_as_allowed(piece, monkeypatch):
    monkeypatch.setattr(json_records, "_PIECE", piece)
    found = list(lines(io.BufferedReader(io.BytesIO(b"123456789\n12\n")), 10))
    assert found == [b"123456789\n", b"12\n"]
    for text in (b"1234567890\n", b"1\n12345678901", b"1" * 50):
        with pytest.raises(NotARow, match="longer than 0 MB"):
            list(lines(io.BufferedReader(io.BytesIO(text)), 10))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"1", 1), (b"-0", 0), (b"9223372036854775807", 2**63 - 1), (b"-9223372036854775808", -(2**63)),
        (b"9223372036854775808", 2.0**63), (b"1" * 30, float("1" * 30)), (b"1e-999", 0.0), (b"1e308", 1e308),
    ],
)  # fmt: skip
def test_numbers(text, value):
    found = row_of_line(b'{"n": ' + text + b"}")["n"]
    assert found == value and type(found) is type(value)


def test_a_mark_of_the_byte_order_is_at_the_start_only():
    assert row_of_line(b'\xef\xbb\xbf{"a": 1}', first=True) == {"a": 1}
    with pytest.raises(NotARow, match="not JSON"):
        row_of_line(b'\xef\xbb\xbf{"a": 1}')


def test_whole_pairs_of_surrogates_are_text():
    assert row_of_line(b'{"a": "\\ud83d\\ude42 \\\\ud800"}') == {"a": "\U0001f642 \\ud800"}


def test_levels(monkeypatch):
    monkeypatch.setattr(json_records, "_DEPTH", 4)
    assert row_of_line(b'{"a": [[{"b": 1}], [], [], []]}')
    with pytest.raises(NotARow, match="too deeply"):
        row_of_line(b'{"a": [[[{"b": 1}]]]}')


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_items_of_an_array_have_their_lines(chunk, monkeypatch):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    array = Array(io.StringIO(' \n[\n{"a": 1} ,\n\n {"a":\n 2}, 7, {"a": [1, 2]}\n]\n \n'))
    assert [(fields, problem, array.line) for fields, problem in array] == [
        ({"a": 1}, None, 3), ({"a": 2}, None, 5), (None, "a int; must be a JSON object", 6),
        ({"a": [1, 2]}, None, 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the array has no end"), ("[", "the array has no end"), ('[{"a": 1}', "the array has no end"),
        ('[{"a": 1},', "the array has no end"), ("{}", r"Expecting '\['"), ("[,{}]", "Expecting value"),
        ("[{}]]", "there is more after the end"), ('[{"a": "', "the file is cut off: Unterminated"),
    ],
)  # fmt: skip
def test_arrays_that_are_none(text, words):
    with pytest.raises(NotARow, match=words):
        list(Array(io.StringIO(text)))
