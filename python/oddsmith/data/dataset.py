"""Prepares a preference dataset: rows of token ids, checked before training starts."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .arrow_rows import prepare_table, sample_texts, text_source
from .chat import TEXT_FIELDS, is_messages, row_text
from .notes import RowNotes
from .processor import template_source
from .rows import TOKEN_COLUMNS, RowBuilder, check_not_empty
from .rust_rows import EMPTY, OVERLENGTH, FastRows, fast_rows_for
from .standard_rows import first_rows, has_transform, shown_rows, standard_rows, unused_text

__all__ = ["check_type", "first_row", "notes_of", "prepare_dataset", "validate"]

logger = logging.get_logger(__name__)

# Rows of a stream that are prepared before training, to find errors early.
PEEKED_ROWS = 32

MAP_BATCH = 1000

# Rows that are compared between Rust and the tokenizer's Python class.
_COMPARED_ROWS = 16

# Rows that are looked at for a prompt that is there twice, as messages.
_LOOKED_AT = 2000


def prepare_dataset(
    dataset: Any,
    processing_class: Any,
    tokenize_row: Callable[..., dict[str, Any]],
    *,
    num_proc: int | None = None,
    overlength: str = "truncate",
    name: str = "train_dataset",
    builder: RowBuilder | None = None,
    column_mapping: Mapping[str, str] | None = None,
) -> Any:
    """
    Prepare a preference dataset for training: columns, prompt, chat template, tokens.

    Rows are those that the dataset shows: with the transform of `with_transform`, once.

    Args:
        dataset (`Dataset`, `IterableDataset` or a `dict` of them):
            Rows with `chosen` and `rejected`, and `prompt` if it is not implicit; strings or
            conversations. Other names of columns are recognised; see
            [`~oddsmith.data.layouts.find_layout`].
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
            Decides which rows are too long, if `tokenize_row` is not a method of a builder. Its
            `notes` get what was found, by the name of the dataset.
        column_mapping (`Mapping[str, str]`, *optional*):
            Names of columns, such as `{"question": "prompt"}`.

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
            column_mapping=column_mapping,
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

    check_type(dataset, name)
    dataset = standard_rows(shown_rows(dataset, name), column_mapping or {}, name)
    validate(dataset, processing_class, name=name)
    if batched:
        dataset = _without_token_columns(dataset, name)
    notes = notes_of(dataset)
    if builder is not None:
        builder.notes[name] = notes
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
    return _apply_overlength(
        prepared, flags[OVERLENGTH], flags[EMPTY], builder, overlength, name, notes
    )


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
    check_type(dataset, name)
    columns = None if has_transform(dataset) else dataset.column_names
    first = next(iter(dataset if has_transform(dataset) else dataset.with_format(None)), None)
    if first is None:
        raise ValueError(f"{name} is empty")
    columns = list(first) if columns is None else columns
    missing = [field for field in ("chosen", "rejected") if field not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {' and no column '.join(missing)}; it has "
            f"{', '.join(sorted(columns))}; column_mapping names other columns, and oddsmith prepare "
            "makes pairs of other layouts"
        )
    return first


def check_type(dataset: Any, name: str) -> None:
    """
    Check the class of a dataset.

    Raises:
        TypeError: If it is another one.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}; must be a datasets.Dataset or "
            "datasets.IterableDataset"
        )


def _without_token_columns(dataset: Any, name: str) -> Any:
    """Without columns of the user's that have the names of the tokens."""
    taken = [column for column in TOKEN_COLUMNS if column in (dataset.column_names or ())]
    if not taken:
        return dataset
    logger.warning(
        f"{name}: the columns {', '.join(taken)} are made from the text; those of the dataset are "
        "not used."
    )
    return dataset.remove_columns(taken)


def notes_of(dataset: Any) -> RowNotes:
    """What is seen in some rows of a dataset in the trainer's columns, before they are tokenised."""
    rows = first_rows(dataset)
    notes = RowNotes(unused=unused_text(rows))
    if not any(is_messages(row.get("prompt")) for row in rows):
        return notes
    if isinstance(dataset, Dataset):
        count = min(len(dataset), _LOOKED_AT)
        places = [index * len(dataset) // count for index in range(count)]
        texts = dataset.select_columns(list(TEXT_FIELDS)).select(places)
        notes.look_for_repeats(zip(places, cast(Any, texts), strict=True))
    else:
        notes.look_for_repeats(enumerate(rows))
    return notes


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
                check_not_empty(tokens[-1])
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
    keys = dict.fromkeys(key for row in first for key in row)  # rows can have different ones
    peeked = transform(
        {key: [row.get(key) for row in first] for key in keys}, list(range(len(first)))
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
    notes: RowNotes,
) -> Dataset:
    count, total = int(too_long.sum()), len(too_long)
    if builder is not None:
        notes.overlength, notes.cut = count, too_long
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
            notes.cut = None
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
