"""Two processes that are forked from one, which has imported everything: that takes ten seconds.

`python -m support.forked FILE ARGUMENTS` runs a file as a script in both, with the variables that
torchrun sets. [`fork`] runs a function.
"""

import gc
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from .processes import end

__all__ = ["fork", "import_all"]

# What the scripts use, also the modules that transformers imports when a class is asked for.
_MODULES = (
    "datasets",
    "oddsmith.trainer",
    "peft",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen3.modeling_qwen3",
    "torch.distributed.fsdp",
)


def import_all() -> None:
    """Imports what the processes use, before they are forked."""
    for name in _MODULES:
        with suppress(ImportError):  # an older transformers may not have a model
            import_module(name)
    # Each run of the trainer collects garbage, which took half of its time: it looks at all objects
    # of what is imported, and these stay.
    gc.collect()
    gc.freeze()


def fork(target: Callable[[], object], patience: float = 10.0) -> tuple[list[int], float]:
    """Runs `target` in two processes.

    Args:
        target (`Callable`): What both run. It finds its rank where torchrun puts it.
        patience (`float`, *optional*, defaults to 10): Seconds that a process has to end after the other
            one has failed.

    Returns:
        `tuple`: The exit codes in the order in which the processes have ended, and the seconds
        between.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(2):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            _run(target, rank)
        running.add(child)
    ends: list[int] = []
    times: list[float] = []
    while running:
        child, status = os.waitpid(-1, 0 if not any(ends) else os.WNOHANG)
        if child:
            running.discard(child)
            ends.append(os.waitstatus_to_exitcode(status))
            times.append(time.monotonic())
        elif time.monotonic() - times[-1] > patience:
            for other in running:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.05)
    return ends, times[1] - times[0]


def _run(target: Callable[[], object], rank: int) -> None:
    try:
        target()
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            traceback.print_exc()
            print(f"process {rank} failed", file=sys.stderr, flush=True)
            os._exit(1)
    end()


def main(file: str, *arguments: str) -> None:
    """Runs a file as a script in two processes; ends with 1 if one of them fails."""
    import_all()
    sys.argv = [file, *arguments]
    ends, _ = fork(lambda: runpy.run_path(file, run_name="__main__"))
    sys.exit(int(any(ends)))


if __name__ == "__main__":
    main(*sys.argv[1:])
