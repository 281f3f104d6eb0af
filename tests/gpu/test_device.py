"""Tensors of two devices in one op: refused before a kernel gets a pointer that it cannot read."""

import pytest
import torch

import oddsmith.functional  # noqa: F401 - registers the operators


@pytest.mark.gpu
@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5])
def test_operators_refuse_a_tensor_of_the_cpu(place):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    rows = torch.arange(6)
    tensors = [torch.randn(6, 16), torch.randn(32, 16), torch.randn(32), rows, rows // 3, rows > 2]
    tensors = [tensor if i == place else tensor.cuda() for i, tensor in enumerate(tensors)]
    rest = (0.3, None, 1.0, "full", "logsigmoid", 1, None, None, True, True, True)
    with pytest.raises(ValueError, match=r"is on \w+(:0)?; must be on the device of hidden"):
        torch.ops.oddsmith.linear_orpo(*tensors, *rest)
