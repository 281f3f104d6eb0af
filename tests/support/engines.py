"""Ways to spread a run over two processes, on the CPU: one row for each.

accelerate uses FSDP and meshes on accelerators only. [`under`] lifts the condition, so that the
same code runs with gloo.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

__all__ = ["ENGINES", "Engine", "apart", "lifted", "under", "whole", "whole_weights"]


@dataclass(frozen=True)
class Engine:
    """
    A way to spread a run over processes.

    Args:
        arguments (`dict`): Arguments of `ORPOConfig`.
        environment (`dict`): Variables as a launcher sets them.
        distributed (`dict`, *optional*): Arguments of transformers' `DistributedConfig`, with which
            the model is loaded.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    distributed: Mapping[str, Any] | None = None


_FSDP2 = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
# As `accelerate launch` sets them.
_FSDP2_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}

#: Name -> how a run is spread.
ENGINES: dict[str, Engine] = {
    "DDP": Engine(),
    "FSDP2 by arguments": Engine(arguments={"fsdp": True, "fsdp_config": _FSDP2}),
    "FSDP2 by environment": Engine(environment=_FSDP2_ENVIRONMENT),
    "FSDP2 by DistributedConfig": Engine(distributed={"fsdp_size": 2}),
}


@contextmanager
def lifted() -> Iterator[None]:
    """A context in which accelerate takes the CPU for an accelerator."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        shared = PartialState._shared_state
        cpu = shared.get("distributed_type") == DistributedType.MULTI_CPU
        if cpu:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)
        if cpu and self.distributed_type == DistributedType.MULTI_GPU:
            self.distributed_type = shared["distributed_type"] = DistributedType.MULTI_CPU

    with patch.object(AcceleratorState, "__init__", init):
        yield


@contextmanager
def under(engine: Engine) -> Iterator[Engine]:
    """The environment of an engine; accelerate takes the CPU for an accelerator."""
    before = dict(os.environ)
    os.environ.update(engine.environment)
    try:
        with lifted():
            yield engine
    finally:
        # accelerate and transformers set variables of their own.
        os.environ.clear()
        os.environ.update(before)


def whole(tensor: Any) -> torch.Tensor:
    """
    A copy of a tensor, gathered from all processes; in 32 bits if DeepSpeed trains it in 32 and computes
    in 16.
    """
    if hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        if (exact := safe_get_full_fp32_param(tensor)) is not None:
            return exact.detach().clone()
    if hasattr(tensor, "ds_id"):  # split by ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def whole_weights(model: torch.nn.Module, trained: bool = True) -> dict[str, torch.Tensor]:
    """A model's parameters, gathered; by default those that are trained."""
    return {
        name: whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trained
    }


def apart(model: torch.nn.Module) -> list[str]:
    """Names of trained parameters that are not the same in all processes, once gathered."""
    if not dist.is_initialized():
        return []
    names, weights = zip(*sorted(whole_weights(model).items()), strict=True)
    sums = torch.stack([weight.double().abs().sum().cpu() for weight in weights])
    others = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(others, sums)
    equal = torch.stack([sums == other for other in others]).all(dim=0)
    return [name for name, same in zip(names, equal.tolist(), strict=True) if not same]
