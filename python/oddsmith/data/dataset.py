"""Prepares a preference dataset: rows of token ids, checked before training starts."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .arrow_rows import prepare_table, sample_texts, text_source
from .chat import TEXT_FIELDS, row_text
from .processor import template_source
from .rows import RowBuilder
from .rust_rows import EMPTY, OVERLENGTH, FastRows, fast_rows_for

__all__ = ["prepare_dataset", "validate"]

logger = logging.get_logger(__name__)

# Rows of a stream that are prepared before training, to find errors early.
PEEKED_ROWS = 32

MAP_BATCH = 1000

# Rows that are compared between Rust and the tokenizer's Python class.
_COMPARED_ROWS = 16


def prepare_dataset(
    dataset: Any,
    processing_class: Any,
    tokenize_row: Callable[..., dict[str, Any]],
    *,
    num_proc: int | None = None,
    overlength: str = "truncate",
    name: str = "train_dataset",
    builder: RowBuilder | None = None,
) -> Any:
    """
    Prepare a preference dataset for training: prompt, chat template, tokens.

    Args:
        dataset (`Dataset`, `IterableDataset` or a `dict` of them):
            Rows with `chosen` and `rejected`, and `prompt` if it is not implicit; strings or
            conversations.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        tokenize_row (`Callable`):
            Makes the token columns of a row. [`RowBuilder.tokenize_row`] is replaced by its batched
            form; any other callable is called row by row.
        num_proc (`int`, *optional*):
            Processes for a `Dataset`.
        overlength (`str`, *optional*, defaults to `"truncate"`):
            `"truncate"` keeps rows that are too long (the builder has cut them), `"drop"` removes
            them.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in errors and in the log.
        builder ([`RowBuilder`], *optional*):
            Decides which rows are too long, if `tokenize_row` is not a method of a builder.

    Returns:
        The same kind as `dataset`, with the text columns as plain strings, the token columns of
        [`RowBuilder.tokenize_row`], and every other column as it was.

    Raises:
        TypeError: If `dataset` is of another type.
        ValueError: If [`validate`] fails, a row is faulty, or no row has completion tokens within
        `max_length`.
    """
    if overlength not in ("truncate", "drop"):
        raise ValueError(f"overlength is {overlength!r}; must be 'truncate' or 'drop'")
    if isinstance(dataset, dict):
        prepare = partial(
            prepare_dataset,
            processing_class=processing_class,
            tokenize_row=tokenize_row,
            num_proc=num_proc,
            overlength=overlength,
            builder=builder,
        )
        return type(dataset)(
            {key: prepare(part, name=f"{name}[{key!r}]") for key, part in dataset.items()}
        )

    own = getattr(tokenize_row, "__self__", None)
    batched = (
        isinstance(own, RowBuilder)
        and getattr(tokenize_row, "__func__", None) is RowBuilder.tokenize_row
    )
    builder = own if batched else builder
    if builder is None and overlength == "drop":
        raise ValueError("overlength is 'drop'; needs `builder` where tokenize_row is not its own")

    validate(dataset, processing_class, name=name)
    transform = partial(
        _prepare_batch,
        processing_class=processing_class,
        builder=builder,
        tokenize_row=None if batched else tokenize_row,
        name=name,
    )
    if isinstance(dataset, IterableDataset):
        first = list(islice(iter(dataset.with_format(None)), PEEKED_ROWS))
        texts = (
            row_text(row, processing_class, f"{name} row {index}")
            for index, row in enumerate(first[:_COMPARED_ROWS])
        )
        transform = partial(transform, fast=fast_rows_for(own if batched else None, texts, name))
        return _prepare_stream(dataset, first, transform, builder, overlength, name)

    source = text_source(dataset)
    texts = sample_texts(source, processing_class, name, _COMPARED_ROWS)
    fast = fast_rows_for(own if batched else None, texts, name)
    mapped = {
        "batched": True,
        "batch_size": MAP_BATCH,
        "with_indices": True,
        "desc": f"Tokenizing {name}",
    }
    if fast is None:
        prepared = dataset.with_format(None).map(transform, num_proc=num_proc, **mapped)
    else:
        transform = partial(
            prepare_table, source=source, processing_class=processing_class, fast=fast, name=name
        )
        prepared = dataset.with_format("arrow").map(
            transform,
            new_fingerprint=fast.fingerprint(dataset, template_source(processing_class)),
            **mapped,
        )
        prepared = prepared.with_format(None)
    flags = prepared.select_columns([OVERLENGTH, EMPTY]).with_format("numpy")[:]
    prepared = prepared.remove_columns([OVERLENGTH, EMPTY])
    return _apply_overlength(prepared, flags[OVERLENGTH], flags[EMPTY], builder, overlength, name)


def validate(dataset: Any, processing_class: Any, *, name: str = "train_dataset") -> None:
    """
    Check that a dataset can be trained on, by its columns and its first row.

    Args:
        dataset (`Dataset` or `IterableDataset`): The dataset, not yet prepared.
        processing_class (`PreTrainedTokenizerBase`): The tokenizer.
        name (`str`, *optional*, defaults to `"train_dataset"`): Name of the dataset in errors.

    Raises:
        TypeError: If `dataset` is of another type.
        ValueError: If it is empty, has no chosen or rejected column, or its first row has a field
            of the wrong type, or is a conversation and the tokenizer has no chat template.
    """
    row_text(first_row(dataset, name), processing_class, f"{name} row 0")


def first_row(dataset: Any, name: str) -> Mapping[str, Any]:
    """
    The first row of a dataset that has the columns of pairs.

    Args:
        dataset (`Dataset` or `IterableDataset`): The dataset, not yet prepared.
        name (`str`): Name of the dataset in errors.

    Raises:
        TypeError: If `dataset` is of another type.
        ValueError: If it is empty, or has no chosen or rejected column.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}; must be a datasets.Dataset or "
            "datasets.IterableDataset"
        )
    columns = dataset.column_names
    first = next(iter(dataset.with_format(None)), None)
    if first is None:
        raise ValueError(f"{name} is empty")
    columns = list(first) if columns is None else columns
    missing = [field for field in ("chosen", "rejected") if field not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {' and no column '.join(missing)}; it has "
            f"{', '.join(sorted(columns))}"
        )
    return first


