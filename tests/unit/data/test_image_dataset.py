"""Datasets of rows with images: the checks before training, and dropped rows."""

from io import BytesIO

import pytest
import torch
from datasets import Dataset, DatasetDict, Image, List

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith.data.image_dataset import peek, prepare_image_dataset
from oddsmith.data.image_rows import ImageRows
from oddsmith.data.rows import RowBuilder
from support.image_models import image_model, image_pairs, picture


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
        assert rows.builder.notes["train_dataset"].overlength == 8 - sum(fits)


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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mapping", [{}, {"frage": "prompt"}])
def test_columns_of_other_names(stream, mapping):
    rows = image_pairs(4)
    named = rows.rename_column("prompt", "frage" if mapping else "question")
    given = named.to_iterable_dataset() if stream else named
    made = prepare_image_dataset(given, rows_of(), column_mapping=mapping)
    assert peek(made, rows_of(), "x").rows == peek(rows, rows_of(), "x").rows
    assert peek(made, rows_of(), "x").images == [1, 2, 0, 1]


@pytest.mark.parametrize("name", ["image", "images"])
def test_renaming_leaves_pictures_as_they_are_stored(name):
    """JPEG would lose pixels each time it is written."""
    data = BytesIO()
    picture(1, 40, 30).save(data, "JPEG", quality=30)
    stored = {"bytes": data.getvalue(), "path": None}
    question = [{"role": "user", "content": "a"}]
    value = stored if name == "image" else [stored]
    row = {"question": question, "chosen": "b", "rejected": "c", name: value}
    kind = Image() if name == "image" else List(Image())
    dataset = Dataset.from_list([row] * 2).cast_column(name, kind)
    made = prepare_image_dataset(dataset, rows_of())
    assert made.features[name] == kind and made[0]["prompt"] == question
    assert made.with_format("arrow")[:][name].to_pylist() == [value] * 2


def test_a_transform_is_applied_whenever_a_row_is_read():
    rows = image_pairs(4)
    other = [picture(90), picture(91)]
    shown = rows.with_transform(
        lambda batch: {
            **{name: batch[name] for name in ("prompt", "chosen", "rejected")},
            "images": [other[: len(images)] for images in batch["images"]],
        }
    )
    made = prepare_image_dataset(shown, rows_of())
    assert made[1]["images"] == other
    batch = peek(made, rows_of(), "x")
    expected = rows_of().build(
        [{**row, "images": other[: len(row["images"])]} for row in rows], ["x"] * 4
    )
    assert batch.rows == expected.rows
    assert torch.equal(batch.inputs["pixel_values"], expected.inputs["pixel_values"])
    with pytest.raises(ValueError, match="images and a transform, whose columns are not renamed"):
        prepare_image_dataset(shown, rows_of(), column_mapping={"q": "prompt"})
    without = shown.with_transform(lambda batch: {"images": batch["images"]})
    with pytest.raises(ValueError, match="has no column chosen and no column rejected"):
        prepare_image_dataset(without, rows_of())


def test_what_is_noted():
    rows = rows_of()
    dataset = image_pairs(4).add_column("question", ["some words"] * 4)
    prepare_image_dataset(dataset, rows, name="mine")
    assert rows.builder.notes["mine"].unused == ("question",)
    paths = dataset.remove_columns("images").add_column("image", ["a file.png"] * 4)
    prepare_image_dataset(paths, rows, name="paths")
    assert rows.builder.notes["paths"].unused == ("question",)
