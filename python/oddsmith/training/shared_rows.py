"""Rows that one process of a node prepares and the others read from its disk."""

import os
import pickle
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Seconds between two looks at the file system.
_PAUSE = 0.2


def once_per_node(prepare: Callable[[], Dataset]) -> Dataset:
    """
    The rows that `prepare` makes, made by one process of each node.

    The other processes wait for a file of it. A collective would end the run after its timeout of
    half an hour, and rows in memory would be made, and held, once per process.

    Args:
        prepare (`Callable`): Makes the rows, the same on all processes.

    Raises:
        RuntimeError: If the process that makes them has ended without a result.
        Exception: What `prepare` raises, on all processes of the node.
    """
    state = PartialState()
    if state.num_processes == 1:
        return prepare()
    # All processes are here at about the same time, so this takes no longer than their start.
    token = broadcast_object_list([uuid.uuid4().hex], from_process=0)[0]
    # The main process of a node has the first index of its processes.
    node = state.process_index - state.local_process_index
    folder = _place() / f"rows-{token}-{node}"
    if state.is_local_main_process:
        return _Maker(folder).make(prepare)
    found = _wait(folder)
    if found is None:
        return prepare()
    if isinstance(found, BaseException):
        raise found
    return found


def _place() -> Path:
    """Where the library has its own prepared rows, which are as large; or the temporary folder."""
    place = Path(datasets.config.HF_DATASETS_CACHE) / "oddsmith"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return place if os.access(place, os.W_OK) else Path(tempfile.gettempdir())


class _Maker:
    """The process that makes the rows, and says how that went in `result` of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def make(self, prepare: Callable[[], Dataset]) -> Dataset:
        try:
            # What is in it is unpickled: nobody else may write there, whatever the umask is.
            self.folder.mkdir(mode=0o700)
            (self.folder / "maker").write_text(str(os.getpid()))
        except OSError:  # the others see no folder, but the marker beside it
            self._give_up()
            return prepare()
        # Others have mapped the files by then; on a system without that, they are left there.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        _MAKERS.append(self)
        try:
            rows = prepare()
        except BaseException as error:
            self._say(_portable(error))
            raise
        try:
            self._say(self._stored(rows))
        except Exception as error:  # a full disk, or rows of a class that cannot be pickled
            logger.warning(f"The rows cannot be shared by the processes of this node: {error}")
            self._say(None)
        return rows

    def _stored(self, rows: Dataset) -> Dataset:
        """The rows as files, which are no copies when they are pickled."""
        if rows.cache_files:
            return rows
        saved = self.folder / "rows"
        rows.save_to_disk(saved)
        return Dataset.load_from_disk(str(saved))

    def _say(self, result: Any) -> None:
        part = self.folder / "result.part"
        part.write_bytes(pickle.dumps(result))
        part.replace(self.folder / "result")  # at once: the others read it when they see it

    def _give_up(self) -> None:
        try:
            (Path(tempfile.gettempdir()) / f"{self.folder.name}.none").touch()
        except OSError as error:
            raise RuntimeError(
                f"neither {self.folder.parent} nor {tempfile.gettempdir()} can be written to, and "
                "the rows of several processes are shared there; set HF_DATASETS_CACHE or TMPDIR"
            ) from error


# Their folders stay until the process ends.
_MAKERS: list[_Maker] = []


def _portable(error: BaseException) -> BaseException:
    """The error, or its text if it cannot be pickled."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever its class does
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _wait(folder: Path) -> Any:
    """What the maker says; None if it cannot."""
    none = Path(tempfile.gettempdir()) / f"{folder.name}.none"
    seen = False  # the maker: in a container of its own it is not
    while True:
        result, maker = folder / "result", folder / "maker"
        if result.exists():
            return pickle.loads(result.read_bytes())
        if none.exists():
            return None
        pid = maker.read_text() if maker.exists() else ""
        runs = bool(pid) and _runs(int(pid))
        if seen and not runs and not result.exists():
            raise RuntimeError(
                f"the main process of this node (process id {pid}) ended while it prepared the rows"
            )
        seen = runs
        time.sleep(_PAUSE)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