def _prepare_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    processing_class: Any,
    builder: RowBuilder | None,
    tokenize_row: Callable[..., dict[str, Any]] | None,
    name: str,
    fast: FastRows | None = None,
) -> dict[str, list[Any]]:
    """Text and token columns of a batch of rows; `tokenize_row` None means the builder's own."""
    where = [f"{name} row {index}" for index in indices]
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    texts = [row_text(row, processing_class, at) for row, at in zip(rows, where, strict=True)]
    columns: dict[str, list[Any]] = dict(
        zip(TEXT_FIELDS, map(list, zip(*texts, strict=True)), strict=True)
    )
    if fast is not None:
        arrays = (pa.array(columns[field], pa.large_string()) for field in TEXT_FIELDS)
        made = fast.columns(*arrays, name=name, first_row=indices[0])
        return {**columns, **{key: column.to_pylist() for key, column in made.items()}}
    if tokenize_row is None:
        if builder is None:
            raise ValueError("tokenize_row is None; needs builder")
        prompts, chosen, rejected = zip(*texts, strict=True)
        tokens, overlength = builder.tokenize_batch(prompts, chosen, rejected, where)
    else:
        tokens, overlength = [], []
        for row, text, at in zip(rows, texts, where, strict=True):
            feature = {**row, **dict(zip(TEXT_FIELDS, text, strict=True))}
            try:
                tokens.append(tokenize_row(feature))
                overlength.append(builder is not None and builder.is_overlength(feature))
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
    for key in tokens[0]:
        columns[key] = [row[key] for row in tokens]
    columns[OVERLENGTH] = overlength
    columns[EMPTY] = [_has_no_completion(row) for row in tokens]
    return columns


def _has_no_completion(row: Mapping[str, list[int]]) -> bool:
    # Labels of completions are token ids, those of prompts negative; searching from the end finds
    # one at once. Columns of a user's tokenize_row can have other names and are not checked.
    sides = [row[key] for key in ("chosen_labels", "rejected_labels") if key in row]
    return len(sides) == 2 and not any(label >= 0 for side in sides for label in reversed(side))


def _prepare_stream(
    dataset: IterableDataset,
    first: list[dict[str, Any]],
    transform: Callable[..., dict[str, list[Any]]],
    builder: RowBuilder | None,
    overlength: str,
    name: str,
) -> IterableDataset:
    # The first rows are prepared now, so that a fault stops the run before training.
    peeked = transform(
        {key: [row[key] for row in first] for key in first[0]}, list(range(len(first)))
    )
    _check_completions(np.asarray(peeked[EMPTY]), builder, f"{name} (first {len(first)} rows)")
    prepared = dataset.with_format(None).map(
        transform, batched=True, batch_size=PEEKED_ROWS, with_indices=True
    )
    if overlength == "drop":
        prepared = prepared.filter(_fits)
    return prepared.remove_columns([OVERLENGTH, EMPTY])


def _fits(row: Mapping[str, Any]) -> bool:
    return not row[OVERLENGTH]


def _apply_overlength(
    dataset: Dataset,
    too_long: np.ndarray,
    empty: np.ndarray,
    builder: RowBuilder | None,
    overlength: str,
    name: str,
) -> Dataset:
    count, total = int(too_long.sum()), len(too_long)
    if builder is not None:
        builder.overlength_counts[name] = count
    share = f"{name}: {count} of {total} rows ({count / total:.1%})"
    if overlength == "drop":
        if count == total:
            raise ValueError(
                f"{share} are longer than {_limit(builder)}; overlength='drop' removes all"
            )
        if count:
            logger.warning(f"{share} are longer than {_limit(builder)}: dropped.")
            dataset = dataset.select(np.flatnonzero(~too_long))
            empty = empty[~too_long]
    elif count:
        logger.warning(
            f"{share} are longer than {_limit(builder)}: truncated; overlength='drop' removes them."
        )
    _check_completions(empty, builder, name)
    return dataset


def _check_completions(empty: np.ndarray, builder: RowBuilder | None, name: str) -> None:
    count = int(empty.sum())
    within = "" if builder is None else f" within {_limit(builder)}"
    line = f"{name}: {count} of {len(empty)} rows have no completion tokens{within}"
    fix = "raise max_length, or set max_prompt_length"
    if count == len(empty):
        raise ValueError(f"{line}; {fix}")
    if count:
        logger.warning(f"{line}, because their prompt fills it; {fix}, or set overlength='drop'.")


def _limit(builder: RowBuilder | None) -> str:
    if builder is None:  # no row is known to be too long then
        return "allowed"
    if builder.is_encoder_decoder:
        return f"max_completion_length {builder.max_completion_length}"
    return f"max_length {builder.max_length}"
