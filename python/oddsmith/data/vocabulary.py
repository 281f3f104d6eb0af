"""Checks token ids of a dataset against the vocabulary of the model."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from .arrow_rows import arrow_batches
from .dataset import MAP_BATCH, PEEKED_ROWS
from .rows import TOKEN_COLUMNS


def check_vocabulary(rows: Any, vocab_size: int, *, name: str = "train_dataset") -> None:
    """
    Check that the model has every token id and label of prepared rows.

    Args:
        rows (`Dataset`, `IterableDataset` or iterable of rows):
            Prepared rows. Only the first few of a stream are read.
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
        for table in arrow_batches(rows, columns, MAP_BATCH):
            # The minimum of labels is the mask; Arrow finds the extremes without making Python
            # objects.
            if any(_out_of_range(table[column], column, vocab_size) for column in columns):
                _find_out_of_range(table.to_pylist(), vocab_size, name, offset)
            offset += len(table)
        return
    if isinstance(rows, IterableDataset):
        rows = rows.take(PEEKED_ROWS)
    _find_out_of_range(rows, vocab_size, name, 0)


def _is_ids(column: str) -> bool:
    return column in TOKEN_COLUMNS and not column.endswith("_attention_mask")


def _out_of_range(column: pa.ChunkedArray, name: str, vocab_size: int) -> bool:
    extremes = pc.call_function("min_max", [pc.call_function("list_flatten", [column])]).as_py()
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
