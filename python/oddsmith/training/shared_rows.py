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

from .life_signs import Beat, Watch

__all__ = ["once_per_node"]

logger = logging.get_logger(__name__)

# Seconds between two looks at the file system.
_PAUSE = 0.2


def once_per_node(prepare: Callable[[], Dataset]) -> Dataset:
    """
    The rows that `prepare` makes, made by one process of each node.

    The other processes wait for a file of it. A collective would end the run after its timeout of
    half an hour, and rows in memory would be made, and held, once per process. They wait as long as
    it gives signs of life. If they see none of it, as in containers that share no folder, or cannot
    read its rows, they make their own.

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
            beat = Beat(self.folder / "maker")
        except OSError:  # the others see no folder, but the marker beside it
            self._give_up()
            return prepare()
        # Others have mapped the files by then; on a system without that, they are left there.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        _MAKERS.append(self)
        with beat:
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
    """What the maker says; None if it cannot, or cannot be heard."""
    none = Path(tempfile.gettempdir()) / f"{folder.name}.none"
    watch = Watch(folder / "maker")
    while True:
        # Before the result is looked for: a maker that ends in between has left one.
        silence = watch.silence()
        if (folder / "result").exists():
            return _heard(folder)
        if none.exists():
            return None
        if silence is not None and watch.has_seen:
            raise RuntimeError(
                f"the main process of this node (process id {watch.process}) {silence} while it "
                "prepared the rows"
            )
        if silence is not None:
            logger.warning(
                f"The main process of this node {silence} in {folder.parent}, so this process prepares "
                "the rows too; let HF_DATASETS_CACHE name a folder that all processes of a node share."
            )
            return None
        time.sleep(_PAUSE)


def _heard(folder: Path) -> Any:
    try:
        return pickle.loads((folder / "result").read_bytes())
    except OSError as error:  # its files are in a folder of its own
        logger.warning(
            f"The rows of the main process of this node cannot be read, so this process prepares them "
            f"too: {error}"
        )
        return None
