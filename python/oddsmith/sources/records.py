"""Records of a dataset as a stream, each with its file and line."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError

# Characters of a JSON array that are decoded at a time.
_CHUNK = 1 << 20
_PARQUET_BATCH = 256
# Exceptions of the standard library's decompressors and Arrow on damaged or truncated data.
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)


class Record(NamedTuple):
    """
    One row of input.

    Args:
        fields (`dict` or `None`): The row; `None` if it cannot be read.
        source (`str`): File or dataset.
        unit (`str`): What `number` counts: `"line"` of a text file, else `"row"`.
        number (`int`): From 1, as editors count.
        problem (`str`, *optional*): Why there are no fields.
    """

    fields: dict[str, Any] | None
    source: str
    unit: str
    number: int
    problem: str | None = None

    @property
    def where(self) -> str:
        return f"{self.source} {self.unit} {self.number}"


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))


# By the last suffix of the name.
DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


class FileRecords:
    """
    Records of one file, read from start to end in bounded memory.

    Args:
        path (`Path`):
            A `.jsonl`, `.json` (lines, or one array) or `.parquet` file, compressed or not, or an
            `.arrow` stream of `save_to_disk`.

    Attributes:
        size (`int`): Bytes of the file.
        done (`int`): Bytes of it that have been read, for progress.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size: int = path.stat().st_size
        self.done: int = 0

    def __iter__(self) -> Iterator[Record]:
        """
        Reads the file.

        Raises:
            UserError: If the file is damaged or truncated; the message has the line or rows. A line
                that is not a JSON object becomes a record with a `problem`, because the next line
                can be read.
        """
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes[-1] in DECOMPRESSORS:
            suffixes.pop()
        if suffixes[-1] == ".parquet":
            yield from self._parquet()
        elif suffixes[-1] == ".arrow":
            yield from self._arrow()
        elif suffixes[-1] == ".json" and self._starts_with_bracket():
            yield from self._array()
        else:
            yield from self._lines()
        self.done = self.size

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        """The raw file, whose position is the progress, and the decompressed stream."""
        raw = self.path.open("rb")
        decompress = DECOMPRESSORS.get(self.path.suffix.lower())
        return raw, decompress(raw) if decompress else raw

    def _starts_with_bracket(self) -> bool:
        raw, stream = self._open()
        with raw:
            try:
                return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
            except _DAMAGE:
                return False

    def _lines(self) -> Iterator[Record]:
        raw, stream = self._open()
        number = 0
        with raw:
            try:
                for number, line in enumerate(stream, 1):
                    self.done = raw.tell()
                    if line.strip():
                        fields, problem = _parse_line(line)
                        yield Record(fields, str(self.path), "line", number, problem)
            except _DAMAGE as error:
                raise UserError(
                    f"{self.path} line {number + 1}: the file is damaged or cut off here: {error}"
                ) from error

    def _array(self) -> Iterator[Record]:
        raw, stream = self._open()
        line = 1
        with raw:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            buffer, ended = "", False
            decoder, opened, size = json.JSONDecoder(), False, _CHUNK
            while True:
                stripped = buffer.lstrip(" \t\r\n," if opened else " \t\r\n")
                line += buffer.count("\n", 0, len(buffer) - len(stripped))
                buffer = stripped
                if buffer.startswith("]") and opened:
                    return
                if buffer.startswith("[") and not opened:
                    buffer, opened = buffer[1:], True
                    continue
                if buffer:
                    try:
                        item, end = decoder.raw_decode(buffer)
                    except json.JSONDecodeError as error:
                        if ended or not _may_go_on(error, len(buffer)):
                            at = line + error.lineno - 1
                            cut = ": the file is cut off" if ended else ""
                            raise UserError(
                                f"{self.path} line {at}: not JSON{cut}: {error.msg}"
                            ) from error
                    else:
                        fields, problem = _as_fields(item)
                        yield Record(fields, str(self.path), "line", line, problem)
                        line += buffer.count("\n", 0, end)
                        buffer, size = buffer[end:], _CHUNK
                        continue
                elif ended:
                    raise UserError(
                        f"{self.path} line {line}: the file is cut off: the array has no end"
                    )
                try:
                    more = text.read(size)
                except (UnicodeDecodeError, *_DAMAGE) as error:
                    raise UserError(
                        f"{self.path} after line {line + buffer.count(chr(10))}: the file is "
                        f"damaged or cut off: {error}"
                    ) from error
                # Twice as much each time, so that a long item is not scanned too often.
                size *= 2
                self.done = raw.tell()
                buffer, ended = buffer + more, not more

    def _parquet(self) -> Iterator[Record]:
        raw, stream = self._open()
        with raw:
            try:
                file = pq.ParquetFile(stream)
            except _DAMAGE as error:
                raise UserError(
                    f"{self.path}: not a complete parquet file: {_first_line(error)}"
                ) from error
            number, groups = 0, file.num_row_groups
            for group in range(groups):
                last = number + file.metadata.row_group(group).num_rows
                batches = file.iter_batches(_PARQUET_BATCH, row_groups=[group])
                while True:
                    try:
                        batch = next(batches, None)
                        rows = None if batch is None else batch.to_pylist()
                    except (*_DAMAGE, UnicodeDecodeError) as error:
                        raise UserError(
                            f"{self.path} rows {number + 1} to {last} (row group {group + 1} of "
                            f"{groups}): damaged: {_first_line(error)}"
                        ) from error
                    if rows is None:
                        break
                    for fields in rows:
                        number += 1
                        yield Record(fields, str(self.path), "row", number)
                    self.done = self.size * number // max(file.metadata.num_rows, 1)

    def _arrow(self) -> Iterator[Record]:
        number, batches = 0, None
        with self.path.open("rb") as raw:
            while True:
                try:
                    if batches is None:
                        # Read, not mapped, because mapped pages count as memory of the process.
                        batches = pa.ipc.open_stream(raw)
                    rows = batches.read_next_batch().to_pylist()
                except StopIteration:
                    return
                except (*_DAMAGE, UnicodeDecodeError) as error:
                    raise UserError(
                        f"{self.path} after row {number}: damaged or cut off: {_first_line(error)}"
                    ) from error
                for fields in rows:
                    number += 1
                    yield Record(fields, str(self.path), "row", number)
                self.done = raw.tell()
                if not rows and number == 0:
                    return


def _parse_line(line: bytes) -> tuple[dict | None, str | None]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
        return None, f"not JSON: {error.msg} at column {error.colno}{cut}"
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error.reason} at byte {error.start + 1}"
    except RecursionError:
        return None, "not JSON: nested too deeply"
    return _as_fields(item)


def _as_fields(item: Any) -> tuple[dict | None, str | None]:
    if isinstance(item, dict):
        return item, None
    return None, f"a {type(item).__name__}; must be a JSON object"


def _may_go_on(error: json.JSONDecodeError, length: int) -> bool:
    # An unfinished string is reported at its beginning, anything else at the end of the text.
    return error.msg.startswith("Unterminated string") or error.pos >= length - 10


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def find_damage(paths: list[Path]) -> str | None:
    """
    Find the first fault in several files: file, line and reason.

    Args:
        paths (`list[Path]`): Data files.

    Returns:
        `str` or `None`: The first fault; `None` if every record of every file can be read.
    """
    for path in paths:
        try:
            for record in FileRecords(path):
                if record.problem is not None:
                    return f"{record.where}: {record.problem}"
        except UserError as error:
            return str(error)
    return None
