"""The slice algorithms, for comparison with kernels on the emulated GPU."""

import ctypes
import mmap
from contextlib import contextmanager

import torch
from torch import Tensor

from oddsmith import _core

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

NO_ACCESS = 0  # PROT_NONE


@contextmanager
def slices():
    """CPU tensors take the path of the CPU, in a test with the emulated GPU."""
    _core.emulate_cuda(False)
    try:
        yield
    finally:
        _core.emulate_cuda(True)


@contextmanager
def tensor_operations():
    """CPU tensors take the path of devices without kernels, in a test with the emulated GPU."""
    _core.use_tensor_ops(True)
    try:
        with slices():
            yield
    finally:
        _core.use_tensor_ops(False)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal bits, except for the payloads of NaN."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.dtype == torch.uint8:
        return torch.equal(ours, theirs)
    nan = ours.isnan()
    bits = _BITS[ours.dtype]
    return torch.equal(nan, theirs.isnan()) and torch.equal(
        ours.masked_fill(nan, 0).view(bits), theirs.masked_fill(nan, 0).view(bits)
    )


def at_a_page_s_end(tensor: Tensor) -> Tensor:
    """A copy followed by unreadable memory: a kernel that reads past the end ends the process."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(
        pages, dtype=torch.uint8, count=tensor.nbytes, offset=size - tensor.nbytes
    )
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)
