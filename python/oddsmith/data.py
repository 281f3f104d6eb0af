"""From a preference dataset to rows of token ids, checked before training starts."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .chat import TEXT_FIELDS, extract_prompt, row_text
from .collator import PreferenceCollator
from .rows import RowBuilder

__all__ = [
    "PreferenceCollator",
    "RowBuilder",
    "check_vocabulary",
    "ensure_pad_token",
    "extract_prompt",
    "prepare_dataset",
    "row_text",
    "validate",
]

logger = logging.get_logger(__name__)

# Columns that only live while a dataset is prepared.
_OVERLENGTH, _EMPTY = "_oddsmith_overlength", "_oddsmith_empty"

# Rows of a stream that are prepared ahead of training, to find errors before it.
_PEEKED_ROWS = 32

_MAP_BATCH = 1000


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
            Makes the token columns of a row. [`RowBuilder.tokenize_row`] itself goes many rows at a
            time; any other callable is called row by row.
        num_proc (`int`, *optional*):
            Processes for a `Dataset`.
        overlength (`str`, *optional*, defaults to `"truncate"`):
            `"truncate"` keeps rows that are too long (the builder has cut them), `"drop"` leaves
            them out.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in errors and in the log.
        builder ([`RowBuilder`], *optional*):
            Says which rows are too long, where `tokenize_row` is not a builder's own.

    Returns:
        The same kind as `dataset`, with the text columns as plain strings, the token columns of
        [`RowBuilder.tokenize_row`], and every other column as it was.

    Raises:
        TypeError: If `dataset` is of another type.
        ValueError: If [`validate`] or a row finds fault, or no row has a completion left within
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
    batched = isinstance(own, RowBuilder) and tokenize_row.__func__ is RowBuilder.tokenize_row
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
        return _prepare_stream(dataset, transform, builder, overlength, name)
    prepared = dataset.with_format(None).map(
        transform,
        batched=True,
        batch_size=_MAP_BATCH,
        with_indices=True,
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
    )
    flags = prepared.select_columns([_OVERLENGTH, _EMPTY]).with_format("numpy")[:]
    prepared = prepared.remove_columns([_OVERLENGTH, _EMPTY])
    return _apply_overlength(prepared, flags[_OVERLENGTH], flags[_EMPTY], builder, overlength, name)


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
        of the wrong
            type, or is a conversation and the tokenizer has no chat template.
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
    row_text(first, processing_class, f"{name} row 0")


def ensure_pad_token(processing_class: Any) -> int:
    """
    Give a tokenizer without a pad token its EOS token to pad with, and say so once.

    Args:
        processing_class (`PreTrainedTokenizerBase`): The tokenizer; changed in place.

    Returns:
        `int`: Id of the pad token.

    Raises:
        ValueError: If there is no EOS token either.
    """
    if processing_class.pad_token_id is None:
        if processing_class.eos_token_id is None:
            raise ValueError(
                "the tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token"
            )
        processing_class.pad_token = processing_class.eos_token
        logger.warning_once(
            "The tokenizer has no pad token: padding with its EOS token "
            f"{processing_class.eos_token!r}."
        )
    return processing_class.pad_token_id


def check_vocabulary(rows: Any, vocab_size: int, *, name: str = "train_dataset") -> None:
    """
    Check that every token id and label of prepared rows is one the model has.

    Args:
        rows (`Dataset`, `IterableDataset` or iterable of rows):
            Prepared rows. Of a stream only the first few are read.
        vocab_size (`int`):
            Rows of the model's embedding and output head.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in errors.

    Raises:
        ValueError: If an id is outside 0..vocab_size-1 (labels may be negative: those are masked).
    """
    if isinstance(rows, Dataset):
        columns = [column for column in rows.column_names if _is_ids(column)]
        if not columns:
            return
        offset = 0
        for table in rows.select_columns(columns).with_format("arrow").iter(_MAP_BATCH):
            # The minimum of labels is the mask; Arrow finds the extremes without making Python
            # objects.
            if any(_out_of_range(table[column], column, vocab_size) for column in columns):
                _find_out_of_range(table.to_pylist(), vocab_size, name, offset)
            offset += len(table)
        return
    if isinstance(rows, IterableDataset):
        rows = rows.take(_PEEKED_ROWS)
    _find_out_of_range(rows, vocab_size, name, 0)


def _is_ids(column: str) -> bool:
    return column.endswith(("_input_ids", "_labels"))


def _out_of_range(column: pa.ChunkedArray, name: str, vocab_size: int) -> bool:
    extremes = pc.min_max(pc.list_flatten(column)).as_py()
    low, high = extremes["min"], extremes["max"]
    return high is not None and (high >= vocab_size or (low < 0 and not name.endswith("_labels")))


def _find_out_of_range(
    rows: Iterable[Mapping[str, Any]], vocab_size: int, name: str, offset: int
) -> None:
    for index, row in enumerate(rows):
        for column in filter(_is_ids, row):
            for token in row[column]:
                if token >= vocab_size or (token < 0 and not column.endswith("_labels")):
                    raise ValueError(
                        f"{name} row {offset + index}: {column} has token id {token}; the model's "
                        "vocabulary has "
                        f"{vocab_size} (0 to {vocab_size - 1}); resize its embeddings or use its "
                        "own tokenizer"
                    )


def _prepare_batch(
    batch: dict[str, list],
    indices: list[int],
    *,
    processing_class: Any,
    builder: RowBuilder | None,
    tokenize_row: Callable[..., dict[str, Any]] | None,
    name: str,
) -> dict[str, list]:
    """Text and token columns of a batch of rows; `tokenize_row` None means the builder's own."""
    where = [f"{name} row {index}" for index in indices]
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    texts = [row_text(row, processing_class, at) for row, at in zip(rows, where, strict=True)]
    if tokenize_row is None:
        tokens, overlength = builder.tokenize_batch(*zip(*texts, strict=True), where)
    else:
        tokens, overlength = [], []
        for row, text, at in zip(rows, texts, where, strict=True):
            feature = {**row, **dict(zip(TEXT_FIELDS, text, strict=True))}
            try:
                tokens.append(tokenize_row(feature))
                overlength.append(builder is not None and builder.is_overlength(feature))
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
    columns = dict(zip(TEXT_FIELDS, map(list, zip(*texts, strict=True)), strict=True))
    for key in tokens[0]:
        columns[key] = [row[key] for row in tokens]
    columns[_OVERLENGTH] = overlength
    columns[_EMPTY] = [_has_no_completion(row) for row in tokens]
    return columns


