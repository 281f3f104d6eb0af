"""Records of files: every kind, and errors of damaged ones."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from oddsmith.errors import UserError
from oddsmith.sources.find import load_source
from oddsmith.sources.records import FileRecords, find_damage
from oddsmith.sources.stream import RecordStream

ROWS = [{"prompt": f"q{i}", "chosen": f"good {i} é", "rejected": f"bad {i}"} for i in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def fields(path):
    return [record.fields for record in FileRecords(path)]


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", b"\xef\xbb\xbf" + LINES),
        ("a.json", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:200], mtime=0) + gzip.compress(LINES[200:], mtime=0)),
        ("a.ndjson.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", b"\n" + json.dumps(ROWS, indent=1).encode() + b"\n\n"),
        ("a.json.gz", gzip.compress(json.dumps(ROWS, indent=1).encode(), mtime=0)),
    ],
)
def test_json_files(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert fields(path) == ROWS
    records = FileRecords(path)
    list(records)
    assert records.done == records.size == len(content)
    assert find_damage([path]) is None


def test_lines_are_numbered_as_in_an_editor(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n   \n{"a": 2}')
    assert [record.where for record in FileRecords(path)] == [f"{path} line 1", f"{path} line 4"]
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a":\n2}, {"a": 3}\n]')
    assert [record.number for record in FileRecords(path)] == [2, 3, 4]


def test_a_long_array_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("oddsmith.sources.json_records._CHUNK", 5)
    rows = [{"text": "x" * size, "list": [1.25, [], {"k": "\\ué"}]} for size in (0, 3, 400, 1)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    assert fields(path) == rows


def test_parquet_and_saved_datasets(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet", batch_size=3)
    assert fields(tmp_path / "a.parquet") == ROWS
    assert [r.number for r in FileRecords(tmp_path / "a.parquet")] == [1, 2, 3, 4, 5, 6, 7]
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert fields(tmp_path / "b.parquet.gz") == ROWS
    parts = DatasetDict(train=Dataset.from_list(ROWS[:1]), test=Dataset.from_list(ROWS))
    parts.save_to_disk(tmp_path / "saved", num_shards={"train": 1, "test": 3})
    for split, rows in (("test", ROWS), (None, ROWS[:1])):
        stream = RecordStream(str(tmp_path / "saved"), split=split)
        assert [record.fields for record in stream] == rows


# ---- Damage ----


@pytest.mark.parametrize(
    ("content", "number", "problem"),
    [
        (LINES[:-1] + b"x\n", 7, "not JSON: Extra data at column "),
        (LINES[:-20], 7, "the file ends in the middle of it"),
        (LINES.replace(b"good 2", b'good "2', 1), 3, "not JSON: Expecting ',' delimiter at column"),
        (b'{"a": 1}\n[1]\n', 2, "a list; must be a JSON object"),
        (b'{"a": 1}\nnull\n', 2, "a NoneType; must be a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8: invalid start byte at byte 8"),
        (b'{"a":' + b"[" * 100_000 + b"\n", 1, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(content, number, problem, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    records = list(FileRecords(path))
    bad = [record for record in records if record.problem is not None]
    assert [record.number for record in bad] == [number]
    assert bad[0].fields is None and problem in bad[0].problem
    assert len(records) == content.count(b"\n") + (not content.endswith(b"\n"))
    assert find_damage([path]).startswith(f"{path} line {number}: ")


@pytest.mark.parametrize(
    ("suffix", "opener", "least"),
    # bzip2 has no output before a full block of 900 kB.
    [
        (".gz", gzip.compress, 1200),
        (".bz2", bz2.compress, 1),
        (".xz", lzma.compress, 1200),
        (".zst", zstd, 1200),
    ],
)
def test_a_cut_off_archive_names_the_line(suffix, opener, least, tmp_path):
    # Lines that do not compress, so that the cut is after some of them.
    rng = random.Random(3)
    lines = [json.dumps({"a": rng.randbytes(200).hex()}) + "\n" for _ in range(2000)]
    path = tmp_path / f"a.jsonl{suffix}"
    packed = opener("".join(lines).encode())
    path.write_bytes(packed[: len(packed) * 3 // 4])
    # Some decompressors stop without an error: then the last line is a fragment.
    damage = find_damage([path])
    assert damage is not None
    number = int(damage.split(" line ")[1].split(":")[0])
    assert least <= number <= 1501


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n{"a": 1},\n{"a": 2', "line 3: not JSON: the file is cut off"),
        ('[\n{"a": 1},\n', "the file is cut off: the array has no end"),
        ('[\n{"a": 1},\n{"a" 2}, {"a": 3}\n]' + " " * 99, "line 3: not JSON: Expecting ':'"),
        ('[\n{"a": 1},\n{"a": "x\n', "line 3: not JSON: "),
    ],
)
def test_a_damaged_array(text, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match="a.json line 3: ") as error:
        fields(path)
    assert words in str(error.value)


def test_a_value_of_an_array_that_is_no_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n 7]')
    assert [record.problem for record in FileRecords(path)] == [
        None,
        "a int; must be a JSON object",
    ]


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = pa.table({"a": [f"text {i} {i * i}" for i in range(3000)]})
    pq.write_table(rows, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    whole = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    for place in range(second + 40, second + 400):
        whole[place] ^= 0xFF
    path.write_bytes(whole)
    seen = []
    with pytest.raises(UserError, match=r"a.parquet rows 1001 to 2000 \(row group 2 of 3\): "):
        for record in FileRecords(path):
            seen.append(record.number)
    assert seen == list(range(1, 1001))
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match="a.parquet: not a complete parquet file: "):
        fields(path)


# ---- Files for `oddsmith train` ----


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", LINES + b'{"chosen": "x"', "a.jsonl line 8: not JSON: "),
        ("a.jsonl", LINES[:90] + b"\n" + LINES, "a.jsonl line 2: not JSON: "),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "a.jsonl.gz line "),
        ("a.json", b'[\n{"chosen": "x"},\n{"chosen"', "a.json line 3: not JSON: "),
        ("a.parquet", b"PAR1 no more", "a.parquet: not a complete parquet file: "),
    ],
)
def test_training_names_file_and_line_too(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read: ") as error:
        load_source(str(path))
    assert words in str(error.value)
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / name)
    with pytest.raises(UserError) as error:
        load_source(str(folder))
    assert words in str(error.value)
