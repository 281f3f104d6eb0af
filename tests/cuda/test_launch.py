"""From Python to a launch: the driver's library, its context, the cache of compiled kernels."""

import ctypes
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from oddsmith import _core, functional, optim
from support import emulation

RUN = """
import torch
from oddsmith import _core
arguments = torch.arange(8.0), torch.linspace(-1, 1, 256), 4
codes, absmax = _core.quantize_blockwise(*arguments)
_core.emulate_cuda(False)
expected_codes, expected_absmax = _core.quantize_blockwise(*arguments)
assert torch.equal(codes, expected_codes) and torch.equal(absmax, expected_absmax)
"""


REPORT_ERROR = """
import sys
import torch
from oddsmith import _core
try:
    _core.quantize_nf4(torch.ones(8), 64)
except RuntimeError as error:
    sys.stderr.write(str(error))
"""


def run(code: str, **environment) -> str:
    """What a new process writes to its error stream."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def library() -> str:
    return str(emulation.build())


def test_processes_share_what_they_compile(library, tmp_path):
    environment = {"ODDSMITH_CUDA_DRIVER": library, "ODDSMITH_CACHE_DIR": str(tmp_path / "kernels")}
    # Both find an empty folder, or one finds the file of the other.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run(RUN, **environment), range(2)))
    (path,) = (tmp_path / "kernels").iterdir()
    assert path.name.startswith("blockwise8-sm_90-") and path.suffix == ".cubin"
    content = path.read_bytes()
    assert b"blockwise8_quantize_f32" in content
    # A compiler opened by its path, with its built-in functions, gives the same result.
    compiler = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libnvrtc.so.*"))[-1]
    path.write_bytes(content[:-5])
    said = run(RUN, **environment, ODDSMITH_NVRTC=str(compiler))
    assert f"{path} is damaged or was changed; it is compiled again" in said
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    assert path.parent.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600
    # A folder that others can change is neither read nor written, and the kernel runs as before.
    path.write_bytes(b"of another")
    path.parent.chmod(0o777)
    said = run(RUN, **environment)
    assert (
        f"{path.parent} can be changed by others: kernels are compiled in memory, by each process; "
        f"chmod go-w {path.parent}" in said
    )
    assert path.read_bytes() == b"of another"


def test_no_driver_is_an_error_that_names_library_and_kernel(tmp_path):
    missing = str(tmp_path / "libnone.so")
    text = run(REPORT_ERROR, ODDSMITH_CUDA_DRIVER=missing)
    assert text.startswith("CUDA kernel nf4_quantize_f32, grid (1, 1, 1), block (256, 1, 1)")
    assert "the CUDA driver cannot be opened" in text and missing in text


def test_a_compiler_that_is_not_one_is_named(library, tmp_path):
    fake = tmp_path / "libnvrtc.so"
    fake.write_bytes(b"none")
    environment = {"ODDSMITH_CUDA_DRIVER": library, "ODDSMITH_NVRTC": str(fake)}
    text = run(REPORT_ERROR, **environment)
    assert text.startswith("CUDA kernel nf4_quantize_f32")
    assert f"ODDSMITH_NVRTC is {fake}" in text


def test_the_previous_context_is_restored(emulated_driver):
    get, put = emulated_driver.lib.cuCtxGetCurrent, emulated_driver.lib.cuCtxSetCurrent
    current, primary = ctypes.c_void_p(), ctypes.c_void_p()

    def after_an_op(context: ctypes.c_void_p) -> int | None:
        assert put(context) == 0
        _core.quantize_nf4(torch.ones(8), 64)
        assert get(ctypes.byref(current)) == 0
        return current.value

    _core.quantize_nf4(torch.ones(8), 64)  # initialises the driver
    assert emulated_driver.lib.cuDevicePrimaryCtxRetain(ctypes.byref(primary), 0) == 0
    try:
        assert after_an_op(None) is None
        assert after_an_op(primary) == primary.value
    finally:
        put(None)
    assert len(emulated_driver.launches()) == 3


def test_emulation_ends():
    """Tensors on the CPU take the CPU path again."""
    assert torch.equal(_core.quantize_nf4(torch.zeros(8), 64)[0], torch.full((4, 1), 0x77).byte())


STREAM_OF = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))


class Streams(threading.local):
    """The current stream of each thread, as libtorch keeps it."""

    current = 0


@pytest.fixture
def streams(emulated_driver):
    """What stands for libtorch's function, and the devices that were asked for."""
    streams, asked = Streams(), []

    @STREAM_OF
    def current(device, stream):
        asked.append(device)
        stream[0] = ctypes.c_void_p(streams.current)
        return int(streams.current == FAILS)

    _core.emulate_streams(ctypes.cast(current, ctypes.c_void_p).value)
    yield streams, asked
    _core.emulate_streams(0)


FAILS = 0xBAD


def forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 64, generator=generator, requires_grad=True)
    weight = torch.randn(96, 64, generator=generator)
    packed, state = functional.quantize_nf4(weight)
    functional.linear_nf4(hidden, packed, state).sum().backward()
    logps = functional.linear_logps(hidden, weight.requires_grad_(), torch.arange(6))
    logps.sum().backward()
    optim.AdamW8bit([hidden, weight], lr=0.1).step()


def test_launches_go_to_the_current_stream_of_their_thread(streams, emulated_driver):
    current, asked = streams

    def on(stream):
        current.current = stream
        forward_and_backward()

    for stream in [0x100, 0x200, 0]:
        before = len(emulated_driver.launches())
        thread = threading.Thread(target=on, args=(stream,))
        thread.start()
        thread.join()
        launches = emulated_driver.launches()[before:]
        assert len({launch.kernel for launch in launches}) > 6
        assert {launch.stream for launch in launches} == {stream}
    assert set(asked) == {0}


def test_a_stream_that_libtorch_does_not_give_is_an_error(streams, emulated_driver):
    streams[0].current = FAILS
    with pytest.raises(RuntimeError, match=r"^libtorch: no current stream of cuda:0$"):
        _core.quantize_nf4(torch.ones(64), 64)
    assert not emulated_driver.launches()


def test_an_exception_of_libtorch_ends_in_an_error(emulated_driver):
    """Without a GPU its own function throws, which must not unwind through Rust."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("this torch was built without CUDA")
    current = ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream
    _core.emulate_streams(ctypes.cast(current, ctypes.c_void_p).value)
    try:
        with pytest.raises(RuntimeError, match=r"^libtorch: no current stream of cuda:0$"):
            _core.quantize_nf4(torch.ones(64), 64)
    finally:
        _core.emulate_streams(0)
    assert not emulated_driver.launches()
