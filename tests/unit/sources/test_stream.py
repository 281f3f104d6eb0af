"""Rows of a dataset one by one: splits, folders, the hub."""

import pytest
from datasets import Dataset

from oddsmith.errors import UserError
from oddsmith.sources.stream import RecordStream, choose_split

ROWS = [{"prompt": f"q{i}", "chosen": f"good {i} é", "rejected": f"bad {i}"} for i in range(7)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_stream_takes_the_split_that_training_would(tmp_path):
    for name, rows in (("train_prefs", ROWS[:2]), ("train_sft", ROWS[2:3]), ("test", ROWS[3:])):
        Dataset.from_list(rows).to_json(tmp_path / f"{name}.jsonl")
    (tmp_path / "pairs.summary.json").write_text("{}")
    assert [record.fields for record in RecordStream(str(tmp_path))] == ROWS[:2]
    stream = RecordStream(str(tmp_path), split="test")
    assert [record.fields for record in stream] == ROWS[3:]
    assert stream.done == stream.size > 0
    with pytest.raises(
        UserError, match="--split is 'tset'; dataset .* has test, train_prefs, train"
    ):
        RecordStream(str(tmp_path), split="tset")
    (tmp_path / "train_prefs.jsonl").unlink()
    (tmp_path / "train_sft.jsonl").rename(tmp_path / "dev.jsonl")
    with pytest.raises(UserError, match="has the splits dev, test; name the one"):
        RecordStream(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        RecordStream(str(tmp_path / "none.jsonl"))


def test_a_hub_dataset_is_streamed(monkeypatch):
    asked = []

    def load(name, config, streaming):
        asked.append((name, config, streaming))
        return {"test": ROWS, "train": ROWS[:2]}

    monkeypatch.setattr("oddsmith.sources.stream.load_dataset", load)
    stream = RecordStream("owner/name", "en")
    assert asked == [("owner/name", "en", True)]
    assert [record.where for record in stream] == ["owner/name row 1", "owner/name row 2"]
    assert stream.size is None


def test_a_failing_hub_says_after_which_row(monkeypatch):
    def rows():
        yield ROWS[0]
        raise ConnectionError("gone\nsecond line")

    monkeypatch.setattr("oddsmith.sources.stream.load_dataset", lambda *a, **k: {"train": rows()})
    with pytest.raises(UserError, match="dataset owner/name after row 1: gone$"):
        list(RecordStream("owner/name"))


def test_a_cut_off_saved_dataset(tmp_path):
    Dataset.from_list(ROWS * 500).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-9000])
    with pytest.raises(UserError, match=r"\.arrow after row \d+: damaged or cut off: "):
        list(RecordStream(str(tmp_path / "saved")))


@pytest.mark.parametrize(
    ("splits", "wanted", "chosen"),
    [
        (["train", "test"], None, "train"),
        (["test", "train", "train_prefs"], None, "train_prefs"),
        (["odd"], None, "odd"),
        (["train", "test"], "test", "test"),
    ],
)
def test_the_split_to_read(splits, wanted, chosen):
    assert choose_split("mine", iter(splits), wanted) == chosen
