"""Ops launch their kernels: a fallback would give the same numbers, more slowly."""

import pytest
import torch

import oddsmith.optim
from oddsmith import functional
from support.gpu_cases import DTYPES, loss_and_gradients, pairs, to, weights

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4(gpu, dtype):
    name, values = NAMES[dtype], weights((64, 128), dtype).to(gpu.device)
    found = gpu.kernels(lambda: functional.quantize_nf4(values, double_quant=True))
    assert found >= {f"nf4_quantize_{name}", "blockwise8_quantize_f32"}
    packed, state = functional.quantize_nf4(values)
    found = gpu.kernels(lambda: functional.dequantize_nf4(packed, state))
    assert f"nf4_dequantize_{name}" in found
    for tokens, kernel in (
        (1, "multiply1"),
        (4, "multiply4"),
        (8, "multiply8"),
        (40, "dequantize"),
    ):
        x = torch.ones(tokens, 128, dtype=dtype, device=gpu.device)
        found = gpu.kernels(lambda x=x: functional.linear_nf4(x, packed, state))
        assert f"nf4_{kernel}_{name}" in found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head(gpu, dtype):
    name = NAMES[dtype]
    hidden, weight, *rows = to(gpu.device, *pairs(1009, 64, ((3, 17), (3, 29)), dtype))

    def orpo(trained):
        return lambda: loss_and_gradients(functional.linear_orpo, hidden, weight, rows, trained)

    shared = {"head_layout", "head_scores"}
    assert gpu.kernels(orpo(False)) >= shared | {f"head_expectation_{name}", f"head_finish_{name}"}
    assert gpu.kernels(orpo(True)) >= shared | {"head_forward", f"head_gradient_{name}"}
    logps = gpu.kernels(lambda: functional.linear_logps(hidden, weight, rows[0]))
    assert "head_forward" in logps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("AdamW8bit", "adamw8bit"), ("PagedAdamW8bit", "adamw8bit"), ("PagedAdamW32bit", "adamw")],
)
def test_adamw(gpu, kind, kernel, dtype):
    parameter = torch.nn.Parameter(torch.ones(5000, dtype=dtype, device=gpu.device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = getattr(oddsmith.optim, kind)([parameter])
    assert f"{kernel}_{NAMES[dtype]}" in gpu.kernels(optimizer.step)
