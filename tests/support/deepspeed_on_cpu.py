"""DeepSpeed on CPUs, which accelerate starts on accelerators only."""

import os
from importlib import import_module
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

_prepare_backend = PartialState._prepare_backend


def _with_gloo(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
    backend, kind = _prepare_backend(self, cpu, *args, **kwargs)
    return (backend, kind) if backend else ("gloo", DistributedType.MULTI_CPU)


def allow_cpus() -> None:
    """Lets DeepSpeed run in this process with gloo, if `use_cpu` is False."""
    assert not torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cpu"
    # As an attribute, `deepspeed.comm.torch` is torch itself.
    communication = import_module("deepspeed.comm.torch")
    communication.build_shm_op = lambda: None  # would be compiled
    PartialState._prepare_backend = _with_gloo
    for module in ("oddsmith.config", "transformers.training_args"):  # bf16 as on a GPU
        vars(import_module(module))["is_torch_bf16_gpu_available"] = lambda: True


def zero(stage: int, **changed: Any) -> dict[str, Any]:
    """Arguments of `ORPOConfig` for ZeRO of a stage."""
    options: dict[str, Any] = {"stage": stage}
    if stage == 3:
        options |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # small parameters are split too
        }
    automatic = [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ]
    config = {
        "zero_optimization": {**options, **changed},
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(automatic, "auto"),
    }
    return {"use_cpu": False, "deepspeed": config}


def end_deepspeed() -> None:
    """What transformers knows of the last run is forgotten: a model that is loaded next is whole."""
    unset_hf_deepspeed_config()
