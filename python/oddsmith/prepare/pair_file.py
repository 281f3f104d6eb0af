"""Files of preference pairs, written under a temporary name and renamed when complete."""

import gzip
import io
import json
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..stage import new_file, publish
from .pair import Pair

FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
_ROW_GROUP = 5000

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def format_of(path: Path) -> str:
    """
    The one of `FORMATS` for a path.

    Raises:
        UserError: If none.
    """
    for suffix in FORMATS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise UserError(f"--output {path}: must end in {', '.join(FORMATS)}")


def row_of(pair: Pair) -> dict[str, Any]:
    """The columns of a pair: prompt, chosen, rejected, score_chosen, score_rejected."""
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "score_chosen": pair.score_chosen,
        "score_rejected": pair.score_rejected,
    }


class PairFile(AbstractContextManager):
    """
    A file that appears, complete and on disk, when its context ends without an error.

    Args:
        path (`Path`): `.jsonl`, `.jsonl.gz` or `.parquet`; its folder is created.

    Raises:
        UserError: If it cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self._kind = path, format_of(path)
        self._parquet: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stage, self._raw = new_file(path.parent)
        except OSError as error:
            raise UserError(f"--output {path}: {error}") from error
        self._text: io.TextIOWrapper | None = None
        if self._kind != ".parquet":
            # Without a name and time in the header, equal pairs give equal bytes.
            packed = (
                gzip.GzipFile("", "wb", 6, self._raw, mtime=0)
                if self._kind.endswith(".gz")
                else self._raw
            )
            self._text = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")

    def write(self, pair: Pair) -> None:
        row = row_of(pair)
        if self._text is not None:
            row = {name: value for name, value in row.items() if value is not None}
            self._text.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        self._rows.append(row)
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _writer(self) -> pq.ParquetWriter:
        if self._parquet is None:
            text = bool(self._rows) and isinstance(self._rows[0]["chosen"], str)
            kind = pa.string() if text else _MESSAGES
            scores = [(f"score_{side}", pa.float64()) for side in ("chosen", "rejected")]
            schema = pa.schema([(name, kind) for name in ("prompt", "chosen", "rejected")] + scores)
            self._parquet = pq.ParquetWriter(self._raw, schema, compression="zstd")
        return self._parquet

    def _flush(self) -> None:
        writer = self._writer()
        if self._rows:
            writer.write_table(pa.Table.from_pylist(self._rows, writer.schema))
        self._rows = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:  # a full disk
            raise UserError(f"--output {self.path}: {failure}") from failure
        finally:
            self._discard()
            self._stage.unlink(missing_ok=True)

    def _discard(self) -> None:
        """Closes what an error has left open."""
        if self._raw.closed:
            return
        if self._text is not None and isinstance(self._text.buffer, gzip.GzipFile):
            # From Python 3.12 on it has a buffer, which is written when it is collected: to nowhere.
            self._text.buffer.fileobj = io.BytesIO()
            self._text.close()
        with suppress(OSError):  # of a full disk, again
            self._raw.close()

    def _finish(self) -> None:
        if self._text is not None:
            self._text.flush()
            if self._text.buffer is not self._raw:
                self._text.buffer.close()  # writes gzip's end; the file below stays open
        else:
            self._flush()
            self._writer().close()
        self._raw.flush()
        publish(self._stage, self.path, self._raw)
