"""The pictures of a row: found in its columns, opened from any form that datasets give them."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, IterableDataset

# One of the two holds the pictures of a row: a list, or one.
IMAGE_COLUMNS = ("images", "image")
# Inputs of other kinds, which are not supported.
OTHER_COLUMNS = ("video", "videos", "audio", "audios")


def has_pictures(dataset: Any) -> bool:
    """
    Whether rows have a column `images` or `image` with anything in it.

    Args:
        dataset (`Dataset`, `IterableDataset`, a `dict` of them or None): Not yet prepared.
    """
    return picture_column(dataset) is not None


def picture_column(dataset: Any) -> str | None:
    """The column that holds the pictures of rows; None if there is none."""
    if isinstance(dataset, Mapping):
        return next(filter(None, map(picture_column, dataset.values())), None)
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return None
    columns = columns_of(dataset)
    for name in IMAGE_COLUMNS:
        if name in columns:
            kind = None if dataset.features is None else dataset.features.get(name)
            if not _is_empty(kind) and not _is_empty(getattr(kind, "feature", None)):
                return name
    return None


def _is_empty(kind: Any) -> bool:
    return getattr(kind, "dtype", None) == "null"  # no row has a value


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """
    The columns that a dataset shows; those of the first row if it has a transform, or is a stream
    that does not know them.
    """
    if isinstance(dataset, Dataset):
        form = dataset.format
        if form["type"] == "custom":
            return list(dataset[0]) if len(dataset) else []
        if not form["output_all_columns"]:
            return list(form["columns"])
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset.with_format(None)), {}))


def closed_pictures(dataset: Dataset) -> Dataset:
    """The dataset with pictures as they are stored, bytes or a path, where it would open them."""
    for name in IMAGE_COLUMNS:
        kind: Any = dataset.features.get(name)
        if isinstance(kind, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), Image):
            dataset = dataset.cast_column(name, type(kind)(Image(decode=False)))
    return dataset


def row_pictures(row: Mapping[str, Any], where: str) -> list[Any]:
    """
    The pictures of a row, opened.

    Args:
        row (`Mapping[str, Any]`): With `images`, a list or None, or `image`, one or None.
        where (`str`): Names the row in errors.

    Raises:
        ValueError: If a picture cannot be opened; the message names the row.
        ImportError: If Pillow is needed and not installed.
    """
    if row.get("images") is not None:
        listed = row["images"]
        if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
            raise ValueError(
                f"{where}: images is a {type(listed).__name__}; must be a list of pictures (a "
                "column with one picture is named image)"
            )
        name = "images[{}]"
    else:
        listed = [] if row.get("image") is None else [row["image"]]
        name = "image"
    return [
        open_picture(value, f"{where}: {name.format(index)}") for index, value in enumerate(listed)
    ]


def open_picture(value: Any, where: str) -> Any:
    """
    A picture as image processors take it.

    Args:
        value (`Any`):
            A path, a mapping with `bytes` or `path` as `datasets` stores pictures, a Pillow image,
            or an array or tensor of pixels; the last three are returned as they are.
        where (`str`): Names the field in errors.

    Raises:
        ValueError: If it is none of these, or cannot be decoded.
        ImportError: If Pillow is not installed.
    """
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        data, path = value.get("bytes"), value.get("path")
        return _decode(BytesIO(data) if data else path, where)
    if isinstance(value, (str, Path)):
        if str(value).startswith(("http://", "https://")):
            raise ValueError(
                f"{where} is the address {str(value)!r}; download it, and give its path"
            )
        return _decode(value, where)
    if hasattr(value, "shape") or hasattr(value, "getbands"):  # an array, a Pillow image
        return value
    raise ValueError(
        f"{where} is a {type(value).__name__}; must be a picture: a path, the bytes of a file as "
        "{'bytes': ...}, or a Pillow image"
    )


def _decode(file: Any, where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("rows with images need Pillow; pip install 'oddsmith[images]'") from error
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        relative = isinstance(file, (str, Path)) and not Path(file).is_absolute()
        start = f" (relative paths begin at {Path.cwd()})" if relative else ""
        raise ValueError(f"{where} cannot be opened as a picture: {error}{start}") from error
    return picture
