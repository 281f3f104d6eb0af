"""Datasets from files and folders, and the choice of splits."""

import gzip
import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from oddsmith.errors import UserError
from oddsmith.sources.find import check_rows, file_kind, is_path, load_pairs, load_source

ROWS = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
TEST_ROWS = ROWS[:2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def ask(dataset, **names):
    """Arguments of a run with only the given names."""
    absent = dict.fromkeys(
        ("dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset_name")
    )
    return SimpleNamespace(dataset_name=str(dataset), max_line_mb=64, **{**absent, **names})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz", "rows.JSON"])
def test_json_files(name, tmp_path):
    path = write_jsonl(tmp_path / name, ROWS, gzip.open if name.endswith(".gz") else open)
    splits = load_source(str(path))
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == ROWS


def test_a_json_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert load_source(str(path))["train"].to_list() == ROWS


def test_a_parquet_file(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert load_source(str(tmp_path / "rows.parquet"))["train"].to_list() == ROWS


def test_saved_datasets(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load_source(str(tmp_path / "one"))["train"].to_list() == ROWS
    DatasetDict(
        train_prefs=Dataset.from_list(ROWS), test_prefs=Dataset.from_list(TEST_ROWS)
    ).save_to_disk(tmp_path / "two")
    splits = load_source(str(tmp_path / "two"))
    assert {name: len(split) for name, split in splits.items()} == {
        "train_prefs": 5,
        "test_prefs": 2,
    }


def test_a_folder_of_files_named_after_their_splits(tmp_path):
    write_jsonl(tmp_path / "data" / "train_prefs-00000-of-00002.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "data" / "train_prefs-00001-of-00002.jsonl", ROWS[3:])
    write_jsonl(tmp_path / "data" / "train_sft.jsonl", [{"messages": "m"}])
    write_jsonl(tmp_path / "data" / "test.jsonl.gz", TEST_ROWS, gzip.open)
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    (tmp_path / "data" / "README.md").write_text("about")
    splits = load_source(str(tmp_path / "data"))
    assert {name: len(split) for name, split in splits.items()} == {
        "train_prefs": 5,
        "train": 1,
        "test": 2,
    }
    assert splits["train_prefs"].to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "json"),
        ("a.json.gz", "json"),
        ("a.b.parquet", "parquet"),
        ("a.gz", None),
        ("a.csv", None),
        ("a", None),
    ],
)
def test_kinds_of_files(name, expected, tmp_path):
    assert file_kind(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", False),
        ("name", False),
        ("./name", True),
        ("/abs/name", True),
        ("~/name", True),
        ("some/where/else", True),
        ("rows.jsonl.gz", True),
        ("dir/", True),
    ],
)
def test_what_can_only_be_a_path(name, expected):
    assert is_path(name) is expected


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"dataset .*none\.jsonl: no such file or folder"):
        load_source(str(tmp_path / "none.jsonl"))
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"files can be \.jsonl, \.json or \.parquet"):
        load_source(str(tmp_path / "rows.csv"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        load_source(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"chosen": \n nonsense')
    with pytest.raises(UserError, match=r"broken\.jsonl cannot be read: .+"):
        load_source(str(tmp_path / "broken.jsonl"))
    (tmp_path / "broken.parquet").write_text("nonsense")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read: .+"):
        load_source(str(tmp_path / "broken.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="the folder has no"):
        load_source(str(tmp_path / "folder"))


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    write_jsonl(tmp_path / "mixed" / "a.jsonl", ROWS)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "mixed" / "b.parquet")
    with pytest.raises(UserError, match="mixes json and parquet"):
        load_source(str(tmp_path / "mixed"))


def test_a_hub_id_without_a_hub(monkeypatch):
    def offline(*args):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr("oddsmith.sources.find.load_dataset", offline)
    with pytest.raises(
        UserError, match="not a local path and cannot be loaded from the hub: Could"
    ):
        load_source("owner/name")


def test_splits_are_found(tmp_path):
    rows = {"train": [{"messages": "m"}], "train_prefs": ROWS, "test_prefs": TEST_ROWS}
    DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()}).save_to_disk(
        tmp_path / "d"
    )
    train, test = load_pairs(ask(tmp_path / "d"), evaluates=True)
    assert train.to_list() == ROWS
    assert test.to_list() == TEST_ROWS
    assert load_pairs(ask(tmp_path / "d"), evaluates=False)[1] is None


def test_named_splits_are_used(tmp_path):
    DatasetDict(
        train=Dataset.from_list(ROWS),
        test=Dataset.from_list(ROWS),
        tiny=Dataset.from_list(ROWS[4:]),
    ).save_to_disk(tmp_path / "d")
    train, test = load_pairs(
        ask(tmp_path / "d", dataset_train_split="tiny", dataset_test_split="train"), False
    )
    assert train.to_list() == ROWS[4:]
    assert len(test) == 5
    with pytest.raises(UserError, match="--dataset_train_split is 'tny'; the dataset has train, "):
        load_pairs(ask(tmp_path / "d", dataset_train_split="tny"), False)


def test_a_single_split_is_trained_on(tmp_path):
    DatasetDict(harmless=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "d")
    assert len(load_pairs(ask(tmp_path / "d"), False)[0]) == 5
    DatasetDict(a=Dataset.from_list(ROWS), b=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "e")
    with pytest.raises(UserError, match="has the splits a, b; name the one"):
        load_pairs(ask(tmp_path / "e"), False)


def test_evaluation_rows_from_elsewhere(tmp_path):
    train_file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    test_file = write_jsonl(tmp_path / "held_out.jsonl", TEST_ROWS)
    _, test = load_pairs(ask(train_file, eval_dataset_name=str(test_file)), False)
    assert test.to_list() == TEST_ROWS
    with pytest.raises(UserError, match="--eval_strategy needs rows to evaluate on"):
        load_pairs(ask(train_file), evaluates=True)


def test_no_rows():
    with pytest.raises(UserError, match="x has no rows"):
        check_rows(Dataset.from_list([]), "x")


def test_other_columns_stay():
    """The trainer can take one for the prompt, and names those with text that it does not use."""
    rows = Dataset.from_list([{**ROWS[0], "question": "a", "score_chosen": 3.0}])
    assert check_rows(rows, "x") is rows
