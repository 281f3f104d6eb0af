"""Two processes on the CPU that run a test file as a script, and what they say."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch


def two_processes(file: str, *arguments: str | Path, timeout: int = 300) -> None:
    """Runs `file arguments` in two processes that find each other by gloo."""
    code, errors = ended(["-m", "support.forked", file, *arguments], timeout)
    assert code == 0, errors[-4000:]


def ended(words: Iterable[str | Path], timeout: int) -> tuple[int, str]:
    """
    The exit code of Python with these arguments, and what it wrote to stderr. After `timeout`
    seconds it is killed, and the processes that it has forked.
    """
    command = [sys.executable, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=one_core(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as run:
        try:
            _, errors = run.communicate(timeout=timeout)
        except BaseException:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    return run.returncode, errors


def one_core() -> dict[str, str]:
    """Variables for processes that share a CPU and are forked."""
    changed = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **changed}


@contextmanager
def one_thread() -> Iterator[None]:
    """A context with as many threads as each of [`two_processes`] has: they decide the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(folder: str | Path, results: Any) -> None:
    """Writes a process's results into `folder`, for [`reports`]."""
    rank = os.environ["RANK"]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))


def reports(folder: Path) -> list[Any]:
    """What both processes have written by [`report`]."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def end() -> NoReturn:
    """Ends the process without the end of the interpreter.

    A thread of torch's gloo may still hold the last collective's tensor. If the interpreter ends
    before the thread gives it back, Python ends that thread within C++, which aborts the process
    ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
