"""The cells of the table of engines and features: what they train, what is refused, how exact it is."""

import math
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
    "adamw_8bit in 32 bits": Feature(
        arguments={"optim": "adamw_8bit", "optim_args": "min_8bit_size=1000000"}
    )
}
# For tensor parallelism, which refuses adapters on layers whose columns are split.
LORA_ON_ROWS = "LoRA on layers whose rows are split"
_ROWS = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}
CHECKPOINTS = "checkpoints"
#: The cells of all engines.
EVERY = {
    **CELLS,
    **IN_32_BITS,
    LORA_ON_ROWS: Feature(lora=_ROWS),
    CHECKPOINTS: Feature(arguments={"save_strategy": "steps"}),
}
# The same without rounding to 8 and 16 bits.
TRUTHS = {
    "adamw_8bit": IN_32_BITS["adamw_8bit in 32 bits"],
    "full in bfloat16": FEATURES["full"],
    "NF4 in bfloat16 + LoRA": Feature(dtype="bfloat16", nf4={}, lora=LORA, upcast=True),
    "NF4 in float32, computed in bfloat16": FEATURES["NF4 + LoRA"],
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
# No reduction takes another order.
TO_THE_BIT = ("DDP",)

_TIMES = ("runtime", "per_second", "preparation_time")

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


def differences(engine: str, found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a run of two processes.

    Args:
        engine (`str`): Its name.
        found (`dict`): What two processes gave.
        expected (`dict`): What one process gave, with its `truth` if the run rounds.

    Yields:
        `str`: A line for each difference.
    """
    if "error" in found:
        yield found["error"]
        return
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in found["weights"].items():
        if torch.equal(weight, found["before"][name]):
            yield f"{name} has not moved"
        if "resumed" in found and not torch.equal(weight, found["resumed"][name]):
            yield f"{name} differs in a resumed run"
    if found["path"] != expected["path"]:
        yield found["path"]
    if "truth" in expected and engine not in TO_THE_BIT:
        yield from _further(found, expected, expected["truth"])
    else:
        yield from _unequal(found, expected, 0.0 if engine in TO_THE_BIT else 1e-4)


def _unequal(found: dict[str, Any], expected: dict[str, Any], room: float) -> Iterator[str]:
    for mine, other in zip(found["losses"], expected["losses"], strict=True):
        if abs(mine - other) > room:
            yield f"loss {mine} for {other}"
    for name, weight in found["weights"].items():
        if (error := (weight - expected["weights"][name]).abs().max().item()) > room:
            yield f"{name} is {error:.1e} off"
    metrics, others = found.get("metrics", {}), expected.get("metrics", {})
    if metrics.keys() != others.keys():
        yield f"metrics {sorted(metrics)} for {sorted(others)}"
    for name, value in metrics.items():
        # Of another order of sums, in evaluation also under DDP.
        if not any(part in name for part in _TIMES) and abs(value - others[name]) > 1e-4:
            yield f"{name} {value} for {others[name]}"


def _further(
    found: dict[str, Any], expected: dict[str, Any], truth: dict[str, Any]
) -> Iterator[str]:
    """Where two processes are further from the truth than one process, which rounds too."""
    for mine, true in zip(found["losses"], truth["losses"], strict=True):
        # Half a unit in bfloat16's last place.
        if abs(mine - true) > 2.0 ** (math.floor(math.log2(true)) - 8):
            yield f"loss {mine}, without rounding {true}"
    weights = truth["weights"]
    for name, weight in found["weights"].items():
        # A weight with a wrong gradient is as far off as it has moved.
        moved = weights[name] - expected["before"][name]
        if (weight - weights[name]).norm() > moved.norm() / 2:
            yield f"{name} has moved to another place"
    # Of a single weight they are as random as roundings are: those of A, whose gradients are products
    # with B, which begins at zero, differ by a factor of nine.
    factors = {name for name in weights if "lora_A" in name}
    for kind in filter(None, (factors, weights.keys() - factors)):
        mine, other = (
            sum((each["weights"][name] - weights[name]).square().sum() for name in kind) ** 0.5
            for each in (found, expected)
        )
        # FSDP2 rounds gradients too: about as many roundings again. Measured are 0.9 to 1.3.
        if mine > 2 * other:
            yield f"the weights are {mine / other:.2f} times as far from the truth as one process's"
