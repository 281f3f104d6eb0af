"""How a run is spread over processes, as accelerate knows it: the one place that asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState, is_initialized
from torch import nn

from .split_adapters import check_adapter_layers

__all__ = ["Engine", "check_engine", "data_parallel", "engine_of", "splits_batches"]

# Dimensions of a mesh whose processes work on the same rows.
_SAME_ROWS = ("tp", "cp", "sp")


@dataclass(frozen=True)
class Engine:
    """
    What spreads a run over processes, beside data parallelism.

    Args:
        fsdp (`int`): 1 or 2 for FSDP of that version, else 0.
        zero (`int`, *optional*): Stage of DeepSpeed's ZeRO; None without DeepSpeed.
        offload (`str`, *optional*): Where DeepSpeed keeps the moments: `"cpu"` or `"nvme"`.
        offloaded (`float`): The share of them that it keeps there.
        optimizer (`bool`): Whether DeepSpeed's configuration has an optimizer of its own.
        tensor (`int`): Processes that share each layer.
        context (`int`): Processes that share each sequence.
    """

    fsdp: int = 0
    zero: int | None = None
    offload: str | None = None
    offloaded: float = 1.0
    optimizer: bool = False
    tensor: int = 1
    context: int = 1

    @property
    def splits(self) -> str | None:
        """The name of what splits the weights or joins them, for messages; None if nothing does."""
        if self.zero is not None:
            return f"DeepSpeed ZeRO-{self.zero}"
        if self.tensor > 1:
            return "tensor parallelism"
        return f"FSDP{self.fsdp}" if self.fsdp else None

    @property
    def gathers(self) -> bool:
        """Whether a process gathers a layer's weights from the others when it runs the layer."""
        return self.fsdp > 0 or self.zero == 3


def engine_of(args: Any, model: nn.Module | None = None) -> Engine:
    """
    The engine of a run. Whether arguments, a launcher's environment, or the loading of the model has
    chosen it, accelerate or the model knows; arguments count even before accelerate has started.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`nn.Module`, *optional*): The model, which may be split already.
    """
    state: Any = AcceleratorState() if is_initialized() else None
    config = _deepspeed_config(args, state)
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    device = offload.get("device", "none")
    parallel = getattr(args, "parallelism_config", None) or getattr(
        state, "parallelism_config", None
    )
    split = _split_dimensions(model.parameters()) if model is not None else set()
    tensor = max(
        getattr(parallel, "tp_size", 1),
        getattr(model, "tp_size", None) or 1,
        config.get("tensor_parallel", {}).get("autotp_size", 1),
    )
    return Engine(
        fsdp=_fsdp_version(args, state) or (2 if split - {"tp"} else 0),
        zero=int(zero.get("stage", 0)) if config else None,
        offload=None if device == "none" else str(device),
        offloaded=float(offload.get("ratio", 1.0)),
        optimizer="optimizer" in config,
        tensor=tensor,
        context=max(getattr(parallel, f"{name}_size", 1) for name in ("cp", "sp")),
    )


def check_engine(engine: Engine, model: nn.Module) -> None:
    """
    Checks whether a run can be spread in this way.

    Args:
        engine ([`Engine`]): The run's engine.
        model (`nn.Module`): The model, with its adapter.

    Raises:
        ValueError: If sequences would be split, or if tensor parallelism cannot train the adapter.
    """
    if engine.context > 1:
        raise ValueError(
            f"context or sequence parallelism over {engine.context} processes splits each sequence, "
            "but the loss compares whole ones: use a smaller max_length, gradient_checkpointing, "
            "FSDP2, ZeRO-3 or tensor parallelism"
        )
    if engine.tensor > 1:
        check_adapter_layers(model)


def splits_batches(args: Any, model: Any) -> bool:
    """
    Whether transformers splits each batch over several GPUs of one process by DataParallel. It does not
    for models with 8-bit or 4-bit weights, which stay on one GPU.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`nn.Module`): The model.
    """
    quantised = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (8, 4))
    return args.n_gpu > 1 and not quantised


def data_parallel(accelerator: Any) -> tuple[int, int]:
    """
    Over how many groups of processes the rows are spread, and the index of this process's group.
    The processes of a group, such as those that share a layer, get the same rows.

    Args:
        accelerator (`Accelerator`): The trainer's.
    """
    mesh: Any = getattr(accelerator, "torch_device_mesh", None)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        mesh = getattr(accelerator.state, "ds_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    shared = prod(mesh[name].size() for name in _SAME_ROWS if name in names)
    # These are the innermost dimensions, as accelerate's own loaders take them to be.
    return accelerator.num_processes // shared, accelerator.process_index // shared


def _deepspeed_config(args: Any, state: Any) -> dict[str, Any]:
    """DeepSpeed's configuration; empty without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None and state is not None:
        plugin = state.deepspeed_plugin
    return {} if plugin is None else plugin.deepspeed_config


def _fsdp_version(args: Any, state: Any) -> int:
    if state is not None and state.distributed_type == DistributedType.FSDP:
        return int(getattr(state.fsdp_plugin, "fsdp_version", 1))
    if not args.fsdp:
        return 0
    return int((getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version", 1))


def _split_dimensions(parameters: Iterable[Any]) -> set[str]:
    """Names of the dimensions over which parameters are split."""
    found = set()
    for each in parameters:
        if hasattr(each, "device_mesh"):
            names = each.device_mesh.mesh_dim_names or ()
            sharded = [place.is_shard() for place in each.placements]
            found |= {name for name, split in zip(names, sharded) if split} if names else {""}
    return found
