"""The cells of the table of engines and features: what they train, what is refused, how exact it is."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from .engine_runs import FEATURES, LORA, Feature
from .engines import ENGINES

# What is the same for every engine is in float32 alone.
_NF4_BFLOAT16 = {"bnb_4bit_quant_storage": torch.bfloat16, "compute_dtype": "bfloat16"}
IN_BFLOAT16 = {
    "full in bfloat16": Feature(arguments={"bf16": True}),
    "NF4 in bfloat16 + LoRA": Feature(
        dtype="bfloat16", nf4=_NF4_BFLOAT16, lora=LORA, arguments={"bf16": True}
    ),
    "NF4 in float32, computed in bfloat16": Feature(
        nf4={"bnb_4bit_quant_storage": torch.float32}, lora=LORA, arguments={"bf16": True}
    ),
}
_GALORE = FEATURES["galore_adamw"].arguments
CELLS = {
    **FEATURES,
    "galore_adamw_8bit": Feature(arguments={**_GALORE, "optim": "galore_adamw_8bit"}),
    **IN_BFLOAT16,
}

# For engines that make other blocks of 8-bit moments: without blocks they equal one process.
IN_32_BITS = {
    "adamw_8bit in 32 bits": dataclasses.replace(
        FEATURES["adamw_8bit"],
        arguments={"optim": "adamw_8bit", "optim_args": "min_8bit_size=1000000"},
    )
}

_FSDP2 = ("FSDP2 by arguments", "FSDP2 by environment")
_LOADED = "FSDP2 by DistributedConfig"
_QUANTISED = "splits weights while they are loaded, before they can be quantised to 4 bits"
# (engine, cell) -> what is refused, in the words of the error.
REFUSED: dict[tuple[str, str], str] = {
    **{
        (name, cell): "a projection needs full matrices"
        for name in (*_FSDP2, _LOADED)
        for cell in ("galore_adamw", "galore_adamw_8bit")
    },
    **{(_LOADED, cell): _QUANTISED for cell in CELLS if cell.startswith("NF4")},
    **{
        (name, "NF4 in float32, computed in bfloat16"): "FSDP2 computes in bfloat16, to which it"
        for name in _FSDP2
    },
}
# Cells whose results may be rounded in another way, and by how much of what a weight has moved: where
# an 8-bit block ends, and whether weights or inputs are cast to bfloat16.
ROUNDED = {"adamw_8bit": 0.1, **dict.fromkeys(IN_BFLOAT16, 0.15)}
# No reduction takes another order.
TO_THE_BIT = ("DDP",)

# The columns of docs/distributed.md, and the cells that they stand for.
_COLUMNS = {
    "full": ["full", "checkpointing", "tied", "uneven evaluation", "full in bfloat16"],
    "LoRA": ["LoRA"],
    "4-bit + LoRA": ["NF4 + LoRA", "NF4 in float32 + LoRA", "NF4 in bfloat16 + LoRA"],
    "`max_tokens_per_batch`": ["max_tokens_per_batch"],
    "8-bit AdamW": ["adamw_8bit"],
    "paged AdamW": ["paged_adamw_32bit"],
    "GaLore": ["galore_adamw", "galore_adamw_8bit"],
}


def table() -> str:
    """The table of docs/distributed.md."""
    rows = [["Engine", *_COLUMNS], ["---"] * (1 + len(_COLUMNS))]
    for name in ENGINES:
        refused = [any((name, cell) in REFUSED for cell in cells) for cells in _COLUMNS.values()]
        rows.append([name, *("refused" if each else "works" for each in refused)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(
    engine: str, found: dict[str, Any], expected: dict[str, Any], rounded: float | None = None
) -> Iterator[str]:
    """What differs from one process; `rounded` is allowed, as a share of a weight's movement."""
    if "error" in found:
        yield found["error"]
        return
    room = 0.0 if engine in TO_THE_BIT else 1e-4
    for mine, other in zip(found["losses"], expected["losses"], strict=True):
        if abs(mine - other) > (room if rounded is None else 2e-2):
            yield f"loss {mine} for {other}"
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in found["weights"].items():
        before, wanted = expected["before"][name], expected["weights"][name]
        if torch.equal(weight, found["before"][name]):
            yield f"{name} has not moved"
        if rounded is not None:
            share = ((weight - wanted).norm() / (wanted - before).norm()).item()
            # The gradients of A are products with B, which begins at zero.
            if share > rounded * (5 if "lora_A" in name else 1):
                yield f"{name} is {share:.1%} of its movement off"
        elif (error := (weight - wanted).abs().max().item()) > room:
            yield f"{name} is {error:.1e} off"
        if "resumed" in found and not torch.equal(weight, found["resumed"][name]):
            yield f"{name} differs in a resumed run"
    if found["path"] != expected["path"]:
        yield found["path"]
