"""The self-test of a GPU's kernels in processes of its own.

A kernel that reads out of bounds or never ends ruins the CUDA context of its process. The process that
is started here tries one family after the other and prints a line before and after each; the one that
started it ends it when a line does not come in time, and starts another for the families that are left.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from .findings import Trial, Verdict

__all__ = ["TrialError", "environment", "verdicts"]

logger = logging.getLogger(__name__)

# Seconds that a family may take; if it takes longer, it is tried a second time, for a machine that is busy.
LIMITS = (1.0, 10.0)
# Seconds until a process has imported torch, from a slow disk too, and until a source is compiled and loaded.
START_LIMIT = 300.0
LOAD_LIMIT = 120.0

# What Python runs in the process.
_PROGRAM = ("-m", __name__)
# Before each line of a process: libraries print too.
_MARK = "oddsmith-trial "


class TrialError(Exception):
    """The self-test cannot be run, which says nothing about the kernels."""


# ---- the process that asks ----


def verdicts(gpu: int, uuid: str | None, families: list[str]) -> list[Verdict]:
    """
    Tries families of kernels on a GPU.

    Args:
        gpu (`int`): Index of the GPU in torch.
        uuid (`str`, *optional*): What the GPU is known by in other processes; None if torch does not tell.
        families (`list[str]`): As the core names them.

    Returns:
        `list[Verdict]`: In the same order.

    Raises:
        TrialError: If no process can try them.
    """
    device = f"cuda:{gpu}"
    found: dict[str, Verdict] = {}
    # Families that had the first limit already.
    slow: set[str] = set()
    while waiting := [family for family in families if family not in found]:
        before = len(found), len(slow)
        broken = [family for family, verdict in found.items() if not verdict.passed]
        with _started(gpu, uuid, waiting, broken) as lines:
            _follow(lines, device, found, slow)
            if (len(found), len(slow)) == before:
                raise TrialError(f"a process ended before it tried anything: {lines.last_words()}")
    return [found[family] for family in families]


def _follow(lines: _Lines, device: str, found: dict[str, Verdict], slow: set[str]) -> None:
    """Until the process ends, or is to be ended."""
    family, loading, limit, begun = None, False, START_LIMIT, 0.0
    while True:
        try:
            line = lines.next(limit)
        except queue.Empty:
            if family is None:
                raise TrialError(f"a process did not start within {limit:g} s") from None
            if not loading and family not in slow:
                slow.add(family)
                return
            what = "its compilation has" if loading else "its kernels have"
            error = f"{what} not ended within {limit:g} s"
            found[family] = Verdict(device, family, time.monotonic() - begun, error=error)
            return
        if line is None:
            if family is not None:
                error = f"the process ended: {lines.last_words()}"
                found[family] = Verdict(device, family, time.monotonic() - begun, error=error)
            return
        if "load" in line:
            family, loading, limit, begun = line["load"], True, LOAD_LIMIT, time.monotonic()
        elif "begin" in line:
            loading, limit = False, LIMITS[family in slow]
        elif "notice" in line:
            logger.warning("%s", line["notice"])
        elif "verdict" in line:
            verdict = Verdict(device, **line["verdict"])
            found[verdict.family] = verdict
            family, limit = None, START_LIMIT


class _Lines:
    """What a process prints."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        # A read cannot be given a limit on every system.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith(_MARK):
                    self._queue.put(json.loads(line[len(_MARK) :]))
        self._queue.put(None)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        # Not for ever: a system waits for the GPU before it ends a process; what this one started may have its pipe.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)
        self._reader.join(1.0)

    def next(self, limit: float) -> dict[str, Any] | None:
        """The next line, or None at the end; `queue.Empty` if there is none within the limit."""
        return self._queue.get(timeout=limit)

    def last_words(self) -> str:
        """The last line on its error stream, and how it ended."""
        # Its output may end a moment before it does.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        self._errors.seek(0)
        text = self._errors.read()[-4096:].decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else "no message"
        return f"{last} (exit status {code})"


