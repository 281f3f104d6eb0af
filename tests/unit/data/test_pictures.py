"""Pictures of a row: their column, their forms, and what cannot be opened."""

from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset, Features, Value

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith.data.pictures import (
    columns_of,
    has_pictures,
    open_picture,
    picture_column,
    row_pictures,
)
from support.image_models import image_pairs, picture

TEXT = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}


def test_which_datasets_have_pictures():
    rows = image_pairs(2)
    assert has_pictures(rows)
    assert has_pictures(rows.to_iterable_dataset())
    assert has_pictures({"a": Dataset.from_dict(TEXT), "b": rows})
    assert has_pictures(Dataset.from_dict({**TEXT, "image": [picture(1)]}))
    assert not has_pictures(Dataset.from_dict(TEXT))
    assert not has_pictures(None)


@pytest.mark.parametrize("column", [[None], [[]]])
def test_a_column_without_any_value_has_none(column):
    assert not has_pictures(Dataset.from_dict({**TEXT, "images": column}))


def test_columns_of_a_stream_that_does_not_know_them():
    stream = Dataset.from_dict(TEXT).to_iterable_dataset().map(lambda row: {**row, "image": "x"})
    assert stream.column_names is None
    assert "image" in columns_of(stream)


def test_every_form(tmp_path):
    expected = picture(1)
    expected.save(tmp_path / "a.png")
    data = BytesIO()
    expected.save(data, "PNG")
    forms = [
        expected,
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        {"bytes": data.getvalue(), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        np.asarray(expected),
    ]
    for form in row_pictures({"images": forms}, "row 0"):
        assert np.array_equal(np.asarray(form), np.asarray(expected))
    assert row_pictures({"image": expected, "images": None}, "row 0") == [expected]
    assert row_pictures({"image": None}, "row 0") == []
    assert row_pictures({}, "row 0") == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://a.b/c.png", "row 3: image is the address .*download it"),
        ("nowhere.png", "row 3: image cannot be opened"),
        ({"bytes": b"text"}, "row 3: image cannot be opened"),
        ({"bytes": None}, "row 3: image is a dict; must be a picture"),
        (7, "row 3: image is a int; must be a picture"),
    ],
)
def test_what_cannot_be_opened(value, message):
    with pytest.raises(ValueError, match=message):
        row_pictures({"image": value}, "row 3")


def test_images_must_be_a_list():
    with pytest.raises(ValueError, match="row 3: images is a str; must be a list"):
        row_pictures({"images": "a.png"}, "row 3")


def test_without_pillow(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'oddsmith\[images\]'"):
        open_picture(str(tmp_path / "a.png"), "row 0: image")


def test_features_tell_without_reading(tmp_path):
    features = Features({name: Value("string") for name in ("chosen", "rejected", "image")})
    rows = Dataset.from_dict({"chosen": [], "rejected": [], "image": []}, features=features)
    assert has_pictures(rows)


def test_columns_that_a_dataset_shows():
    rows = Dataset.from_list([{"path": "a.png", "images": ["b.png"], "chosen": "c"}])
    assert picture_column(rows.with_format("torch", columns=["chosen"])) is None
    made = rows.with_transform(lambda batch: {"image": batch["path"]})
    assert picture_column(made) == "image"
    assert picture_column(rows.with_transform(lambda batch: {"chosen": batch["chosen"]})) is None
