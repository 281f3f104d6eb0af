"""From what the user passes as a model to one that is ready to train."""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import is_peft_available, logging

logger = logging.get_logger(__name__)


def load_model(name: str, args: Any) -> nn.Module:
    """
    Load a model by its id or folder, with `args.model_init_kwargs`.

    Raises:
        ValueError: If `dtype` is no dtype.
    """
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    dtype = kwargs.get("dtype", "auto")
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, None)
    if dtype != "auto" and dtype is not None and not isinstance(dtype, torch.dtype):
        dtype = None
    if dtype is None and kwargs.get("dtype") is not None:
        raise ValueError(
            f"model_init_kwargs['dtype'] is {kwargs['dtype']!r}; must be 'auto' or the name of a "
            "torch dtype"
        )
    kwargs["dtype"] = dtype
    # Under a launcher every process has a device of its own; spreading the model would take them.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and torch.cuda.is_available():
        kwargs.setdefault("device_map", "auto")
    hub = {k: kwargs[k] for k in ("revision", "trust_remote_code", "token") if k in kwargs}
    config = AutoConfig.from_pretrained(name, **hub)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(name, **kwargs)


def add_adapter(model: nn.Module, peft_config: Any, args: Any) -> nn.Module:
    """
    Wrap a model in an adapter.

    Raises:
        ImportError: If peft is not installed.
        TypeError: If `peft_config` is no `PeftConfig`.
        ValueError: If the model has an adapter already.
    """
    if not is_peft_available():
        raise ImportError("peft_config is given but peft is not installed: pip install peft")
    from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; must be a peft.PeftConfig, for "
            "instance a peft.LoraConfig"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model is a PeftModel already and peft_config would add a second adapter: merge the "
            "first one (model.merge_and_unload()), or leave peft_config out to train it on"
        )
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(
        model, "is_loaded_in_8bit", False
    )
    if quantized:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
    options = {}
    deepspeed = getattr(args, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3 and not quantized:
        # ZeRO-3 gathers parameters in one buffer and needs them all in one dtype.
        options["autocast_adapter_dtype"] = False
    return get_peft_model(model, peft_config, **options)


def let_inputs_require_grad(model: nn.Module) -> None:
    """Make the embeddings' output require a gradient: checkpointed layers with only frozen inputs
    would drop theirs."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True))


def disable_dropout(model: nn.Module) -> None:
    """Set the rate of every dropout layer to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
