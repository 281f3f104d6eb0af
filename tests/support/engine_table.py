"""The table of engines and features: which cells each engine has, and what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .deepspeed_on_cpu import zero
from .engine_cells import CELLS, CHECKPOINTS, EVERY, IN_32_BITS, IN_BFLOAT16, LORA_ON_ROWS
from .engine_runs import FEATURES
from .engines import ENGINES, Engine

__all__ = ["BY_TENSORS", "DEEPSPEED", "FSDP_AND_DDP", "NOT_GATHERED", "Row", "table"]


@dataclass(frozen=True)
class Row:
    """
    An engine of the table.

    Args:
        engine (`Engine`): How a run is spread.
        cells (`Sequence`): Names of the cells that run.
        refused (`dict`): Cell -> what is refused, in the words of the error.
        micro_batches (`int`): Batches of one process that are one of this engine.
        path (`str`, *optional*): Why batches go another way than in one process.
    """

    engine: Engine
    cells: Sequence[str]
    refused: dict[str, str] = field(default_factory=dict)
    micro_batches: int = 2
    path: str | None = None


_GALORE = ("galore_adamw", "galore_adamw_8bit")
_NF4 = [cell for cell in CELLS if cell.startswith("NF4")]
_QUANTISED = "splits weights while they are loaded, before they can be quantised to 4 bits"
_NO_PROJECTION = dict.fromkeys(_GALORE, "a projection needs full matrices")
# By transformers.
_RESUMES = "ValueError: Resuming is not supported for models sharded at load time"
_OF_FSDP2 = {
    **_NO_PROJECTION,
    "NF4 in float32, computed in bfloat16": "FSDP2 computes in bfloat16, to which it",
}
_LOADED = {
    **_NO_PROJECTION,
    **dict.fromkeys(_NF4, _QUANTISED),
    CHECKPOINTS: _RESUMES,
}
FSDP_AND_DDP = {
    "DDP": Row(ENGINES["DDP"], [*CELLS]),
    "FSDP2 by arguments": Row(ENGINES["FSDP2 by arguments"], [*CELLS], _OF_FSDP2),
    "FSDP2 by environment": Row(ENGINES["FSDP2 by environment"], [*CELLS], _OF_FSDP2),
    "FSDP2 by DistributedConfig": Row(
        ENGINES["FSDP2 by DistributedConfig"], [*CELLS, CHECKPOINTS], _LOADED
    ),
}

# DeepSpeed makes one flat tensor of many parameters, whose blocks of 8-bit moments are others.
_OF_ZERO = {
    "galore_adamw": "ValueError: optim is 'galore_adamw' with DeepSpeed ZeRO-",
    "NF4 in float32, computed in bfloat16": "DeepSpeed computes in bfloat16, to which it",
}
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# As `accelerate launch` sets them.
_ENVIRONMENT = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}
# Checkpoints stay in parts; what is saved at the end is whole.
NOT_GATHERED = "ZeRO-3 with checkpoints in parts"
_WITH_ZERO = [*FEATURES, *IN_32_BITS, *IN_BFLOAT16]
DEEPSPEED = {
    "ZeRO-1": Row(Engine(zero(1)), [*IN_32_BITS, "adamw_8bit"]),
    "ZeRO-2": Row(Engine(zero(2)), _WITH_ZERO, _OF_ZERO),
    "ZeRO-2 with offload": Row(Engine(zero(2, **_OFFLOAD)), [*IN_32_BITS, "adamw_8bit"]),
    "ZeRO-2 by environment": Row(
        Engine({"use_cpu": False}, _ENVIRONMENT),
        ["full", "full in bfloat16", *IN_32_BITS, "galore_adamw"],
        _OF_ZERO,
    ),
    "ZeRO-3": Row(Engine(zero(3)), _WITH_ZERO, _OF_ZERO),
    NOT_GATHERED: Row(
        Engine(zero(3, stage3_gather_16bit_weights_on_model_save=False)),
        ["full", "LoRA", "NF4 + LoRA", "full in bfloat16"],
    ),
}

BY_TENSORS = {
    "tensor parallelism": Row(
        Engine(distributed={"tp_size": 2}),
        [*FEATURES, *IN_32_BITS, *IN_BFLOAT16, LORA_ON_ROWS, CHECKPOINTS],
        {
            "galore_adamw": "ValueError: optim is 'galore_adamw' with tensor parallelism",
            "LoRA": "ValueError: tensor parallelism splits the columns of base_model.model.model.layers",
            CHECKPOINTS: _RESUMES,
            **dict.fromkeys(_NF4, _QUANTISED),
        },
        micro_batches=1,  # both processes train on the rows of one
        path="its output head is split by tensor parallelism",
    ),
}

# The rows of docs/distributed.md, and its columns with the cells that they stand for.
_ROWS = {
    **FSDP_AND_DDP,
    **{name: DEEPSPEED[name] for name in ("ZeRO-2", "ZeRO-3")},
    **BY_TENSORS,
}
_COLUMNS = {
    "full": ["full", "full in bfloat16"],
    "LoRA": ["LoRA", LORA_ON_ROWS],
    "4-bit + LoRA": ["NF4 + LoRA", "NF4 in float32 + LoRA", "NF4 in bfloat16 + LoRA"],
    "gradient checkpointing": ["checkpointing"],
    "tied embeddings": ["tied"],
    "`max_tokens_per_batch`": ["max_tokens_per_batch"],
    "uneven evaluation": ["uneven evaluation"],
    "8-bit AdamW": ["adamw_8bit"],
    "paged AdamW": ["paged_adamw_32bit"],
    "GaLore": [*_GALORE],
    "resumed runs": ["full", CHECKPOINTS],
}


def table() -> str:
    """
    The table of docs/distributed.md.

    Raises:
        ValueError: If a cell is not tested.
    """
    lines = [["Engine", *_COLUMNS], ["---"] * (1 + len(_COLUMNS))]
    for name, row in _ROWS.items():
        lines.append([name, *(_state(name, row, column) for column in _COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _state(name: str, row: Row, column: str) -> str:
    tested = [cell for cell in _COLUMNS[column] if cell in row.cells]
    if not tested:
        raise ValueError(f"{name} has no test of {column}")
    if column == "resumed runs" and CHECKPOINTS in tested:
        tested = [CHECKPOINTS]  # the others of such an engine have no checkpoints
    assert all(cell in EVERY for cell in tested)
    refused = [cell in row.refused for cell in tested]
    return "refused" if all(refused) else "in part" if any(refused) else "works"
