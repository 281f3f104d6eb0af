"""One file, one set of rows: `prepare` and `inspect`, which stream it, and `train`, for which `datasets` reads it."""

import gzip
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oddsmith.errors import UserError
from oddsmith.sources.find import load_source
from oddsmith.sources.records import FileRecords

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
# One more field makes each row another one.
ROWS = [{**ROW, "n": number} for number in range(3)]
LINES = [json.dumps(row).encode() for row in ROWS]
ARRAY = json.dumps(ROWS).encode()
FORMS = (
    "CR",
    "CRLF",
    "blank lines",
    "mark",
    "packed lines",
    "packed array",
    "array",
    "lines",
    "indented",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def streamed(path):
    rows = []
    for record in FileRecords(path):
        if record.problem is not None:
            raise UserError(f"{record.where}: {record.problem}")
        rows.append(record.fields)
    return rows


def trained_on(path):
    return [dict(row) for row in load_source(str(path))["train"]]


def both(path):
    """The rows by each of the two, or the error, which has to be the same one."""
    try:
        rows = streamed(path)
    except UserError as error:
        with pytest.raises(UserError) as raised:
            trained_on(path)
        assert str(raised.value).endswith(str(error))
        return str(error)
    assert plain(trained_on(path)) == plain(rows)
    return rows


def plain(rows):
    """
    Columns that only some rows have are null in the others, for Arrow, and integers beside fractions
    are fractions. The parser that datasets takes for arrays rounds their last bits otherwise.
    """
    return [
        {
            name: f"{value:.12g}" if isinstance(value, (int, float)) else value
            for name, value in row.items()
            if value is not None
        }
        for row in rows
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\r".join(LINES) + b"\r"),
        ("a.jsonl", b"\r\n".join(LINES)),
        ("a.jsonl", b"\n\r\n \n".join(LINES)),
        ("a.jsonl", b"\xef\xbb\xbf" + b"\n".join(LINES)),
        ("a.jsonl", gzip.compress(b"\n".join(LINES), mtime=0)),
        ("a.json", gzip.compress(ARRAY, mtime=0)),
        ("a.jsonl", ARRAY),
        ("a.json", b"\n".join(LINES)),
        ("a.json", b" \n" + json.dumps(ROWS, indent=2).encode() + b"\n\n"),
    ],
    ids=FORMS,
)
def test_forms_of_the_same_rows(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert both(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", ARRAY + ARRAY, "line 1: there is more after the end of the array"),
        ("a.json", ARRAY + b"\n" + ARRAY, "line 2: there is more"),
        ("a.json", ARRAY + b" x", "line 1: there is more"),
        ("a.json", ARRAY[:-1] + b",]", "line 1: not JSON: Expecting value"),
        ("a.json", ARRAY.replace(b"}, {", b"} {", 1), "line 1: not JSON: Expecting ','"),
        ("a.json", b"[null]", "line 1: a NoneType; must be"),
        ("a.jsonl", b"[]\n" + LINES[0], "line 1: a list; must be a JSON object"),
        ("a.jsonl", b"[" + LINES[0] + b"]\n[" + LINES[1] + b"]", "line 1: a list; must be a JSON object"),
        ("a.json", json.dumps(ROW, indent=1).encode(), "line 1: not JSON"),
        ("a.jsonl", LINES[0] + b" " + LINES[1], "line 1: not JSON: Extra data"),
        ("a.jsonl", LINES[0] + b"\n" + LINES[1][:-9], "line 2: not JSON: Expecting"),
        ("a.jsonl", LINES[0] + b'\n{"n": ' + b"9" * 5000 + b"}", "line 2: a number of 5,000 digits"),
        ("a.jsonl", b'{"n": 1e999}', "line 1: the number 1e999 is too large"),
        ("a.jsonl", b'{"n": 1, "n": 2}', "line 1: 'n' is in one object twice"),
        ("a.jsonl", b'{"a": {"n": 1, "n": 2}}', "line 1: 'n' is in one object twice"),
        ("a.jsonl", LINES[0] + b'\n{"a": "\\ud800"}', "line 2: not Unicode: half of a surrogate pair"),
        ("a.jsonl", LINES[0] + b'\n{"a": "\xed\xa0\x80"}', "line 2: not UTF-8"),
        ("a.jsonl", LINES[0] + b'\n{"a": "\xff"}', "line 2: not UTF-8: invalid start byte at byte 8"),
        ("a.jsonl", b"\n".join(LINES).decode().encode("utf-16"), "line 1: not UTF-8"),
        ("a.jsonl", LINES[0] + b'\n{"a": ' + b"[" * 250 + b"]" * 250 + b"}", "line 2: not JSON: nested"),
        ("a.jsonl", LINES[0] + b'\n{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "line 2: not JSON: nested"),
        ("a.json", b'[{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]", "line 1: not JSON: nested"),
    ],
)  # fmt: skip
def test_files_that_are_refused_in_the_same_words(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert words in both(tmp_path / name)


@pytest.mark.parametrize("side", [{"role": "assistant"}, {"role": "assistant", "content": None}])
def test_content_that_is_not_there(side, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**ROW, "chosen": [side], "rejected": [{**side, "content": "x"}]}))
    # Arrow has no difference of null and missing.
    ours, theirs = streamed(path), trained_on(path)
    assert len(ours) == len(theirs) == 1
    assert ours[0]["chosen"][0].get("content") is theirs[0]["chosen"][0].get("content") is None


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)


_NUMBERS = itertools.count()


@st.composite
def files(draw):
    """The bytes of a file of rows in one of the forms, perhaps damaged somewhere."""
    kind = draw(st.sampled_from([TEXT, NUMBERS, st.lists(TEXT, max_size=2)]))
    rows = [{**ROW, "prompt": draw(TEXT), "x": draw(kind)} for _ in range(draw(st.integers(1, 5)))]
    texts = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    if draw(st.booleans()):
        content = ("[" + draw(st.sampled_from([",", ",\n", " , "])).join(texts) + "]").encode()
    else:
        end = draw(st.sampled_from(["\n", "\r", "\r\n", "\n\n"]))
        content = "".join(text + end for text in texts).encode()
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(content)))
        what = draw(
            st.sampled_from([b"", b"}", b"{", b"[", b"]", b",", b'"', b"\n", b"\\", b"x", b"\xff"])
        )
        content = content[:place] + what + content[place + draw(st.integers(0, 2)) :]
    return content


@settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(content=files(), name=st.sampled_from(["a.jsonl", "a.json"]), packed=st.booleans())
def test_any_file(content, name, packed, tmp_path):
    # A new name each time: datasets keeps what it has read by the time of the file.
    folder = tmp_path / str(next(_NUMBERS))
    folder.mkdir()
    path = folder / name
    path.write_bytes(gzip.compress(content) if packed else content)
    if path.stat().st_size:
        both(path)


def test_a_long_row_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    long = b'{"prompt": "' + b"x" * (3 << 20) + b'"}\n'
    path.write_bytes(gzip.compress(LINES[0] + b"\n" + long))
    with pytest.raises(UserError, match=r"line 2: longer than 1 MB; --max_line_mb allows more"):
        list(FileRecords(path, 1 << 20))
    with pytest.raises(UserError, match=r"line 2: longer than 1 MB"):
        load_source(str(path), longest=1 << 20)
    assert len(list(FileRecords(path))) == 2
    array = tmp_path / "a.json"
    array.write_bytes(b"[" + LINES[0] + b",\n" + long + b"]")
    with pytest.raises(UserError, match=r"line 2: longer than 1 MB"):
        list(FileRecords(array, 1 << 20))
