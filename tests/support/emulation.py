"""Builds the emulated CUDA driver from kernels, and drives it.

`build` compiles kernels (*.cu) with the host's compiler into a library with the driver API of CUDA:
a program that loads it instead of libcuda.so.1 launches kernels on host memory. See
tests/cuda/emulator/.
"""

import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .paths import ROOT

KERNELS = ROOT / "kernels"
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
CXX = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -pthread -ffp-contract=off -fno-strict-aliasing "
    "-Wall -Wno-unknown-pragmas -Wno-unused-function "
    # Misaligned vectors, which a GPU refuses, and undefined behaviour of C++ end the launch.
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow -fsanitize-undefined-trap-on-error"
).split()
# Most files in the cache: some dozens of versions of the sources.
KEPT = 200
# `extern` and the emulator's `__shared__` exclude each other.
DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?"
    r"(?P<type>[\w ]+?)\s+(?P<name>\w+)\s*\[\s*\]"
)
KERNEL = re.compile(
    r"__global__\s+(?:void\s+)?(?:__launch_bounds__\((?P<bounds>[^()]*(?:\([^()]*\)[^()]*)*)\)\s*)?"
    r"(?:void\s+)?(?P<name>\w+)\s*\("
)


class CompileError(Exception):
    """A kernel uses a feature that the emulator or C++ does not have."""


