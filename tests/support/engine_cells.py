"""The cells of the table of engines and features: what they train."""

import torch

from .engine_runs import FEATURES, LORA, Feature

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
_ROWS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens"]
CHECKPOINTS = "checkpoints"
#: The cells of all engines.
EVERY = {
    **CELLS,
    **IN_32_BITS,
    LORA_ON_ROWS: Feature(lora={"r": 4, "target_modules": _ROWS}),
    CHECKPOINTS: Feature(arguments={"save_strategy": "steps"}),
}
# The same without rounding to 8 and 16 bits.
TRUTHS = {
    "adamw_8bit": IN_32_BITS["adamw_8bit in 32 bits"],
    "full in bfloat16": FEATURES["full"],
    "NF4 in bfloat16 + LoRA": Feature(dtype="bfloat16", nf4={}, lora=LORA, upcast=True),
    "NF4 in float32, computed in bfloat16": FEATURES["NF4 + LoRA"],
}
