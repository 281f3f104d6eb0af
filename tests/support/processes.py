"""Two processes on the CPU that run a test file as a script, and what they say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def two_processes(file: str, *arguments: str | Path, timeout: int = 300) -> None:
    """Runs `file arguments` in two processes that find each other by gloo."""
    command = [sys.executable, *TORCHRUN, file, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


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
