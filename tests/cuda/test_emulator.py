"""The emulated driver: threads that wait for each other, what it refuses, what it records."""

import ctypes
import platform
import struct
import threading
from ctypes import c_double, c_float, c_int, c_int64, c_uint8

import pytest
import torch

from support import emulation

INT = torch.int32


@pytest.fixture(params=["ascending", "descending"])
def driver(request, sample_driver):
    """All results must hold for both orders of the threads."""
    if request.param == "ascending":
        yield sample_driver
    else:
        with sample_driver.reversed():
            yield sample_driver


def test_barriers_in_a_loop(driver):
    x = torch.arange(3 * 100, dtype=INT) % 7
    sums = torch.zeros_like(x)
    driver.launch("scan", x, sums, grid=3, block=100, shared=400)
    assert torch.equal(sums, x.view(3, 100).cumsum(1).flatten().to(INT))


def test_one_of_the_orders_finds_a_missing_barrier(sample_driver):
    x = torch.arange(256, dtype=INT)
    right = []
    for order in (False, True):
        out = torch.zeros_like(x)
        if order:
            with sample_driver.reversed():
                sample_driver.launch("lacks_barrier", x, out, block=256)
        else:
            sample_driver.launch("lacks_barrier", x, out, block=256)
        right.append(torch.equal(out, x.flip(0)))
    assert right != [True, True]


def test_static_and_dynamic_shared_memory(driver):
    out = torch.zeros(32, dtype=INT)
    driver.launch("static_and_dynamic", out, shared=32)
    # Thread 0 reads what thread 31 wrote: 31 * 1000 + 131.
    assert out[0] == 31_131 and torch.equal(out, 1001 * torch.arange(31, -1, -1, dtype=INT) + 100)


def test_dynamic_shared_memory_is_not_zero(driver):
    out = torch.zeros(64)
    driver.launch("reads_dynamic", out, block=64, shared=256)
    assert out.isnan().all()


def test_dynamic_shared_memory_ends(driver):
    driver.launch("overruns", c_int(99), block=1, shared=100)
    with pytest.raises(emulation.DriverError, match="wrote behind its 100 bytes"):
        driver.launch("overruns", c_int(100), block=1, shared=100)


def test_more_shared_memory_must_be_asked_for(driver):
    size = 48 * 1024 + 1
    driver.launch("overruns", c_int(0), block=1, shared=size)  # launch asks
    function = driver.function("overruns")
    at = c_int(0)
    pointers = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.pointer(at), ctypes.c_void_p))
    assert driver.lib.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, size, None, pointers, None) == 1
    assert driver.lib.cuFuncSetAttribute(function, 8, 227 * 1024 + 1) == 1


def test_barriers_count_those_that_have_not_returned(driver):
    out = torch.full((3 * 70,), -1, dtype=INT)
    driver.launch("counts", c_int(50), out, block=70)
    # Of 0..49, 17 are multiples of 3.
    assert out[:150].view(50, 3).unique(dim=0).tolist() == [[17, 0, 1]]
    assert (out[150:] == -1).all()


