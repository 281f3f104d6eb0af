"""FastRows: tokenises batches of text in Rust, if the tokenizer allows it."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import transformers
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.utils.data import get_worker_info
from transformers.utils import logging
from transformers.utils.import_utils import is_torch_xla_available

from .. import _core
from .rows import EMPTY_ROW, RowBuilder

__all__ = ["EMPTY", "OVERLENGTH", "FastRows", "fast_rows_for"]

logger = logging.get_logger(__name__)

# Columns that only exist while a dataset is prepared.
OVERLENGTH, EMPTY = "_oddsmith_overlength", "_oddsmith_empty"

# Methods with which a tokenizer class can change the input or output of its backend.
_ENCODING_METHODS = ("__call__", "_encode_plus")


class Unsuited(Exception):
    """Why rows cannot be tokenised in Rust."""


class FastRows:
    """
    The results of [`RowBuilder.tokenize_batch`] as Arrow columns: the backend of a fast tokenizer
    runs in Rust on every core, without a Python object per row.

    Args:
        builder ([`RowBuilder`]): Has the rules and the tokenizer.

    Raises:
        Unsuited: If the tokenizer or the rules need Python.
    """

    def __init__(self, builder: RowBuilder):
        tokenizer = builder.processing_class
        if type(builder) is not RowBuilder:
            raise Unsuited(f"{type(builder).__name__} overrides its rules")
        if builder.is_encoder_decoder:
            raise Unsuited("the model is an encoder-decoder")
        if is_torch_xla_available():
            raise Unsuited("rows are padded for TorchXLA")
        self.builder = builder
        self._json = _backend_json(tokenizer)
        self._settings = {
            "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "label_pad": builder.label_pad_token_id,
            "max_length": builder.max_length,
            "max_prompt_length": builder.max_prompt_length,
            "truncation_mode": builder.truncation_mode,
        }
        try:
            self._encoder = _core.RowEncoder(self._json, **self._settings)
        except (ValueError, RuntimeError, OverflowError, TypeError) as error:
            raise Unsuited(str(error)) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return FastRows, (self.builder,)

    def columns(
        self, prompts: Any, chosen: Any, rejected: Any, *, name: str = "batch", first_row: int = 0
    ) -> dict[str, pa.Array]:
        """
        Token columns of a batch, in the order of [`RowBuilder.tokenize_row`]'s, then the flags
        `OVERLENGTH` and `EMPTY`.

        Args:
            prompts (`pa.Array` or `pa.ChunkedArray` of strings): Text of the prompts, none null.
            chosen (`pa.Array` or `pa.ChunkedArray` of strings): Text of the preferred answers.
            rejected (`pa.Array` or `pa.ChunkedArray` of strings): Text of the other answers.
            name (`str`, *optional*, defaults to `"batch"`): Name of the dataset, for errors.
            first_row (`int`, *optional*, defaults to `0`): Index of the first row, for errors.

        Returns:
            `dict[str, pa.Array]`: Lists of int32 (ids and labels) and int8 (attention masks), and
                booleans.

        Raises:
            ValueError: As [`RowBuilder.tokenize_batch`], for the first faulty row.
        """
        made = self._encoder.columns(
            *map(_buffers, (prompts, chosen, rejected)),
            name=name,
            first_row=first_row,
            # A DataLoader already has a worker per core.
            parallel=get_worker_info() is None,
        )
        columns = {}
        for part in ("chosen", "rejected", "prompt"):
            offsets = made[f"{part}_offsets"]
            if part != "prompt":
                _check_not_empty(offsets, part, name, first_row)
            ids = pa.Array.from_buffers(pa.int32(), *_words(made[f"{part}_input_ids"]))
            columns[f"{part}_input_ids"] = _lists(offsets, ids)
            columns[f"{part}_attention_mask"] = _lists(
                offsets, pa.array(np.ones(len(ids), np.int8))
            )
            if part != "prompt":
                labels = pa.Array.from_buffers(pa.int32(), *_words(made[f"{part}_labels"]))
                columns[f"{part}_labels"] = _lists(offsets, labels)
        for column, flags in ((OVERLENGTH, "overlength"), (EMPTY, "empty")):
            columns[column] = pa.array(np.frombuffer(made[flags], np.uint8).astype(bool))
        return columns

    def fingerprint(self, dataset: Dataset, source: Any = None) -> str:
        """
        Name of a dataset's rows in the cache of `datasets`, from the dataset, the tokenizer, the
        chat template and the rules. Earlier calls of the tokenizer do not change it.

        Args:
            dataset (`Dataset`): Not yet prepared.
            source (`Any`, *optional*): Who renders conversations; the tokenizer if not given.
        """
        tokenizer = self.builder.processing_class
        source = tokenizer if source is None else source
        return Hasher.hash(
            [
                dataset._fingerprint,
                _core.__version__,
                self._json,
                sorted(self._settings.items(), key=str),
                # These settings affect the text of conversations.
                transformers.__version__,
                type(tokenizer).__qualname__,
                type(source).apply_chat_template,
                source.chat_template,
                sorted(tokenizer.special_tokens_map.items(), key=str),
            ]
        )

    def differs(self, texts: Iterable[tuple[str, str, str]]) -> str | None:
        """
        Compare with the builder, row by row.

        Args:
            texts (`Iterable[tuple[str, str, str]]`): Prompt, chosen and rejected text of rows.

        Returns:
            `str`: How a row differs; `None` if all are equal.
        """
        for text in texts:
            batch = [[part] for part in text]
            try:
                (row,), (overlength,) = self.builder.tokenize_batch(*batch)
                expected = {**row, OVERLENGTH: overlength}
            except Exception:  # errors of tokenizers have no common type
                expected = None
            try:
                columns = self.columns(*(pa.array(part, pa.large_string()) for part in batch))
                made = {key: column[0].as_py() for key, column in columns.items() if key != EMPTY}
            except ValueError:
                made = None
            if made != expected:
                return f"the backend alone encodes the prompt {_shown(text[0])} differently"
        return None


def fast_rows_for(
    builder: RowBuilder | None, texts: Iterable[tuple[str, str, str]], name: str
) -> FastRows | None:
    """
    [`FastRows`] of a builder, if it makes the same rows; otherwise a line in the log says why.

    Args:
        builder ([`RowBuilder`], *optional*): The rules; `None` has no fast rows.
        texts (`Iterable[tuple[str, str, str]]`): Prompt, chosen and rejected text of rows to compare.
        name (`str`): Name of the dataset in the log.
    """
    if builder is None or builder.is_encoder_decoder:
        return None
    try:
        fast = FastRows(builder)
        difference = fast.differs(texts)
        if difference:
            raise Unsuited(difference)
    except Unsuited as reason:
        logger.warning_once(f"{name} is tokenised in Python, more slowly: {reason}.")
        return None
    return fast


def _backend_json(tokenizer: Any) -> str:
    name = type(tokenizer).__name__
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise Unsuited(f"{name} is not a fast tokenizer")
    for method in _ENCODING_METHODS:
        module = getattr(getattr(type(tokenizer), method, None), "__module__", "")
        if module.partition(".")[0] != "transformers":
            raise Unsuited(f"{name} overrides {method}")
    try:
        written = json.loads(backend.to_str())
    except Exception as error:  # the library raises bare exceptions for components in Python
        raise Unsuited(f"the backend of {name} cannot be written as JSON: {error}") from error
    # State of the last call, not a property of the tokenizer.
    written["truncation"] = written["padding"] = None
    return json.dumps(written, ensure_ascii=False)


def _buffers(texts: pa.Array | pa.ChunkedArray) -> tuple[bytes, bytes]:
    """Data and offsets of a column of text, without rows outside its slice."""
    texts = texts.cast(pa.large_string())
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if len(texts) == 0:
        return b"", np.zeros(1, np.int64).tobytes()
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = b"" if data is None else data[ends[0] : ends[-1]].to_pybytes()
    return data, (ends - ends[0]).tobytes()


def _check_not_empty(offsets: bytes, part: str, name: str, first_row: int) -> None:
    empty = np.flatnonzero(np.diff(np.frombuffer(offsets, np.int32)) == 0)
    if len(empty):
        raise ValueError(f"{name} row {first_row + int(empty[0])}: {EMPTY_ROW.format(part)}")


def _words(data: bytes) -> tuple[int, list[pa.Buffer | None]]:
    return len(data) // 4, [None, pa.py_buffer(data)]


def _lists(offsets: bytes, values: pa.Array) -> pa.Array:
    count, buffers = _words(offsets)
    return pa.Array.from_buffers(pa.list_(values.type), count - 1, buffers, children=[values])


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
