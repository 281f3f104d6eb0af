"""Paths of pictures in data files: relative ones start at the folder of their file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import UserError

__all__ = ["COLUMNS", "LocatedPictures", "located"]

#: Columns with the pictures of a row.
COLUMNS = ("images", "image")


def located(row: Mapping[str, Any], folder: Path | None, where: str) -> dict[str, Any]:
    """
    A row whose pictures have paths that do not depend on the working directory, as `datasets` reads
    a folder of images.

    Args:
        row (`Mapping[str, Any]`): As it is in a file; pictures are paths, or mappings with `path`.
        folder (`Path`, *optional*): The folder of the file; None if it is not known.
        where (`str`): Names the row in errors.

    Raises:
        UserError: If a path is relative and the folder is not known.
    """
    found = {name: _located(row[name], folder, where) for name in COLUMNS if row.get(name)}
    return {**row, **found}


def _located(value: Any, folder: Path | None, where: str) -> Any:
    if isinstance(value, list):
        return [_located(each, folder, where) for each in value]
    if isinstance(value, Mapping):
        if value.get("bytes") or not isinstance(value.get("path"), str):
            return value  # the path of such a picture is only a name
        return {**value, "path": _located(value["path"], folder, where)}
    if not isinstance(value, str) or "://" in value or Path(value).expanduser().is_absolute():
        return value
    if folder is None:
        raise UserError(
            f"{where}: the path {value!r} of a picture is relative, and the data files are in "
            "several folders; use absolute paths, or name one file"
        )
    return str(folder / value)


class LocatedPictures:
    """
    [`located`] for all rows of a dataset; a class, so that other processes can call it.

    Args:
        folders (`set[Path]`): The folders of the data files.
        name (`str`): Names the dataset in errors.
    """

    def __init__(self, folders: set[Path], name: str):
        self._folder = folders.pop().absolute() if len(folders) == 1 else None
        self._name = name

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return located(row, self._folder, f"dataset {self._name}")

    def of(self, dataset: Dataset) -> Dataset:
        """The dataset; unchanged if it has no paths of pictures."""
        kinds = [str(dataset.features[name]) for name in COLUMNS if name in dataset.features]
        # What datasets stores as pictures has its bytes.
        if not any("string" in kind and "Image(" not in kind for kind in kinds):
            return dataset
        return dataset.map(self, features=dataset.features, desc="Locating pictures")
