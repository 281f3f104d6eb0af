"""Kernels that are broken on purpose, on the emulated driver: see `fault_of` in tests/cuda/emulator/driver.cpp."""

# Of each family: a kernel, and its parameter with a result.
KERNELS = {
    "head_forward": ("head_forward", 8),
    "head_expectation": ("head_expectation", 8),
    "head_gradient": ("head_gradient", 0),
    "head_batch": ("head_scores", 17),
    "nf4_quantize": ("nf4_quantize", 1),
    "nf4_dequantize": ("nf4_dequantize", 6),
    "nf4_product": ("nf4_multiply", 8),
    "blockwise8": ("blockwise8_dequantize", 3),
    "adamw8": ("adamw8bit_", 0),
    "adamw32": ("adamw_", 0),
}
FAMILIES = list(KERNELS)
# Of each kernel, without its dtype: the family whose operations launch it, its parameters with results, and the byte of
# the result that is changed.
RESULTS = {
    "adamw8bit": ("adamw8", (0,), 3),
    "adamw": ("adamw32", (0,), 3),
    "blockwise8_quantize": ("blockwise8", (2, 3), 3),
    "blockwise8_dequantize": ("blockwise8", (3,), 3),
    # Of the fourth row of several tiles: the first has no target.
    "head_add": ("head_expectation", (0,), 4 * 3 * 24 + 3),
    "head_expectation": ("head_expectation", (8, 10), 3),
    "head_finish": ("head_expectation", (11,), 3),
    "head_forward": ("head_forward", (8, 10), 3),
    "head_gradient": ("head_gradient", (0,), 3),
    # Another index would be used, in the memory of the host.
    "head_layout": ("head_batch", (9,), 0),
    "head_scale": ("head_batch", (0,), 3),
    "head_scale_rows": ("head_batch", (0,), 3),
    "head_scores": ("head_batch", (16, 17), 3),
    "head_side_means": ("head_batch", (6,), 3),
    "nf4_dequantize": ("nf4_dequantize", (6,), 3),
    "nf4_multiply1": ("nf4_product", (8,), 3),
    "nf4_multiply4": ("nf4_product", (8,), 3),
    "nf4_multiply8": ("nf4_product", (8,), 3),
    "nf4_quantize": ("nf4_quantize", (1, 2), 3),
}
WAYS = ("wrong", "bounds", "hang", "compile")


def fault(way: str, *families: str) -> str:
    """What EMULATOR_FAULT must be."""
    parts = [KERNELS[family] for family in families]
    return ",".join(f"{way}:{kernel}:{parameter}" for kernel, parameter in parts)


def broken(way: str, family: str) -> dict[str, str]:
    """The environment in which a family is broken in one of the [`WAYS`]."""
    from oddsmith import _core

    if way == "compile":
        return {"EMULATOR_COMPILE_ERROR": dict(_core.kernel_families())[family][0]}
    return {"EMULATOR_FAULT": fault(way, family)}