@contextmanager
def _started(
    gpu: int, uuid: str | None, families: list[str], broken: list[str]
) -> Iterator[_Lines]:
    """A process that tries the families without those that are broken, which is ended with the context."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise TrialError("this program has no Python that another process could be started with")
    request = json.dumps({"uuid": uuid, "families": families, "broken": broken})
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [sys.executable, *_PROGRAM, request],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(dict(os.environ), gpu),
                text=True,
            )
        except OSError as error:
            raise TrialError(f"no process can be started: {error}") from error
        lines = _Lines(process, errors)
        try:
            yield lines
            # What it wrote is read before it is ended, and how it ended.
            if process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
        finally:
            lines.close()


def environment(given: dict[str, str], gpu: int) -> dict[str, str]:
    """
    Of a process that sees one GPU of those that this one sees, and the same modules.

    Args:
        given (`dict[str, str]`): The environment of this process.
        gpu (`int`): Index of the GPU in torch.
    """
    made = dict(given)
    visible = given.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else None
    if names is None:
        made["CUDA_VISIBLE_DEVICES"] = str(gpu)
    elif gpu < len(names):
        made["CUDA_VISIBLE_DEVICES"] = names[gpu]
    # A notebook or a script may have added folders.
    made["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    # Not the current folder first, as `-m` has it before Python 3.11.
    made["PYTHONSAFEPATH"] = "1"
    # Should what is started be another program, it does not start one in its turn.
    made["ODDSMITH_KERNELS"] = "untested"
    return made


# ---- the process that tries ----


def main(request: str) -> None:
    """Tries the families of a request, and prints what it finds."""
    import torch

    from .. import _core
    from .trials import CASES, NO_NUMBER, dtypes, outcome

    logging.getLogger(__package__).addHandler(_Notices())
    asked = json.loads(request)
    device, gpu = _device(asked["uuid"])
    sources = dict(_core.kernel_families())
    # What is found broken is not used in the operations of the next family, as it will not be later.
    trusted = [family for family in sources if family not in asked["broken"]]
    # First without kernels: what torch and Python load then takes longer than all families.
    _core.trust_kernels(gpu, [])
    for dtype in (*dtypes(device), torch.float64):
        square = torch.ones(8, 8, device=device, dtype=dtype)
        (square @ square).log_softmax(-1).sum().item()
    for case in CASES:
        if case.family in asked["families"]:
            outcome(case, device, torch.float32)
    _core.trust_kernels(gpu, trusted)
    for family in asked["families"]:
        _say(load=family)
        try:
            for source in sources[family]:
                _core.load_kernels(gpu, source)
        except RuntimeError as error:
            trusted.remove(family)
            _core.trust_kernels(gpu, trusted)
            _say(verdict={"family": family, "seconds": 0.0, "error": _first_lines(error)})
            continue
        _say(begin=family)
        begun = time.monotonic()
        (case,) = (case for case in CASES if case.family == family)
        found = []
        for dtype in dtypes(device):
            found.append(outcome(case, device, dtype))
            if found[-1].error not in (None, NO_NUMBER):
                break
        worst = max(found, key=_badness)
        seconds = round(time.monotonic() - begun, 4)
        parts = {name: getattr(worst, name) for name in ("dtype", "deviation", "allowed", "error")}
        _say(verdict={"family": family, "seconds": seconds, **parts})
        if not worst.passed:
            trusted.remove(family)
            _core.trust_kernels(gpu, trusted)
        if worst.error not in (None, NO_NUMBER):
            # The context may be ruined, and say so only in the next family.
            return


def _device(uuid: str | None) -> tuple[Any, int]:
    """The GPU, and its index for the core."""
    import torch

    from .. import _core

    if _core.emulates_cuda():
        return torch.device("cpu"), 0
    for index in range(torch.cuda.device_count()):
        if (
            uuid is None
            or str(getattr(torch.cuda.get_device_properties(index), "uuid", None)) == uuid
        ):
            torch.cuda.set_device(index)
            return torch.device("cuda", index), index
    raise RuntimeError(f"a new process does not see the GPU {uuid}")


def _badness(trial: Trial) -> float:
    if trial.deviation is None or trial.allowed is None:
        return float("inf")
    return trial.deviation / trial.allowed


def _first_lines(error: Exception) -> str:
    """Of a compiler's log, the error and where it is."""
    return " ".join(str(error).splitlines()[:2])


class _Notices(logging.Handler):
    """What the core says of its folder, for the process that asks: here it would be lost."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(notice=record.getMessage())


def _say(**line: Any) -> None:
    print(_MARK + json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    # Without a farewell to a context that may be ruined.
    os._exit(0)
