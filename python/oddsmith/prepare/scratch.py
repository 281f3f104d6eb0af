"""A temporary SQLite file to group rows on disk."""

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path


@contextmanager
def scratch_database(folder: Path | None) -> Iterator[sqlite3.Connection]:
    """
    Opens an empty database, which is removed at the end.

    Args:
        folder (`Path`, *optional*): Folder of the file; the system's if not given.
    """
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="oddsmith-") as scratch,
        closing(sqlite3.connect(Path(scratch) / "rows.sqlite", isolation_level=None)) as store,
    ):
        # The file need not survive a crash, and sorting must not use much memory.
        for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE"):
            store.execute(f"PRAGMA {setting}")
        store.execute(f"PRAGMA temp_store_directory = '{scratch.replace(chr(39), chr(39) * 2)}'")
        store.execute("PRAGMA cache_size = -65536")
        store.execute("BEGIN")
        yield store
