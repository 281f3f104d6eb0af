"""How fast the operations are on a device, beside its own copy and matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from ..functional import dequantize_nf4, linear_logps, quantize_nf4
from ..optim.adamw.adamw_8bit import AdamW8bit
from .findings import Speed

__all__ = ["speeds"]

_CALLS = 5


def speeds(device: torch.device) -> list[Speed]:
    """
    The rates of the head, NF4 and AdamW, in the device's usual dtype.

    Args:
        device (`torch.device`): Takes about two seconds on a CPU and some 3 GB on a GPU.
    """
    gpu = device.type != "cpu"
    dtype = torch.bfloat16 if gpu else torch.float32
    side, rows, words = (4096, 2048, 32_000) if gpu else (1024, 128, 8192)
    weight = torch.randn(side, side, device=device, dtype=dtype)
    other = torch.empty_like(weight)
    copied = 2.0 * weight.numel() * weight.element_size()
    copy = _seconds(device, lambda: other.copy_(weight))
    product = _seconds(device, lambda: torch.mm(weight, weight, out=other))
    bandwidth, throughput = copied / copy, 2.0 * side**3 / product
    name = str(device)
    found = [
        Speed(name, "copy", copy * 1e3, bandwidth / 1e9, "GB/s", 1.0),
        Speed(name, f"matrix product, {side}", product * 1e3, throughput / 1e12, "TFLOP/s", 1.0),
    ]

    def add(what: str, call: Callable[[], object], moved: float = 0.0, work: float = 0.0) -> None:
        seconds = _seconds(device, call)
        if moved:
            rate, unit, share = moved / seconds / 1e9, "GB/s", moved / seconds / bandwidth
        else:
            rate, unit, share = work / seconds / 1e12, "TFLOP/s", work / seconds / throughput
        found.append(Speed(name, what, seconds * 1e3, rate, unit, share))

    hidden = torch.randn(rows, side, device=device, dtype=dtype)
    head = torch.randn(words, side, device=device, dtype=dtype)
    targets = torch.randint(words, (rows,), device=device)
    add(
        "head, forward", lambda: linear_logps(hidden, head, targets), work=2.0 * rows * side * words
    )
    packed, state = quantize_nf4(weight)
    bytes_of_codes = weight.numel() * (weight.element_size() + 0.5)
    add("NF4, quantise", lambda: quantize_nf4(weight), moved=bytes_of_codes)
    add("NF4, dequantise", lambda: dequantize_nf4(packed, state), moved=bytes_of_codes)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = torch.randn_like(weight)
    optimizer = AdamW8bit([parameter])
    # The parameter is read and written, and so are two moments of a byte; the gradient is read.
    stepped = weight.numel() * (3.0 * weight.element_size() + 4)
    add("AdamW, 8 bits", optimizer.step, moved=stepped)
    return found


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """The median time of a call, after one that compiles and allocates."""
    call()
    times = []
    for _ in range(_CALLS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
