"""The slice algorithms, beside kernels on the emulated card."""

from contextlib import contextmanager

import torch
from torch import Tensor

from oddsmith import _core

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@contextmanager
def slices():
    """CPU tensors take the path of the CPU, in a test where the emulated card is on."""
    _core.emulate_cuda(False)
    try:
        yield
    finally:
        _core.emulate_cuda(True)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to the bit, but for the payloads of NaN."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.dtype == torch.uint8:
        return torch.equal(ours, theirs)
    nan = ours.isnan()
    bits = _BITS[ours.dtype]
    return torch.equal(nan, theirs.isnan()) and torch.equal(
        ours.masked_fill(nan, 0).view(bits), theirs.masked_fill(nan, 0).view(bits)
    )
