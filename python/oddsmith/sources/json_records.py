"""Values of a JSON file, one a line or in one array, in bounded memory.

Everything is refused that Arrow, which trains on the same file, refuses or reads as something else:
duplicate names, halves of surrogate pairs, numbers beyond 64 bits, thousands of levels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from io import BufferedReader
from typing import Any

#: Bytes that a line, or an item of an array, may have. A compressed file of megabytes can hold one of gigabytes.
LONGEST = 64 << 20
# Characters of an array that are decoded at a time.
_CHUNK = 1 << 20
# Bytes of lines; few, so that those before damage are read.
_PIECE = 1 << 14
_DEPTH = 200
_SURROGATE = re.compile(r"\\u[dD][89abAB]")
_BLANK = " \t\r\n"
_CUT = "the file is cut off: the array has no end"
_BOM = b"\xef\xbb\xbf"


class NotARow(ValueError):
    """What is wrong with a value; the next one may be right."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotARow(f"{twice!r} is in one object twice")
    return found


def _integer(text: str) -> int | float:
    if len(text) < 19:
        return int(text)
    if len(text) > 400:
        raise NotARow(f"a number of {len(text):,} digits")
    value = int(text)
    return value if -(2**63) <= value < 2**63 else _float(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotARow(f"the number {text[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)


def lines(stream: BufferedReader, longest: int = LONGEST) -> Iterator[bytes]:
    """
    The lines of a file with their ends: a newline, a carriage return, or both.

    Raises:
        NotARow: If one has more bytes than `longest`.
    """
    begun: list[bytes] = []
    length = 0
    while chunk := stream.read1(_PIECE):
        begun.append(chunk)
        _check_length(length, longest)
        length += len(chunk)
        # A newline may follow a carriage return.
        if b"\n" not in chunk and b"\r" not in chunk[:-1]:
            continue
        found = b"".join(begun).splitlines(keepends=True)
        begun = [] if found[-1].endswith(b"\n") else [found.pop()]
        length = sum(map(len, begun))
        for line in found:
            _check_length(len(line), longest)
            yield line
    for line in b"".join(begun).splitlines(keepends=True):
        _check_length(len(line), longest)
        yield line


def _check_length(length: int, longest: int) -> None:
    if length > longest:
        raise NotARow(
            f"longer than {longest >> 20} MB; --max_line_mb allows more, if this is one row"
        )


def row_of_line(line: bytes, first: bool = False) -> dict[str, Any]:
    """
    The object on a line.

    Args:
        line (`bytes`): With its end.
        first (`bool`, *optional*): It may have a byte order mark.

    Raises:
        NotARow: If there is none.
    """
    try:
        text = line.removeprefix(_BOM if first else b"").decode()
        return checked(_decode(text), text)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith((b"\n", b"\r")) else "; the file ends in the middle of it"
        raise NotARow(f"not JSON: {error.msg} at column {error.colno}{cut}") from error
    except UnicodeDecodeError as error:
        raise NotARow(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error


def is_json(line: bytes) -> bool:
    """Whether a line is a whole value."""
    try:
        _decode(line.removeprefix(_BOM).decode())
    except ValueError:
        return False
    return True


def _decode(text: str) -> Any:
    text = text.strip(_BLANK)
    try:
        item, end = _DECODER.raw_decode(text)
    except RecursionError:
        raise NotARow("not JSON: nested too deeply") from None
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return item


def checked(item: Any, text: str) -> dict[str, Any]:
    """
    An item that was read, if it is a row.

    Args:
        item (`Any`): The item.
        text (`str`): What it was read from, or more.

    Raises:
        NotARow: If it is not.
    """
    if not isinstance(item, dict):
        raise NotARow(f"a {type(item).__name__}; must be a JSON object")
    if text.count("[") + text.count("{") > _DEPTH and _is_deep(item):
        raise NotARow("not JSON: nested too deeply")
    if _SURROGATE.search(text):
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise NotARow("not Unicode: half of a surrogate pair") from error
    return item


def _is_deep(item: Any) -> bool:
    level: Iterable[Any] = [item]
    for _ in range(_DEPTH):
        level = [
            each
            for holder in level
            for each in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(each, (dict, list))
        ]
        if not level:
            return False
    return True


class Array:
    """
    The items of one array, which is all that is in a file.

    Args:
        text (`TextIO`): The file.
        longest (`int`, *optional*): Most characters of an item.

    Attributes:
        line (`int`): Line of the item that is read, from 1.
    """

    def __init__(self, text: Any, longest: int = LONGEST):
        self.line = 1
        self._text, self._longest = text, longest
        self._buffer, self._ended, self._size = "", False, _CHUNK

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
        """
        Reads the file: an item, or what is wrong with it.

        Raises:
            NotARow: If what follows cannot be read either.
        """
        self._skip("[")
        first = True
        while not self._takes("]"):
            if not first:
                self._skip(",")
            first = False
            if not self._fill():
                raise NotARow(_CUT)
            item, end = self._item()
            text = self._buffer[:end]
            try:
                yield checked(item, text), None
            except NotARow as problem:
                yield None, str(problem)
            self._pass(end)
        if self._fill():
            raise NotARow("there is more after the end of the array")

    def _item(self) -> tuple[Any, int]:
        while True:
            try:
                return _DECODER.raw_decode(self._buffer)
            except RecursionError:
                raise NotARow("not JSON: nested too deeply") from None
            except json.JSONDecodeError as error:
                _check_length(len(self._buffer), self._longest)
                if self._ended or not _may_go_on(error, len(self._buffer)):
                    self.line += error.lineno - 1
                    at_end = _may_go_on(error, len(self._buffer.rstrip(_BLANK)), 0)
                    cut = ": the file is cut off" if at_end else ""
                    raise NotARow(f"not JSON{cut}: {error.msg}") from error
            self._read()

    def _takes(self, mark: str) -> bool:
        if not self._fill():
            raise NotARow(_CUT)
        if not self._buffer.startswith(mark):
            return False
        self._pass(1)
        return True

    def _skip(self, mark: str) -> None:
        if not self._takes(mark):
            raise NotARow(f"not JSON: Expecting {mark!r}")

    def _fill(self) -> bool:
        """Reads up to the next character that is not blank; whether there is one."""
        while True:
            self._pass(len(self._buffer) - len(self._buffer.lstrip(_BLANK)))
            if self._buffer or self._ended:
                return bool(self._buffer)
            self._read()

    def _pass(self, count: int) -> None:
        self.line += self._buffer.count("\n", 0, count)
        self._buffer, self._size = self._buffer[count:], _CHUNK

    def _read(self) -> None:
        more = self._text.read(self._size)
        # Twice as much each time, so that a long item is not scanned too often.
        self._size *= 2
        self._buffer, self._ended = self._buffer + more, not more


def _may_go_on(error: json.JSONDecodeError, length: int, margin: int = 10) -> bool:
    # An unfinished string is reported at its beginning, anything else at the end of the text.
    return error.msg.startswith("Unterminated string") or error.pos >= length - margin
