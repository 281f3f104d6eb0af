"""The public functions: their names and definitions."""

import torch

from oddsmith import functional
from oddsmith.head import ops
from oddsmith.quant import linear, nf4, state


def test_names_and_homes():
    homes = {
        "LinearORPOOutput": ops, "linear_logps": ops, "linear_orpo": ops,
        "linear_nf4": linear, "dequantize_nf4": nf4, "quantize_nf4": nf4, "QuantState": state,
    }  # fmt: skip
    assert set(functional.__all__) == set(homes)
    for name, home in homes.items():
        assert getattr(functional, name) is getattr(home, name)


def test_an_example_of_each_kind():
    weight = torch.eye(64)
    packed, quantized = functional.quantize_nf4(weight)
    # 0 and 1 are both values of NF4.
    assert torch.equal(functional.dequantize_nf4(packed, quantized), weight)
    x = torch.arange(64.0)[None]
    torch.testing.assert_close(functional.linear_nf4(x, packed, quantized), x)
    # Logits 0 and log 4, then 0 and -log 4: each row gives its target 4 to 1.
    hidden, head = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [4.0]]).log()
    logps = functional.linear_logps(hidden, head, torch.tensor([1, 0]))
    torch.testing.assert_close(logps, torch.tensor([0.8, 0.8]).log())