def test_shuffles(driver):
    out = torch.zeros(160, dtype=INT)
    driver.launch("shuffles", out)
    lanes = range(32)
    assert out[:32].tolist() == [i ^ 5 for i in lanes]
    assert out[32:64].tolist() == [max(i - 3, i if i < 3 else 0) for i in lanes]
    assert out[64:96].tolist() == [i + 3 if i % 8 < 5 else i for i in lanes]
    assert out[96:128].tolist() == [i // 8 * 8 + 2 for i in lanes]
    assert out[128:].tolist() == [1] * 32


def test_votes(driver):
    out = torch.zeros(104, dtype=INT)
    driver.launch("votes", out)
    assert out[:32].unique().tolist() == [0x22222222]
    assert out[32:64].unique().tolist() == [0]
    assert out[64:96].unique().tolist() == [1]
    assert out[96:].unique().tolist() == [0b11000000]


@pytest.mark.parametrize(
    "kernel, block, message",
    [
        ("barrier_in_branch", 32, r"waits for ever at __syncthreads \(samples.cu:\d+\); thread .* is at __syncwarp"),
        ("two_barriers", 64, r"waits for ever at __syncthreads .* is at __syncthreads"),
        ("shuffle_after_return", 32, r"__shfl_xor_sync .* mask 0xffffffff; thread \(7, 0, 0\) has returned"),
        ("shuffle_after_return", 20, r"mask 0xffffffff in a warp of 20 threads"),
        ("foreign_mask", 32, r"__syncwarp .* mask 0x00000001, which lacks the calling lane"),
        ("shuffle_outside_mask", 32, r"reads lane 9, which its mask 0x0000000f lacks"),
    ],
)  # fmt: skip
def test_what_hangs_or_is_undefined_fails(driver, kernel, block, message):
    out = torch.zeros(64)
    arguments = [out] if "shuffle" in kernel else []
    with pytest.raises(emulation.DriverError, match=f"LAUNCH_FAILED: {kernel}: block.*{message}"):
        driver.launch(kernel, *arguments, block=block)
    driver.launch("places", torch.zeros(32, dtype=INT))  # the next launch is not affected


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the fault ends the process there")
@pytest.mark.parametrize("what", range(4))
def test_undefined_behaviour(driver, what):
    out = torch.ones(4, dtype=INT)
    with pytest.raises(
        emulation.DriverError, match=r"thread \(\d, 0, 0\): misaligned access, index"
    ):
        driver.launch("undefined", c_int(what), out, block=9)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the fault ends the process there")
def test_invalid_memory(driver):
    with pytest.raises(
        emulation.DriverError, match=r"thread \(3, 0, 0\): access out of bounds, at 0x8$"
    ):
        driver.launch("stores", ctypes.c_void_p(8))
    out = torch.zeros(1, dtype=INT)
    with pytest.raises(
        emulation.DriverError, match=r"needs more than 131072 bytes of local memory"
    ):
        driver.launch("overflows", out, block=1)
    driver.launch("stores", out)
    assert out.item() == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the fault ends the process there")
def test_guarded_memory(driver):
    with emulation.guarded_memory():
        short = torch.empty(63 * 4, dtype=INT)
        assert short.unique().tolist() == [-1]  # poison
        driver.launch("places", short, block=63 * 4)
        assert torch.equal(short, torch.arange(63 * 4, dtype=INT))
        with pytest.raises(
            emulation.DriverError, match=r"thread \(25\d, 0, 0\): access out of bounds"
        ):
            driver.launch("places", short, block=256)
    with pytest.raises(AssertionError, match="behind a tensor"), emulation.guarded_memory():
        unaligned = torch.empty(3, dtype=INT)
        driver.launch("places", unaligned, block=4)  # the fourth is in the last 16 bytes


def test_trap(driver):
    driver.launch("traps", c_int(99))
    with pytest.raises(emulation.DriverError, match=r"traps: block .*thread \(5, 0, 0\): __trap"):
        driver.launch("traps", c_int(5))


def test_indices_in_three_dimensions(driver):
    out = torch.zeros(2 * 3 * 2 * 4 * 3 * 5, dtype=INT)
    driver.launch("places", out, grid=(2, 3, 2), block=(4, 3, 5))
    assert torch.equal(
        out.view(12, 60), (100 * torch.arange(12).view(12, 1) + torch.arange(60)).to(INT)
    )


def test_arguments_have_the_types_of_the_parameters(driver):
    out = torch.zeros(1, dtype=torch.float64)
    driver.launch(
        "typed", c_int64(2**40), c_float(0.25), c_uint8(200), c_double(1e-3), out, block=1
    )
    assert out.item() == 2**40 + 0.25 + 200 + 1e-3


def test_products_are_not_contracted(driver):
    a, c = 1 + 2.0**-12, -(1 + 2.0**-11)
    out = torch.zeros(3)
    driver.launch("rounds_twice", c_float(a), c_float(a), c_float(c), out, block=1)
    assert out.tolist() == [
        0,
        0,
        2.0**-24,
    ]  # a * a = 1 + 2^-11 + 2^-24; rounding the product loses 2^-24


def test_threads_have_room_for_arrays(driver):
    out = torch.zeros(1024, dtype=INT)
    driver.launch("deep", out, block=1024)
    assert torch.equal(out, torch.arange(4095, 4095 + 1024, dtype=INT))


def test_atomics_across_blocks_and_host_threads(driver):
    x = torch.randint(0, 31, (5000,), dtype=INT, generator=torch.Generator().manual_seed(1))
    bins, total = torch.zeros(32, dtype=INT), torch.zeros(1)
    highest, bits = torch.full((1,), -5, dtype=INT), torch.zeros(1, dtype=INT)

    def launch():
        arguments = (x, c_int64(x.numel()), bins, total, highest, bits)
        driver.launch("histogram", *arguments, grid=40, block=128)

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(bins, 4 * x.bincount(minlength=32).to(INT))
    assert total.item() == 4 * 2500 and highest.item() == x.max()
    assert bits.item() == sum(1 << i for i in x.unique().tolist())


def test_the_launches_are_recorded(sample_driver):
    out = torch.zeros(64, dtype=INT)
    sample_driver.launch("places", out, grid=2, block=(4, 2))
    sample_driver.launch("static_and_dynamic", out, shared=32)
    assert sample_driver.launches() == [
        emulation.Launch("places", (2, 1, 1), (4, 2, 1), 0, 0, 0),
        emulation.Launch("static_and_dynamic", (1, 1, 1), (32, 1, 1), 32, 0, 0),
    ]
    sample_driver.reset()
    assert sample_driver.launches() == []


def test_a_launch_fails_on_request(sample_driver):
    out = torch.zeros(32, dtype=INT)
    sample_driver.fail(2)
    sample_driver.launch("places", out)
    out.zero_()
    with pytest.raises(emulation.DriverError, match="LAUNCH_FAILED: places: failed on request"):
        sample_driver.launch("places", out)
    assert not out.any()
    sample_driver.launch("places", out)
    assert out.any() and len(sample_driver.launches()) == 3


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"grid": 0}, "grid out of range"),
        ({"grid": (1, 65536)}, "grid out of range"),
        ({"block": 0}, "0 threads a block, of at most 64"),
        ({"block": 65}, "65 threads a block, of at most 64"),  # __launch_bounds__(2 * WARP, 1)
    ],
)
def test_sizes_out_of_range(sample_driver, sizes, message):
    with pytest.raises(emulation.DriverError, match=f"INVALID_VALUE: bounded: {message}"):
        sample_driver.launch("bounded", torch.zeros(128, dtype=INT), **sizes)
    assert sample_driver.launches() == []


