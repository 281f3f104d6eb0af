"""Checks a dataset of rows with images before training; the collator makes its tokens."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .dataset import check_type, first_row, notes_of
from .image_rows import ImageBatch, ImageRows
from .notes import RowNotes
from .pictures import OTHER_COLUMNS, columns_of
from .standard_rows import has_transform, shown_rows, standard_rows

logger = logging.get_logger(__name__)

# Rows whose images are opened before training: for faults, and for the report.
PEEKED_IMAGE_ROWS = 16


def prepare_image_dataset(
    dataset: Any,
    rows: ImageRows,
    *,
    num_proc: int | None = None,
    overlength: str = "truncate",
    name: str = "train_dataset",
    column_mapping: Mapping[str, str] | None = None,
) -> Any:
    """
    Check the columns of a dataset of rows with images, and drop rows that are too long if asked to.

    Only columns of other names are brought into those of the trainer, because tokens and pixel
    values are made in the collator. A transform of `with_transform` is applied whenever a row is
    read, so it has to make the trainer's columns.

    Args:
        dataset (`Dataset`, `IterableDataset` or a `dict` of them):
            Rows with `chosen`, `rejected`, `prompt` unless it is implicit, and `images` or `image`.
        rows ([`ImageRows`]):
            Makes the rows.
        num_proc (`int`, *optional*):
            Processes that look for rows to drop.
        overlength (`str`, *optional*, defaults to `"truncate"`):
            `"drop"` removes rows that are too long. All images are opened for that, once.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in errors and in the log.
        column_mapping (`Mapping[str, str]`, *optional*):
            Names of columns, such as `{"question": "prompt"}`.

    Returns:
        The same kind as `dataset`.

    Raises:
        TypeError: If `dataset` is of another type.
        ValueError: If a column is missing, or is one of videos or audio, or if columns of a dataset
            with a transform are to be renamed.
    """
    if isinstance(dataset, dict):
        return type(dataset)(
            {
                key: prepare_image_dataset(
                    part,
                    rows,
                    num_proc=num_proc,
                    overlength=overlength,
                    name=f"{name}[{key!r}]",
                    column_mapping=column_mapping,
                )
                for key, part in dataset.items()
            }
        )
    check_type(dataset, name)
    if not has_transform(dataset):
        dataset = standard_rows(shown_rows(dataset, name), column_mapping or {}, name)
    elif column_mapping:
        raise ValueError(
            f"{name} has images and a transform, whose columns are not renamed; make the columns "
            "prompt, chosen and rejected in the transform, and remove column_mapping"
        )
    first_row(dataset, name)
    notes = RowNotes() if has_transform(dataset) else notes_of(dataset)
    rows.builder.notes[name] = notes
    others = [column for column in OTHER_COLUMNS if column in columns_of(dataset)]
    if others:
        raise ValueError(
            f"{name} has a column {others[0]}, and only images are supported; remove it with "
            f"dataset.remove_columns({others[0]!r})"
        )
    if overlength == "drop":
        before = len(dataset) if isinstance(dataset, Dataset) else None
        options = {} if before is None else {"num_proc": num_proc, "desc": f"Measuring {name}"}
        dataset = dataset.filter(_Fits(rows, name), **options)
        if before is not None:
            count = before - len(dataset)
            share = f"{name}: {count} of {before} rows ({count / before:.1%})"
            limit = f"max_length {rows.builder.max_length}"
            notes.overlength = count
            if count == before:
                raise ValueError(f"{share} are longer than {limit}; overlength='drop' removes all")
            if count:
                logger.warning(f"{share} are longer than {limit}: dropped.")
    return dataset


def peek(dataset: Dataset | IterableDataset, rows: ImageRows, name: str) -> ImageBatch:
    """
    The first rows of a dataset.

    Raises:
        ValueError: If one is faulty; the message has its number. If all have no completion tokens
            within `max_length`.
    """
    shown = dataset if has_transform(dataset) else dataset.with_format(None)
    first: list[Mapping[str, Any]] = list(islice(iter(shown), PEEKED_IMAGE_ROWS))
    batch = rows.build(first, [f"{name} row {index}" for index in range(len(first))])
    if not any(label >= 0 for row in batch.rows for label in row["chosen_labels"]):
        raise ValueError(
            f"{name}: the first {len(first)} rows have no completion tokens within max_length "
            f"{rows.builder.max_length}; raise max_length, or make the images smaller in the "
            "processor"
        )
    return batch


class _Fits:
    """Whether a row is short enough; a class, so that other processes can call it."""

    def __init__(self, rows: ImageRows, name: str):
        self.rows = rows
        self.name = name

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return self.rows.fits(row, f"{self.name}: a row")
