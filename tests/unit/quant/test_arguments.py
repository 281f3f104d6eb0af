"""A 4-bit tensor from its parts, as the operators' schemas have them."""

import pytest
import torch

from oddsmith.quant.arguments import NestedScales, PackedWeight, packed_weight

PACKED, ABSMAX = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1)
NESTED, CODE, OFFSET = torch.ones(1), torch.linspace(-1, 1, 256), torch.tensor(0.5)


def test_plain_scales():
    weight = packed_weight(PACKED, ABSMAX, None, None, None, 0, 64)
    assert weight == PackedWeight(PACKED, ABSMAX, None, 64)


def test_quantised_scales():
    weight = packed_weight(PACKED, ABSMAX, NESTED, CODE, OFFSET, 256, 64)
    assert weight.nested == NestedScales(NESTED, CODE, OFFSET, 256)
    assert weight.nested.code is CODE and weight.blocksize == 64


@pytest.mark.parametrize(("code", "offset"), [(None, OFFSET), (CODE, None), (None, None)])
def test_a_part_of_quantised_scales_is_missing(code, offset):
    with pytest.raises(ValueError, match="nested_absmax is given without nested_code and offset"):
        packed_weight(PACKED, ABSMAX, NESTED, code, offset, 256, 64)
