"""Rows are counted once for each state of a file."""

import json
import os
from types import SimpleNamespace

import pytest

from oddsmith.errors import UserError
from oddsmith.sources import find, row_count
from oddsmith.sources.row_count import count_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps({"prompt": f"p{number}"}) + "\n" for number in range(rows)))
    return path


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path, monkeypatch):
    files = [write(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", 4)]
    assert count_rows(files) == 7
    read = []
    count = row_count._count
    monkeypatch.setattr(row_count, "_count", lambda f, bar: read.append(f.path) or count(f, bar))
    assert count_rows(files) == 7 and not read
    write(files[0], 5)
    assert count_rows(files) == 9 and read == files[:1]
    os.utime(files[1], (1, 1))
    assert count_rows(files) == 9 and read == files


def test_a_damaged_file_is_never_taken_for_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n{"prompt"')
    for _ in range(2):
        with pytest.raises(UserError, match="a.jsonl line 2: not JSON"):
            count_rows([path])


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", blocked / "cache")
    assert count_rows([write(tmp_path / "a.jsonl", 3)]) == 3


def test_rows_that_datasets_leaves_out_are_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", 3)
    monkeypatch.setattr(find, "load_dataset", lambda *args, **options: [SimpleNamespace()] * 2)
    with pytest.raises(UserError, match="it has 3 rows, of which datasets reads 2"):
        find.load_source(str(path))
