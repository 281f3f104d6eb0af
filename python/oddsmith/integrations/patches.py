"""The list of all changes that oddsmith makes to other libraries, to models and to the process.

No other folder changes other libraries. Each entry says what it changes, why, with which versions
it was tested and what happens if it does not fit; see [`~oddsmith.integrations.patch.Patch`].
"""

from __future__ import annotations

from .attention_table import AttentionTable
from .bitsandbytes_layers import AdoptedLayers, KeptLayout
from .checkpointing import Checkpointing
from .cpu_memory import CpuMemoryPool
from .dropout import NoDropout
from .import_hook import ImportHook
from .kept_layers import KeptLayers
from .module_forward import ModuleForward
from .parameter_count import ParameterCount
from .patch import Patch
from .peft_dispatch import LoraDispatch
from .peft_merge import AdapterMerging
from .progress_bars import NoProgressBars
from .quantizer_table import QuantizerMerge, QuantizerTable

__all__ = ["PATCHES"]

PATCHES: tuple[type[Patch], ...] = (
    # Tables of transformers and peft, for the process.
    ImportHook,
    QuantizerTable,
    QuantizerMerge,
    ParameterCount,
    AttentionTable,
    LoraDispatch,
    AdapterMerging,
    # A model, while it is trained.
    ModuleForward,
    NoDropout,
    Checkpointing,
    KeptLayers,
    AdoptedLayers,
    KeptLayout,
    # The process, while it trains.
    CpuMemoryPool,
    NoProgressBars,
)
