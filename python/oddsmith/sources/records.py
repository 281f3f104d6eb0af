"""Records of a dataset as a stream, each with its file and line."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .json_records import LONGEST, Array, NotARow, is_json, lines, row_of_line

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


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}
# How such files begin, which counts: their names may not say it.
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


class FileRecords:
    """
    Records of one file, read from start to end in bounded memory.

    Args:
        path (`Path`):
            A `.jsonl` or `.json` (lines, or one array) or `.parquet` file, compressed or not, or an
            `.arrow` stream of `save_to_disk`.
        longest (`int`, *optional*, defaults to 64 MB): Most bytes of a line, or item of an array.

    Attributes:
        size (`int`): Bytes of the file.
        done (`int`): Bytes of it that have been read, for progress.
    """

    def __init__(self, path: Path, longest: int = LONGEST):
        self.path, self.longest = path, longest
        self.size: int = path.stat().st_size
        self.done: int = 0

    def __iter__(self) -> Iterator[Record]:
        """
        Reads the file.

        Raises:
            UserError: If the file is damaged or truncated, or has a line that is too long; the message
                has the line or rows. A line that is not a JSON object becomes a record with a `problem`,
                because the next line can be read.
        """
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes[-1] in DECOMPRESSORS:
            suffixes.pop()
        if suffixes[-1] == ".parquet":
            yield from self._parquet()
        elif suffixes[-1] == ".arrow":
            yield from self._arrow()
        elif self._is_array(suffixes[-1] == ".json"):
            yield from self._array()
        else:
            yield from self._lines()
        self.done = self.size

    def _open(self) -> tuple[BinaryIO, Any]:
        """The raw file, whose position is the progress, and the decompressed stream."""
        raw = self.path.open("rb")
        start = raw.read(6)
        raw.seek(0)
        for magic, kind in _MAGIC.items():
            if start.startswith(magic):
                return raw, DECOMPRESSORS[kind](raw)
        return raw, raw

    def _is_array(self, by_name: bool) -> bool:
        """Whether the file is one array; of lines that are arrays, each is a bad row."""
        raw, stream = self._open()
        with raw:
            try:
                start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            except _DAMAGE:
                return False
        if by_name or not start.startswith(b"["):
            return start.startswith(b"[")
        raw, stream = self._open()
        with raw:
            try:
                given = (line for line in lines(stream, self.longest) if line.strip())
                return not is_json(next(given)) or next(given, None) is None
            except (NotARow, *_DAMAGE):  # what is wrong is found when it is read
                return True

    def _lines(self) -> Iterator[Record]:
        raw, stream = self._open()
        number = 0
        with raw:
            try:
                for number, line in enumerate(lines(stream, self.longest), 1):
                    if line.strip():
                        yield self._record(line, number)
                    self.done = raw.tell()
            except NotARow as problem:
                raise UserError(f"{self.path} line {number + 1}: {problem}") from problem
            except _DAMAGE as error:
                raise UserError(
                    f"{self.path} line {number + 1}: the file is damaged or cut off here: {error}"
                ) from error

    def _record(self, line: bytes, number: int) -> Record:
        fields, problem = None, None
        try:
            fields = row_of_line(line, number == 1)
        except NotARow as error:
            problem = str(error)
        return Record(fields, str(self.path), "line", number, problem)

    def _array(self) -> Iterator[Record]:
        raw, stream = self._open()
        with raw:
            array = Array(io.TextIOWrapper(stream, encoding="utf-8-sig"), self.longest)
            try:
                for fields, problem in array:
                    yield Record(fields, str(self.path), "line", array.line, problem)
                    self.done = raw.tell()
            except NotARow as problem:
                raise UserError(f"{self.path} line {array.line}: {problem}") from problem
            except (UnicodeDecodeError, *_DAMAGE) as error:
                raise UserError(
                    f"{self.path} after line {array.line}: the file is damaged or cut off: {error}"
                ) from error

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
