"""Thousands of shapes in one seeded run each: sizes around the edges of blocks, warps and vectors."""

import random

import pytest
import torch

import reference
from oddsmith import functional
from support.gpu_cases import DTYPES, same, to


def edges(draw: random.Random, most: int) -> int:
    """Half of the sizes are within two of a multiple of a power of two."""
    if draw.random() < 0.5:
        return draw.randint(1, most)
    step = 2 ** draw.randint(2, 9)
    return min(most, max(1, step * draw.randint(1, max(1, most // step)) + draw.randint(-2, 2)))


def test_nf4(gpu):
    draw, generator = random.Random(11), torch.Generator().manual_seed(11)
    cases = []
    for _ in range(gpu.count(10_000, 150)):
        most = gpu.count(6000, 1500)
        values = torch.randn(edges(draw, most), generator=generator).to(draw.choice(DTYPES))
        values *= 10 ** draw.uniform(-3, 3)
        # A slice with any start: kernels must not assume alignment to 16 bytes.
        values = values[draw.randint(0, min(3, len(values) - 1)) :]
        cases.append((values, 2 ** draw.randint(5, 12), draw.choice(DTYPES)))
    with gpu.slices():
        expected = []
        for values, blocksize, out in cases:
            packed, state = functional.quantize_nf4(values, blocksize)
            expected.append((packed, state.absmax, functional.dequantize_nf4(packed, state, out)))
    # One copy each way: ten thousand would take longer than the kernels.
    starts, storage = [], torch.cat([values.float() for values, *_ in cases]).to(gpu.device)
    position = 0
    for values, *_ in cases:
        starts.append(position)
        position += len(values)
    found = []
    for (values, blocksize, out), start in zip(cases, starts):
        on_gpu = storage[start : start + len(values)].to(values.dtype)
        packed, state = functional.quantize_nf4(on_gpu, blocksize)
        found.append((packed, state.absmax, functional.dequantize_nf4(packed, state, out)))
    for part in range(3):
        ours, theirs = (
            torch.cat([each[part].flatten().float() for each in several])
            for several in (found, expected)
        )
        assert same(ours, theirs), f"part {part}"


def test_head(gpu):
    draw, generator = random.Random(13), torch.Generator().manual_seed(13)
    errors = []
    for _ in range(gpu.count(2000, 25)):
        rows, width, vocab = edges(draw, 70), edges(draw, 80), 2 + edges(draw, 1200)
        dtype = draw.choice(DTYPES)
        hidden = torch.randn(rows, width, generator=generator).to(dtype)
        weight = (2 * torch.randn(vocab, width, generator=generator)).to(dtype)
        targets = torch.randint(vocab, (rows,), generator=generator)
        targets[torch.rand(rows, generator=generator) < 0.2] = -100
        inputs = to(gpu.device, hidden, weight, targets)
        truth = reference.linear_logps(inputs[0].double(), inputs[1].double(), inputs[2])
        ours = functional.linear_logps(*inputs)
        # Half-precision logits are rounded like half-precision products.
        scale = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        size = (inputs[0].double().norm(dim=1) * inputs[1].double().norm(dim=1).max()).clamp(min=1)
        errors.append(((ours.double() - truth).abs() / size / scale).max())
    worst = torch.stack(errors)
    assert worst.max() <= 1, f"{worst.argmax()}: {worst.max():.2f}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(gpu, dtype):
    draw, generator = random.Random(17), torch.Generator().manual_seed(17)
    errors = []
    for _ in range(gpu.count(2000, 25)):
        rows, columns, tokens = edges(draw, 90), edges(draw, 300), draw.choice([1, 2, 3, 4, 9, 33])
        weight = torch.randn(rows, columns, generator=generator).to(dtype).to(gpu.device)
        x = torch.randn(tokens, columns, generator=generator).to(dtype).to(gpu.device)
        packed, state = functional.quantize_nf4(weight, 2 ** draw.randint(5, 12))
        full = functional.dequantize_nf4(packed, state, torch.float32).double()
        truth = x.double() @ full.T
        ours = functional.linear_nf4(x, packed, state).double()
        errors.append((ours - truth).abs().max() / (8 * torch.finfo(dtype).eps * truth.abs().max()))
    worst = torch.stack(errors)
    assert worst.max() <= 1, f"{worst.argmax()}: {worst.max():.2f}"
