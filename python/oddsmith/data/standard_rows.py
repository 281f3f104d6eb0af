"""Brings a dataset into the form that is tokenised: the rows it shows, in the trainer's columns."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.features import Value
from transformers.utils import logging

from .chat import TEXT_FIELDS, is_messages
from .layouts import Layout, as_messages, find_layout, mapped_layout
from .pictures import IMAGE_COLUMNS, closed_pictures

__all__ = ["first_rows", "has_transform", "shown_rows", "standard_rows", "unused_text"]

logger = logging.get_logger(__name__)

# Rows by which the layout of a dataset is recognised.
_LOOKED_AT = 32
# Columns besides the texts that the trainer reads.
_READ = ("tools", "chat_template_kwargs", *IMAGE_COLUMNS)


def shown_rows(dataset: Any, name: str = "train_dataset") -> Any:
    """
    The rows that a dataset shows: with the transform of `with_transform`, and only the columns of
    its format.

    Args:
        dataset (`Dataset` or `IterableDataset`): Any dataset; a stream has no transform.
        name (`str`, *optional*): Name of the dataset in the progress bar.
    """
    if not isinstance(dataset, Dataset):
        return dataset.with_format(None) if isinstance(dataset, IterableDataset) else dataset
    form = dataset.format
    if has_transform(dataset):
        # map hands the transformed rows to its function, and would keep the stored columns.
        shown = dataset.map(
            _as_dict,
            batched=True,
            remove_columns=dataset.column_names,
            load_from_cache_file=False,
            desc=f"Transforming {name}",
        )
        return shown.with_format(None)
    if not form["output_all_columns"] and set(form["columns"]) != set(dataset.column_names):
        dataset = dataset.select_columns(form["columns"])
    return dataset if dataset.format["type"] is None else dataset.with_format(None)


def has_transform(dataset: Any) -> bool:
    """Whether `with_transform` or `set_transform` makes the rows that a dataset shows."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _as_dict(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {column: batch[column] for column in batch}


def first_rows(dataset: Any, count: int = _LOOKED_AT) -> list[dict[str, Any]]:
    """Some rows without their pictures: spread over a `Dataset`, the first ones of a stream."""
    pictures = [name for name in IMAGE_COLUMNS if name in (dataset.column_names or ())]
    if pictures and not has_transform(dataset):  # opening them takes time
        dataset = dataset.remove_columns(pictures)
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            return []
        places = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()
        return [dict(row) for row in dataset.select(places)]
    return [dict(row) for row in islice(iter(dataset), count)]


def standard_rows(dataset: Any, mapping: Mapping[str, str], name: str = "train_dataset") -> Any:
    """
    The dataset with its pairs in `prompt`, `chosen` and `rejected`.

    Columns of other names are recognised by [`find_layout`], which one line of the log says, or
    named by the user. A dataset that has the trainer's columns is returned as it is; so is one that
    is not recognised.

    Args:
        dataset (`Dataset` or `IterableDataset`): From [`shown_rows`].
        mapping (`Mapping[str, str]`): The user's names, from
            [`~oddsmith.data.layouts.parse_column_mapping`].
        name (`str`, *optional*): Name of the dataset in errors and in the log.

    Raises:
        ValueError: If the mapping names a column that does not exist, or several columns could be
            the prompt.
    """
    rows = first_rows(dataset)
    if not rows:
        return dataset
    if mapping:
        columns = dataset.column_names or list(dict.fromkeys(key for row in rows for key in row))
        layout = mapped_layout(mapping, columns, name)
        others = {column: target for column, target in mapping.items() if target in _READ}
        dataset = _renamed(dataset, others, columns)
    else:
        layout = find_layout(rows, what=name)
        if layout is None:
            return dataset
        if str(layout):
            logger.warning(f"{name}: {layout}; column_mapping names other columns.")
    if layout.is_plain and not any(_has_other_messages(row) for row in rows):
        return dataset
    if _only_renames(dataset, layout):
        return _renamed(dataset, layout.renames, dataset.column_names)
    read = [column for column in layout.sources if column in (dataset.column_names or rows[0])]
    options: dict[str, Any] = {"remove_columns": read}
    if isinstance(dataset, Dataset):
        options["desc"] = f"Reading {name}"
    features = dataset.features
    if isinstance(dataset, Dataset):  # map would open pictures, and compress them again
        dataset = closed_pictures(dataset)
    made = dataset.map(partial(_pair_of, layout=layout), **options)
    for name in IMAGE_COLUMNS:
        if isinstance(made, Dataset) and made.features.get(name) != features.get(name):
            made = made.cast_column(name, features[name])
    return made


def _pair_of(row: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    return layout.row(row)


def _has_other_messages(row: Mapping[str, Any]) -> bool:
    """Whether messages are alone, or have the keys of ShareGPT."""
    return any(as_messages(row.get(name)) != row.get(name) for name in TEXT_FIELDS)


def _only_renames(dataset: Any, layout: Layout) -> bool:
    if not isinstance(dataset, Dataset) or len(layout.prompt) > 1:
        return False
    if layout.system is not None or layout.history is not None:
        return False
    kinds = [dataset.features.get(name) for name in layout.sources]
    return all(isinstance(kind, Value) and "string" in str(kind.dtype) for kind in kinds)


def _renamed(dataset: Any, names: Mapping[str, str], columns: Sequence[str]) -> Any:
    names = {old: new for old, new in names.items() if old != new and old in columns}
    replaced = [new for new in names.values() if new in columns and new not in names]
    dataset = dataset.remove_columns(replaced) if replaced else dataset
    return dataset.rename_columns(names) if names else dataset


def unused_text(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """
    Columns with text that is in none of the columns that the trainer reads.

    Text is messages, or strings of several words; names of sources and the like are not text.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): Some rows of the dataset.
    """
    found = []
    for column in dict.fromkeys(name for row in rows for name in row):
        if column in TEXT_FIELDS or column in _READ:
            continue
        known = [row for row in rows if row.get(column)]
        texts = sum(_is_text(row[column]) for row in known)
        if not known or 2 * texts <= len(known):
            continue
        if any(_text(row[column]) not in _used(row) for row in known):
            found.append(column)
    return tuple(found)


def _is_text(value: Any) -> bool:
    return len(value.split()) > 1 if isinstance(value, str) else is_messages(as_messages(value))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    messages = as_messages(value)
    return str(messages[-1].get("content")).strip() if is_messages(messages) else ""


def _used(row: Mapping[str, Any]) -> str:
    parts = []
    for name in TEXT_FIELDS:
        value = row.get(name)
        messages = value if is_messages(value) else [{"content": value}]
        parts += [str(message.get("content")) for message in messages]
    return "\n".join(parts)
