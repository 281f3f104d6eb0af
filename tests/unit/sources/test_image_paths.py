"""Relative paths of pictures start at the folder of their data file."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value

from oddsmith.data.pictures import IMAGE_COLUMNS
from oddsmith.errors import UserError
from oddsmith.sources.find import load_source
from oddsmith.sources.image_paths import COLUMNS, located
from oddsmith.sources.stream import RecordStream

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**ROW, **row}) + "\n" for row in rows))
    return path


def test_the_columns_are_those_of_the_trainer():
    assert COLUMNS == IMAGE_COLUMNS


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.png", "/data/a.png"),
        (["a.png", "sub/b.png"], ["/data/a.png", "/data/sub/b.png"]),
        ([{"path": "a.png", "bytes": None}], [{"path": "/data/a.png", "bytes": None}]),
        ([{"path": "a.png", "bytes": b"x"}], [{"path": "a.png", "bytes": b"x"}]),
        (["/elsewhere/a.png", "http://host/a.png"], ["/elsewhere/a.png", "http://host/a.png"]),
        ([], []),
        (None, None),
    ],
)
def test_forms(value, expected):
    for name in COLUMNS:
        assert located({**ROW, name: value}, Path("/data"), "x") == {**ROW, name: expected}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "."])
def test_from_files(tmp_path, monkeypatch, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = [{"images": ["a.png", str(tmp_path / "b.png")]}, {"images": []}]
    if name == "rows.parquet":
        kinds = {**dict.fromkeys(ROW, Value("string")), "images": List(Value("string"))}
        full = [{**ROW, **row} for row in rows]
        Dataset.from_list(full, features=Features(kinds)).to_parquet("data/rows.parquet")
    else:
        write(tmp_path / "data/rows.jsonl", *rows)
    expected = [[str(tmp_path / "data/a.png"), str(tmp_path / "b.png")], []]
    assert load_source(f"data/{name}")["train"]["images"][:] == expected
    assert [record.fields["images"] for record in RecordStream(f"data/{name}")] == expected


def test_files_in_several_folders(tmp_path):
    write(tmp_path / "one/train-1.jsonl", {"image": "/x/a.png"})
    write(tmp_path / "two/train-2.jsonl", {"image": "/x/b.png"})
    assert load_source(str(tmp_path))["train"]["image"][:] == ["/x/a.png", "/x/b.png"]
    write(tmp_path / "two/train-2.jsonl", {"image": "b.png"})
    with pytest.raises(
        UserError, match=r"'b.png' of a picture is relative, and the data files are"
    ):
        load_source(str(tmp_path))
    # Read one by one, each file is known.
    found = [record.fields["image"] for record in RecordStream(str(tmp_path))]
    assert found == ["/x/a.png", str(tmp_path / "two/b.png")]


def test_a_saved_dataset_is_read_as_it_is(tmp_path):
    Dataset.from_list([{**ROW, "image": "a.png"}]).save_to_disk(tmp_path / "saved")
    assert load_source(str(tmp_path / "saved"))["train"]["image"][:] == ["a.png"]
    (record,) = RecordStream(str(tmp_path / "saved"))
    assert record.fields["image"] == "a.png"
