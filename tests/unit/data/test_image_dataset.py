"""Datasets of rows with images: the checks before training, and dropped rows."""

import pytest
from datasets import Dataset, DatasetDict

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith.data.image_dataset import peek, prepare_image_dataset
from oddsmith.data.image_rows import ImageRows
from oddsmith.data.rows import RowBuilder
from support.image_models import image_model, image_pairs


def rows_of(max_length=64, max_prompt_length=None):
    _, processor = image_model("llava")
    return ImageRows(processor, RowBuilder(processor.tokenizer, max_length, max_prompt_length))


def test_rows_stay_as_they_are():
    dataset = image_pairs(4)
    assert prepare_image_dataset(dataset, rows_of()) is dataset
    both = prepare_image_dataset(DatasetDict({"a": dataset, "b": dataset}), rows_of())
    assert type(both) is DatasetDict and both["a"] is dataset
    batch = peek(dataset, rows_of(), "train_dataset")
    assert batch.images == [1, 2, 0, 1] and len(batch.rows) == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_prompt_length", [None, 24])
def test_rows_that_are_too_long_are_dropped(caplog, stream, max_prompt_length):
    dataset = image_pairs(8)
    rows = rows_of(40, max_prompt_length)
    given = dataset.to_iterable_dataset() if stream else dataset
    kept = prepare_image_dataset(given, rows, overlength="drop", name="train_dataset")
    fits = [rows.fits(row, "row") for row in dataset]
    assert 0 < sum(fits) < 8
    expected = [row["chosen"] for row, fit in zip(dataset, fits, strict=True) if fit]
    assert [row["chosen"] for row in kept] == expected
    if not stream:
        assert f"{8 - sum(fits)} of 8 rows" in caplog.text and "dropped" in caplog.text
        assert rows.builder.overlength_counts["train_dataset"] == 8 - sum(fits)


def test_all_too_long():
    with pytest.raises(ValueError, match="overlength='drop' removes all"):
        prepare_image_dataset(image_pairs(4), rows_of(8), overlength="drop")
    dataset = image_pairs(2)  # with images, which fill the row
    with pytest.raises(ValueError, match="the first 2 rows have no completion tokens"):
        peek(dataset, rows_of(12), "train_dataset")


def test_a_fault_has_the_number_of_its_row():
    dataset = image_pairs(4).remove_columns("images").add_column("image", ["nowhere.png"] * 4)
    with pytest.raises(ValueError, match="train_dataset row 0: image cannot be opened"):
        peek(dataset, rows_of(), "train_dataset")


def test_columns_are_checked():
    with pytest.raises(ValueError, match="train_dataset has no column rejected"):
        prepare_image_dataset(image_pairs(2).remove_columns("rejected"), rows_of())
    with pytest.raises(ValueError, match="column videos, and only images are supported"):
        prepare_image_dataset(image_pairs(2).add_column("videos", ["a", "b"]), rows_of())
    with pytest.raises(TypeError, match="train_dataset is a list"):
        prepare_image_dataset([{}], rows_of())
    with pytest.raises(ValueError, match="train_dataset is empty"):
        prepare_image_dataset(Dataset.from_dict({"images": []}), rows_of())