def test_a_thread_needs_a_context(sample_driver):
    function = sample_driver.function("places")
    results = []
    launch = sample_driver.lib.cuLaunchKernel
    arguments = (function, 1, 1, 1, 1, 1, 1, 0, None, (ctypes.c_void_p * 1)(), None)
    thread = threading.Thread(target=lambda: results.append(launch(*arguments)))
    thread.start()
    thread.join()
    assert results == [201]


def elf_with_section_names(names: bytes) -> bytes:
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 0x28, 64)  # where the section headers are
    struct.pack_into("<H", header, 0x3A, 64)  # their size
    struct.pack_into("<H", header, 0x3E, 0)  # which of them has the names
    section = bytearray(64)
    struct.pack_into("<QQ", section, 0x18, 128, len(names))
    return bytes(header + section) + names


def test_functions_are_looked_for_in_the_module(sample_driver):
    image = elf_with_section_names(b"\0.text.scan\0.nv.info\0")
    sample_driver.function("scan", image)
    with pytest.raises(emulation.DriverError, match="NOT_FOUND: votes is not in the module"):
        sample_driver.function("votes", image)
    with pytest.raises(emulation.DriverError, match="NOT_FOUND: absent is not among the emulated"):
        sample_driver.function("absent")


def test_sizes_of_parameters(sample_driver):
    function = sample_driver.function("typed")
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    found = []
    while not sample_driver.lib.cuFuncGetParamInfo(
        function, ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)
    ):
        found.append((offset.value, size.value))
    assert found == [(0, 8), (8, 4), (12, 1), (16, 8), (24, 8)]


@pytest.mark.parametrize(
    "statement",
    [
        "out[0] = __reduce_add_sync(~0u, 1);",  # newer than the oldest architecture
        "half h; out[0] = h;",
        "atomicAdd(reinterpret_cast<short*>(out), short(1));",
        'asm("mov.u32 %0, %%laneid;" : "=r"(out[0]));',
    ],
)
def test_unknown_features_do_not_compile(tmp_path, statement):
    source = tmp_path / "unknown.cu"
    source.write_text(f'extern "C" __global__ void unknown(int* out) {{ {statement} }}')
    with pytest.raises(emulation.CompileError, match="unknown.cu:1|mov.u32"):
        emulation.build([source])


def test_a_library_is_built_once(tmp_path):
    source = tmp_path / "small.cu"
    source.write_text('extern "C" __global__ void one(int* out) { *out = 1; }')
    library = emulation.build([source])
    written = library.stat().st_mtime_ns
    assert emulation.build([source]) == library and library.stat().st_mtime_ns == written
    source.write_text('extern "C" __global__ void one(int* out) { *out = 2; }')
    assert emulation.build([source]) != library


def test_helpers_of_one_name_in_two_sources(tmp_path):
    sources = []
    for value in (1, 2):
        sources.append(tmp_path / f"file{value}.cu")
        sources[-1].write_text(
            f"__device__ __noinline__ int value() {{ return {value}; }}"
            f'extern "C" __global__ void get{value}(int* out) {{ *out = value(); }}'
        )
    driver = emulation.Driver(emulation.build(sources))
    out = torch.zeros(2, dtype=INT)
    driver.launch("get1", out, block=1)
    driver.launch("get2", out[1:], block=1)
    assert out.tolist() == [1, 2]
