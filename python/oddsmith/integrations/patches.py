"""Every change that oddsmith makes to another library, to a model or to the process: one list.

Nothing outside this room changes what belongs to others. Each entry says what it changes, why, with
which versions it was tested and what happens where it does not fit; see
[`~oddsmith.integrations.patch.Patch`].
"""

from __future__ import annotations

from .bitsandbytes_layers import AdoptedLayers
from .checkpointing import Checkpointing
from .cpu_memory import CpuMemoryPool
from .dropout import NoDropout
from .import_hook import ImportHook
from .model_attention import SdpaAttention
from .module_forward import ModuleForward
from .parameter_count import ParameterCount
from .patch import Patch
from .peft_dispatch import LoraDispatch
from .progress_bars import NoProgressBars
from .quantizer_table import QuantizerMerge, QuantizerTable

__all__ = ["PATCHES"]

PATCHES: tuple[type[Patch], ...] = (
    # What transformers and peft look up, for the process.
    ImportHook,
    QuantizerTable,
    QuantizerMerge,
    ParameterCount,
    SdpaAttention,
    LoraDispatch,
    # A model, for as long as it is trained.
    ModuleForward,
    NoDropout,
    Checkpointing,
    AdoptedLayers,
    # The process, for as long as it trains.
    CpuMemoryPool,
    NoProgressBars,
)