def run_compiler(arguments: list[str]) -> str:
    done = subprocess.run([CXX, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


def cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "oddsmith" / "emulator"


def translate(path: Path, headers: Path, target: Path) -> None:
    """Writes a C++ file with the kernel source at `path` and an entry for each of its kernels."""
    source = DYNAMIC_SHARED.sub(
        r"\g<type>* const \g<name> = reinterpret_cast<\g<type>*>(::emulator::dynamic_shared())",
        path.read_text(encoding="utf-8"),
    )
    # Preprocessed, since macros may make kernels.
    plain = run_compiler(["-E", "-P", "-x", "c++", f"-I{headers}", str(path)])
    found = {match["name"]: match["bounds"] for match in KERNEL.finditer(plain)}
    entries = [
        f'[[maybe_unused]] const bool {name}_entered = emulator::enter<&device::{name}>("{name}"'
        + (f", emulator::first({bounds}));" if bounds else ");")
        for name, bounds in found.items()
    ]
    lines = [
        '#include "registry.h"',
        '#include "shim.h"',
        # Helpers of the same name in two sources are two functions.
        "namespace device { namespace {",
        f'#line 1 "{path}"',
        source,
        '#line 1 "entries"',
        "} }",
        "namespace { using namespace device;",
        *entries,
        "}",
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def kernel_names() -> set[str]:
    """Of all kernels in kernels/."""
    arguments = ["-E", "-P", "-x", "c++", f"-I{KERNELS}"]
    plain = "".join(run_compiler([*arguments, str(path)]) for path in KERNELS.glob("*.cu"))
    return {match["name"] for match in KERNEL.finditer(plain)}


def digest(*parts: bytes) -> str:
    result = hashlib.sha256(" ".join([CXX, *FLAGS]).encode())
    for part in parts:
        result.update(len(part).to_bytes(8, "little") + part)
    return result.hexdigest()[:16]


def cached(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make` if it does not exist: complete, and once among all processes."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        # Compilers take seconds: another worker of the same run waits for the first.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        partial = path.with_name(f"{os.getpid()}-{path.name}")
        make(partial)
        partial.rename(path)
        old = sorted(path.parent.glob("*-*.*"), key=lambda each: each.stat().st_mtime)[:-KEPT]
        for each in old:
            each.unlink(missing_ok=True)
    return path


def compile_object(source: Path, headers: Path, defines: tuple[str, ...] = ()) -> Path:
    """The object file of a kernel source, or of a part of the emulator."""
    parts = [source, *sorted(headers.glob("*.cuh")), *sorted(EMULATOR.glob("*.h")), Path(__file__)]
    contents = [part.read_bytes() for part in parts] + [name.encode() for name in defines]
    name = f"{source.stem}-{digest(*contents)}"
    include = [f"-I{headers}", f"-I{EMULATOR}", *(f"-D{name}" for name in defines)]

    def make(target: Path) -> None:
        if source.suffix != ".cu":
            run_compiler([*FLAGS, *include, "-c", str(source), "-o", str(target)])
            return
        with tempfile.TemporaryDirectory() as folder:
            translated = Path(folder) / f"{source.stem}.cpp"
            translate(source, headers, translated)
            run_compiler([*FLAGS, *include, "-c", str(translated), "-o", str(target)])

    return cached(cache_folder() / f"{name}.o", make)


def build(
    sources: Iterable[Path] | None = None, headers: Path = KERNELS, *, old_driver: bool = False
) -> Path:
    """The library for kernel `sources`, those of kernels/ by default; from the cache if it is there.

    Args:
        old_driver (`bool`): Whether it is a driver before CUDA 12.1, with 4 KB for a kernel's arguments.

    Raises:
        CompileError: With the compiler's message.
    """
    kernels = sorted(KERNELS.glob("*.cu")) if sources is None else list(sources)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        own = [EMULATOR / f"{name}.cpp" for name in ("block", "driver", "control")]
        inputs = [*kernels, *own]
        defines = ("SMALL_ARGUMENTS",) if old_driver else ()
        objects = list(
            pool.map(lambda source: str(compile_object(source, headers, defines)), inputs)
        )
    # Nothing else may have loaded the library of C++.
    flags = ["-shared", "-pthread", *objects, "-lstdc++"]
    library = cache_folder() / f"libemulator-{digest(*[flag.encode() for flag in flags])}.so"

    def make(target: Path) -> None:
        run_compiler([*flags, "-o", str(target)])

    return cached(library, make)


def build_compiler() -> Path:
    """A library instead of NVRTC, which takes no time: see nvrtc.cpp."""
    source = EMULATOR / "nvrtc.cpp"
    name = f"libnvrtc-{digest(source.read_bytes())}.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-lstdc++"]

    def make(target: Path) -> None:
        run_compiler([*flags, "-o", str(target)])

    return cached(cache_folder() / name, make)


@contextmanager
def guarded_memory() -> Iterator[None]:
    """CPU tensors end at a page that cannot be accessed, and begin with poison: see guard.cpp.

    Raises:
        AssertionError: At the end, if something was written after the end of a tensor.
    """
    import torch  # the library needs its libc10

    torch_folder = Path(torch.__file__).parent
    source = EMULATOR / "guard.cpp"
    name = f"libguard-{digest(source.read_bytes(), torch.__version__.encode())}.so"

    def make(target: Path) -> None:
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-isystem", str(torch_folder / "include")]
        link = [f"-L{torch_folder / 'lib'}", "-lc10"]
        run_compiler([*flags, str(source), *link, "-o", str(target)])

    lib = ctypes.CDLL(str(cached(cache_folder() / name, make)))
    lib.guard_overwritten.restype = ctypes.c_long
    before = lib.guard_overwritten()
    lib.guard_install()
    try:
        yield
    finally:
        lib.guard_remove()
    assert lib.guard_overwritten() == before, "bytes right behind a tensor were written"


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    device: int


class DriverError(Exception):
    """A call of the driver API failed: name of the error, and why."""


class Driver:
    """The emulated driver: its recorder and switches, and launches without src/cuda."""

    def __init__(self, library: Path):
        self.library = library
        self.lib = ctypes.CDLL(str(library))
        self.lib.emulator_launches.restype = ctypes.c_long
        self.lib.emulator_launch.restype = ctypes.c_char_p
        self.lib.emulator_launch.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.lib.emulator_fail.argtypes = [ctypes.c_long]
        self.lib.emulator_calls.restype = ctypes.c_long
        self.lib.emulator_call.restype = ctypes.c_char_p
        self.lib.emulator_call.argtypes = [ctypes.c_long]
        self.lib.emulator_fail_call.argtypes = [ctypes.c_long, ctypes.c_int]
        self.lib.emulator_modules.restype = ctypes.c_long
        self.lib.emulator_launch_device.argtypes = [ctypes.c_long]
        self.lib.emulator_capture.argtypes = [ctypes.c_void_p]
        self.lib.emulator_end_capture.restype = ctypes.c_long

    def launches(self) -> list[Launch]:
        """All launches since the last reset, failed ones too."""
        result = []
        for index in range(self.lib.emulator_launches()):
            sizes, stream = (ctypes.c_uint * 7)(), ctypes.c_void_p()
            name = self.lib.emulator_launch(index, sizes, ctypes.byref(stream)).decode()
            s = list(sizes)
            device = self.lib.emulator_launch_device(index)
            result.append(
                Launch(name, tuple(s[:3]), tuple(s[3:6]), s[6], stream.value or 0, device)
            )
        return result

    def reset(self) -> None:
        """Resets the recorded launches, the requested failure, and the order of threads."""
        self.lib.emulator_reset()

    def fail(self, count: int) -> None:
        """Makes the `count`-th launch from now fail; 0: none."""
        self.lib.emulator_fail(count)

    def calls(self) -> list[str]:
        """The names of the calls of the driver since the last reset."""
        return [self.lib.emulator_call(i).decode() for i in range(self.lib.emulator_calls())]

    def fail_call(self, count: int, code: int = 999) -> None:
        """Makes the `count`-th call of the driver from now fail with an error, whatever it is; 0: none."""
        self.lib.emulator_fail_call(count, code)

    def modules(self) -> int:
        """How many modules are loaded."""
        return self.lib.emulator_modules()

    def capture(self, stream: int) -> None:
        """Has launches on a stream captured in a graph, and not run."""
        self.lib.emulator_capture(stream)

    def end_capture(self) -> int:
        """How many launches the graph has; -1 if it is invalid."""
        return self.lib.emulator_end_capture()

    def replay(self) -> None:
        """Runs the graph."""
        self.lib.emulator_replay()

    @contextmanager
    def reversed(self) -> Iterator[None]:
        """Threads and blocks run in descending order: a missing barrier gives wrong results in one
        order."""
        self.lib.emulator_reverse(1)
        try:
            yield
        finally:
            self.lib.emulator_reverse(0)

    def check(self, result: int) -> None:
        if result:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self.lib.cuGetErrorName(result, ctypes.byref(name))
            self.lib.cuGetErrorString(result, ctypes.byref(text))
            raise DriverError(f"{name.value.decode()}: {text.value.decode()}")

    def function(self, kernel: str, image: bytes = b"any image") -> ctypes.c_void_p:
        """A kernel of a module, in the device's primary context, made current."""
        context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.lib.cuInit(0))
        self.check(self.lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
        self.check(self.lib.cuCtxSetCurrent(context))
        self.check(self.lib.cuModuleLoadData(ctypes.byref(module), image))
        self.check(self.lib.cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()))
        return function

    def launch(self, kernel: str, *arguments, grid=1, block=32, shared=0) -> None:
        """Runs a kernel. Tensors are passed as pointers, other arguments are ctypes values."""
        function = self.function(kernel)
        values = [
            a if isinstance(a, ctypes._SimpleCData) else ctypes.c_void_p(a.data_ptr())
            for a in arguments
        ]
        pointers = (ctypes.c_void_p * max(1, len(values)))(
            *[ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        )
        if shared > 48 << 10:
            self.check(self.lib.cuFuncSetAttribute(function, 8, shared))
        sizes = [*three(grid), *three(block)]
        self.check(self.lib.cuLaunchKernel(function, *sizes, shared, None, pointers, None))


def three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else size
    return (*size, 1, 1, 1)[:3]