def _has_no_completion(row: Mapping[str, list[int]]) -> bool:
    # Labels of completions are token ids, those of prompts negative; checked from the end, so at
    # once. A tokenize_row of one's own may name its columns otherwise, and is left in peace.
    sides = [row.get(f"{side}_labels") for side in ("chosen", "rejected")]
    return None not in sides and not any(label >= 0 for side in sides for label in reversed(side))


def _prepare_stream(
    dataset: IterableDataset,
    transform: Callable[..., dict[str, list]],
    builder: RowBuilder | None,
    overlength: str,
    name: str,
) -> IterableDataset:
    # The first rows go through everything now, so that a fault stops the run before the model
    # trains.
    first = list(islice(iter(dataset.with_format(None)), _PEEKED_ROWS))
    peeked = transform(
        {key: [row[key] for row in first] for key in first[0]}, list(range(len(first)))
    )
    _check_completions(np.asarray(peeked[_EMPTY]), builder, f"{name} (first {len(first)} rows)")
    prepared = dataset.with_format(None).map(
        transform, batched=True, batch_size=_PEEKED_ROWS, with_indices=True
    )
    if overlength == "drop":
        prepared = prepared.filter(_fits)
    return prepared.remove_columns([_OVERLENGTH, _EMPTY])


def _fits(row: Mapping[str, Any]) -> bool:
    return not row[_OVERLENGTH]


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
                f"{share} are longer than {_limit(builder)}; overlength='drop' leaves none"
            )
        if count:
            logger.warning(f"{share} are longer than {_limit(builder)}: dropped.")
            dataset = dataset.select(np.flatnonzero(~too_long))
            empty = empty[~too_long]
    elif count:
        logger.warning(
            f"{share} are longer than {_limit(builder)}: truncated; overlength='drop' leaves them "
            "out."
        )
    _check_completions(empty, builder, name)
    return dataset


def _check_completions(empty: np.ndarray, builder: RowBuilder | None, name: str) -> None:
    count = int(empty.sum())
    within = "" if builder is None else f" within {_limit(builder)}"
    line = f"{name}: {count} of {len(empty)} rows have no token of a completion left{within}"
    fix = "raise max_length, or set max_prompt_length"
    if count == len(empty):
        raise ValueError(f"{line}; {fix}")
    if count:
        logger.warning(f"{line}, for their prompt alone fills it; {fix}, or overlength='drop'.")


def _limit(builder: RowBuilder) -> str:
    if builder.is_encoder_decoder:
        return f"max_completion_length {builder.max_completion_length}"
    return f"max_length {builder.max_length}"
