"""Files of pairs: their columns; they appear complete or not at all."""

import gc
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oddsmith.errors import UserError
from oddsmith.prepare.pair import Pair, assistant, user
from oddsmith.prepare.pair_file import PairFile, format_of

SCORED = Pair([user("q é")], [assistant("a")], [assistant("b")], 2.5, None)
TEXT = Pair("q ", "a\u2028", "b")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", ".jsonl"), ("A.JSONL.GZ", ".jsonl.gz"), ("a.b.parquet", ".parquet")],
)
def test_formats(name, kind):
    assert format_of(Path(name)) == kind


@pytest.mark.parametrize("name", ["a.json", "parquet", "a.csv.gz"])
def test_other_formats_are_refused(name, tmp_path):
    with pytest.raises(UserError, match="must end in .jsonl, .jsonl.gz, .parquet"):
        PairFile(tmp_path / name)
    assert not list(tmp_path.iterdir())


def written(path, *pairs):
    with PairFile(path) as file:
        for pair in pairs:
            file.write(pair)
        # It does not exist before it is complete.
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]
    return path


def test_lines_leave_out_scores_that_are_not_there(tmp_path):
    expected = {
        "prompt": [user("q é")], "chosen": [assistant("a")], "rejected": [assistant("b")],
        "score_chosen": 2.5,
    }  # fmt: skip
    path = written(tmp_path / "sub" / "a.jsonl", SCORED, TEXT)
    first, second, end = path.read_text(encoding="utf-8").split("\n")
    assert json.loads(first) == expected and "é" in first and end == ""
    assert json.loads(second) == {"prompt": "q ", "chosen": "a\u2028", "rejected": "b"}
    packed = written(tmp_path / "gz" / "a.jsonl.gz", SCORED, TEXT)
    assert gzip.decompress(packed.read_bytes()) == path.read_bytes()


def test_row_groups_of_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("oddsmith.prepare.pair_file._ROW_GROUP", 2)
    path = written(tmp_path / "a.parquet", *[SCORED] * 5)
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    table = pq.read_table(path)
    assert table.num_rows == 5
    assert table["score_chosen"].to_pylist() == [2.5] * 5
    assert table["score_rejected"].null_count == 5
    assert table["prompt"][4].as_py() == [user("q é")]
    text = pq.read_table(written(tmp_path / "text" / "b.parquet", TEXT))
    assert text.schema.field("chosen").type == pa.string()
    assert text["chosen"].to_pylist() == ["a\u2028"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_an_error_leaves_the_old_file(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), PairFile(path) as file:
        file.write(SCORED)
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_file_has_the_mode_of_other_files(name, tmp_path):
    (tmp_path / "other").touch()
    written(tmp_path / "sub" / name, SCORED)
    mode = (tmp_path / "sub" / name).stat().st_mode
    assert mode == (tmp_path / "other").stat().st_mode


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output .*a.jsonl: "):
        PairFile(tmp_path / "file" / "a.jsonl")


def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match="a.jsonl: .*No space left"),
        PairFile(tmp_path / "a.jsonl") as file,
    ):
        file.write(SCORED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_what_a_full_disk_did_not_take_goes_nowhere(name, tmp_path, monkeypatch):
    """Not into a file that is closed, when the rest is collected: that is a message without a cause."""

    def full(folder):
        return folder / "temporary", open("/dev/full", "wb")

    monkeypatch.setattr("oddsmith.prepare.pair_file.new_file", full)
    with (
        pytest.raises(UserError, match=f"{name}: .*No space left"),
        PairFile(tmp_path / name) as file,
    ):
        file.write(SCORED)
    del file
    gc.collect()
