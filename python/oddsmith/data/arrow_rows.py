"""Arrow tables of a preference dataset: their text columns and token columns."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .chat import TEXT_FIELDS, row_text
from .rust_rows import FastRows

# Columns that can affect the text of a row.
_SOURCES = (*TEXT_FIELDS, "tools", "chat_template_kwargs")

# Rows per chunk: Rust tokenises one chunk while Python makes the text of the next.
_RENDERED_AT_ONCE = 100


def arrow_batches(dataset: Dataset, columns: list[str], size: int) -> Iterable[pa.Table]:
    """Some columns of a dataset as tables of `size` rows."""
    batches = dataset.select_columns(columns).with_format("arrow").iter(size)
    return cast(Iterable[pa.Table], batches)


def text_source(dataset: Dataset) -> Dataset:
    """The columns of a dataset that make the text of its rows, as Python objects."""
    columns = [column for column in _SOURCES if column in dataset.column_names]
    return dataset.select_columns(columns).with_format(None)


def sample_texts(
    source: Dataset, processing_class: Any, name: str, count: int
) -> Iterator[tuple[str, str, str]]:
    """
    Yield prompt, chosen and rejected text of rows from the first on; faulty rows are skipped.

    Args:
        source (`Dataset`): From [`text_source`].
        processing_class (`PreTrainedTokenizerBase`): Holds the chat template.
        name (`str`): Name of the dataset in the log.
        count (`int`): Most rows.
    """
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
        try:
            yield row_text(source[index], processing_class, f"{name} row {index}")
        except ValueError:
            continue


def prepare_table(
    table: pa.Table,
    indices: list[int],
    *,
    source: Dataset,
    processing_class: Any,
    fast: FastRows,
    name: str,
) -> pa.Table:
    """
    A batch of rows with the text of prompt, chosen and rejected, and their tokens.

    Args:
        table (`pa.Table`): Consecutive rows of the dataset.
        indices (`list[int]`): Their indices.
        source (`Dataset`): The complete dataset, from [`text_source`].
        processing_class (`PreTrainedTokenizerBase`): Holds the chat template.
        fast ([`FastRows`]): Makes the tokens.
        name (`str`): Name of the dataset in errors.

    Returns:
        `pa.Table`: The columns of `table` with text columns replaced, then those of
            [`FastRows.columns`].

    Raises:
        ValueError: For the first row that has a fault.
    """
    first = indices[0]
    if _is_text(table):
        texts = {field: table[field] for field in TEXT_FIELDS}
        parts = [fast.columns(*texts.values(), name=name, first_row=first)]
    else:
        texts, parts = _render(
            source, range(first, first + len(table)), processing_class, fast, name
        )
    columns = dict(zip(table.column_names, table.columns, strict=True))
    columns.update(texts)
    columns.update({key: pa.chunked_array([part[key] for part in parts]) for key in parts[0]})
    return pa.table(columns)


def _is_text(table: pa.Table) -> bool:
    if not set(TEXT_FIELDS) <= set(table.column_names):
        return False
    columns = [table[field] for field in TEXT_FIELDS]
    return all(
        column.null_count == 0 and (pa.types.is_string(kind) or pa.types.is_large_string(kind))
        for column, kind in zip(columns, (column.type for column in columns), strict=True)
    )


def _render(
    source: Dataset, rows: range, processing_class: Any, fast: FastRows, name: str
) -> tuple[dict[str, pa.ChunkedArray], list[dict[str, pa.Array]]]:
    """Text columns and token columns of rows whose text is made in Python."""
    batch = source[rows.start : rows.stop]
    texts, pending = [], []
    # One thread that only waits for Rust, while this one renders templates.
    with ThreadPoolExecutor(1) as waiting:
        for start in range(0, len(rows), _RENDERED_AT_ONCE):
            part = range(start, min(start + _RENDERED_AT_ONCE, len(rows)))
            try:
                made = [
                    row_text(
                        {key: values[index] for key, values in batch.items()},
                        processing_class,
                        f"{name} row {rows[index]}",
                    )
                    for index in part
                ]
            except ValueError:
                for earlier in pending:
                    earlier.result()  # the fault of the first row is reported
                raise
            texts.append([pa.array(field, pa.string()) for field in zip(*made, strict=True)])
            pending.append(
                waiting.submit(fast.columns, *texts[-1], name=name, first_row=rows[start])
            )
        parts = [part.result() for part in pending]
    columns = [pa.chunked_array(chunks) for chunks in zip(*texts, strict=True)]
    return dict(zip(TEXT_FIELDS, columns, strict=True)), parts
