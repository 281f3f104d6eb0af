"""The block sizes of NF4 are those that the compiled core takes."""

import pytest
import torch

from oddsmith.functional import quantize_nf4
from oddsmith.quant.block_sizes import BLOCK_SIZES


def test_the_core_takes_them_and_no_others():
    values = torch.linspace(-1, 1, 8192)
    powers = [1 << power for power in range(15)]
    assert set(BLOCK_SIZES) <= set(powers)
    for size in powers:
        if size in BLOCK_SIZES:
            assert quantize_nf4(values, size)[1].absmax.numel() == 8192 // size
        else:
            with pytest.raises(ValueError, match=f"blocksize is {size}"):
                quantize_nf4(values, size)
