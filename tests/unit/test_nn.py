"""The public modules: their names and definitions."""

import torch

from oddsmith import nn
from oddsmith.quant import modules


def test_names_and_homes():
    assert set(nn.__all__) == {"Linear4bit", "Params4bit"}
    assert nn.Linear4bit is modules.Linear4bit and nn.Params4bit is modules.Params4bit


def test_a_layer_keeps_what_nf4_can_hold():
    layer = torch.nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(64))  # 0 and 1 are both values of NF4
    quantized = nn.Linear4bit.from_linear(layer).to("cpu")
    assert isinstance(quantized.weight, nn.Params4bit) and quantized.weight.dtype == torch.uint8
    x = torch.arange(64.0)[None]
    torch.testing.assert_close(quantized(x), x + layer.bias)
