"""Every call of the emulated driver and compiler fails in its turn, each in a process of its own.

`python -m support.forked_faults CODE FAMILY..` imports torch once and forks for each place, because the driver is opened
and kernels are loaded once in a process. It prints the number of places for each family as JSON, or exits with what was
wrong.
"""

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from oddsmith import _core
from support import emulation
from support.kernel_ops import FAMILIES

# CUDA_ERROR_ILLEGAL_ADDRESS: nothing of the process works any more.
LOST = 700


class Compiler:
    """The emulated NVRTC, which the core has opened."""

    def __init__(self, path: Path):
        self.lib = ctypes.CDLL(str(path))
        self.lib.emulator_compiler_calls.restype = ctypes.c_long
        self.lib.emulator_programs.restype = ctypes.c_long
        self.lib.emulator_fail_compiler_call.argtypes = [ctypes.c_long]


def in_a_fork(run: Callable[[], object]) -> Any:
    """What `run` returns in a child, which must end by itself.

    Raises:
        AssertionError: With its traceback, if it raised or was killed.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            text = json.dumps(run())
            code = 0
        except BaseException:
            text = traceback.format_exc()
        os.write(write, text.encode()[:60_000])
        os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"exit status {code}: {text}"
    return json.loads(text)


def digest(tensors: list[torch.Tensor]) -> list[str]:
    return [
        # A loss has no dimension, and no view in bytes.
        tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes().hex()
        for tensor in tensors
    ]


def attempt(op: Callable, driver: emulation.Driver, compiler: Compiler, place, code: int):
    """Runs `op` with one call that fails, and then without; None for no such call."""
    kind, number = place
    if kind == "driver":
        driver.fail_call(number, code)
    elif kind == "compiler":
        compiler.lib.emulator_fail_compiler_call(number)
    message = None
    context = ctypes.c_void_p()
    try:
        op()
    except RuntimeError as error:
        message = str(error)
    driver.fail_call(0)
    compiler.lib.emulator_fail_compiler_call(0)
    calls = driver.calls()
    failed = calls[number - 1] if kind == "driver" else "nvrtc"
    if code == LOST and kind == "driver" and message is not None:
        # Everything fails from now on, each time with a sentence.
        try:
            op()
        except RuntimeError as error:
            assert "start it again" in str(error), error
        else:
            raise AssertionError("a lost context is used")
        # As in the process that is started again; this thread's context could not be restored.
        driver.lib.emulator_reset()
        driver.lib.cuCtxSetCurrent(None)
    after = digest(op())
    assert driver.lib.cuCtxGetCurrent(ctypes.byref(context)) == 0
    return {
        "message": message,
        "failed": failed,
        "after": after,
        "modules": driver.modules(),
        "programs": compiler.lib.emulator_programs(),
        "context": context.value,
    }


def places_of(family: str, code: int, driver: emulation.Driver, compiler: Compiler) -> int:
    """Fails every call of a family's operation.

    Raises:
        AssertionError: With the place where something is wrong.
    """
    op = FAMILIES[family]
    # On the CPU: what Python imports at the first use is imported once.
    _core.emulate_cuda(False)
    op()
    _core.emulate_cuda(True)

    def without():
        found = digest(op())
        sizes = len(driver.calls()), compiler.lib.emulator_compiler_calls()
        assert digest(op()) == found
        return found, sizes, driver.modules()

    expected, (calls, compiler_calls), modules = in_a_fork(without)
    places = [("driver", i + 1) for i in range(calls)]
    places += [("compiler", i + 1) for i in range(compiler_calls)]
    for place in places:
        got = in_a_fork(lambda place=place: attempt(op, driver, compiler, place, code))
        message, failed = got["message"], got["failed"]
        where = f"{family}, {place}, {failed}: {message}"
        if message is None:
            # What was to be given back or restored, which is tried a second time.
            assert failed in ("cuCtxSetCurrent", "nvrtc"), where
        else:
            assert message.startswith("CUDA") and failed.lower() in message.lower(), where
        assert got["after"] == expected, f"{where}: other results afterwards"
        assert got["modules"] <= modules and got["programs"] == 0, f"{where}: a leak, {got}"
        assert got["context"] is None, f"{where}: another current context"
    return len(places)


def main(code: int, families: list[str]) -> None:
    torch.set_num_threads(1)
    driver = emulation.Driver(Path(os.environ["ODDSMITH_CUDA_DRIVER"]))
    compiler = Compiler(Path(os.environ["ODDSMITH_NVRTC"]))
    print(json.dumps({each: places_of(each, code, driver, compiler) for each in families}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
