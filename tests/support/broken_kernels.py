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
