"""Matrix products of float32 tensors by a CPU's bfloat16 instructions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

__all__ = ["bf16_products", "cpu_has_bf16"]

# Values of ONEDNN_MAX_CPU_ISA without bfloat16 instructions.
_WITHOUT = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 by instructions; without them torch emulates it."""
    # {"avx512_bf16": True, "amx_bf16": False, ...} on x86, "bf16" on ARM; absent from older torch.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(name.endswith("bf16") and present is True for name, present in capabilities.items())


def _can_use_them() -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    there = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    return there and cpu_has_bf16() and limit.upper() not in _WITHOUT


@contextmanager
def bf16_products(wanted: bool) -> Iterator[None]:
    """
    A context in which libtorch rounds the factors of `float32` products on a CPU to bfloat16, and
    adds up in `float32`: what autocast does, but for the rounded result.

    Args:
        wanted (`bool`): If false, or if the CPU has no bfloat16 instructions, it has no effect.
    """
    if not (wanted and _can_use_them()):
        yield
        return
    # A setting of the process; it is the one for oneDNN alone, so that GPUs do not see it.
    matmul = cast(Any, torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
