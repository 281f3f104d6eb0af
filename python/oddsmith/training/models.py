"""Prepares the model of a training run: loads it by name, adds its adapter, lists its patches."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from ..config import ORPOConfig
from ..data.processor import auto_class, load_processor
from ..integrations.bitsandbytes_layers import AdoptedLayers, KeptLayout, on_cpu
from ..integrations.checkpointing import Checkpointing
from ..integrations.dropout import NoDropout
from ..integrations.patch import Patch
from ..integrations.router_layers import adapted_router, without_routers
from .split_adapters import check_adapter_kind


def load_model(name: str, args: ORPOConfig, images: bool = False) -> PreTrainedModel:
    """
    Load a model by its hub id or folder, with `model_init_kwargs`.

    Args:
        name (`str`): Hub id or folder.
        args ([`ORPOConfig`]): For `model_init_kwargs` and `trust_remote_code`.
        images (`bool`, *optional*): Whether the rows have images.

    No `device_map` is added: under a launcher each process has its own device, and without one
    [`~transformers.Trainer`] places the model.

    Raises:
        ValueError: If `dtype` in `model_init_kwargs` is not the name of a dtype.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **args.model_kwargs()}
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    if kwargs.get("dtype") is not None:
        kwargs["dtype"] = _dtype(kwargs["dtype"])
    config = kwargs.get("config")
    if config is None:
        # Arguments that select the configuration, but not those that change it.
        where = ("trust_remote_code", "revision", "token", "cache_dir", "subfolder")
        config = AutoConfig.from_pretrained(
            name, **{key: kwargs[key] for key in where if key in kwargs}
        )
    return auto_class(config, images).from_pretrained(name, **kwargs)


def _dtype(value: Any) -> Any:
    dtype = getattr(torch, value, None) if isinstance(value, str) and value != "auto" else value
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"dtype in model_init_kwargs is {value!r}; must be 'auto' or a torch dtype such as "
            "'bfloat16'"
        )
    return dtype


def load_processing_class(model: Any, revision: str | None, args: ORPOConfig) -> Any:
    """
    Load the tokenizer, or the processor of an image-text model, from a model's hub id or folder.

    Raises:
        ValueError: If the model does not have its hub id or folder.
    """
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "processing_class is None and the model was not loaded by name; pass its tokenizer"
        )
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return load_processor(name, revision, args.trust_remote_code, core.config)


def check_model(model: Any) -> None:
    """
    Check that a model has an output head.

    Raises:
        ValueError: If it has none.
    """
    # Check below the adapter, which would forward the call.
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(core, PreTrainedModel) and core.get_output_embeddings() is None:
        raise ValueError(
            f"model is a {type(core).__name__}, which has no output head; load it with "
            "AutoModelForCausalLM (or AutoModelForSeq2SeqLM, AutoModelForImageTextToText)"
        )


def check_trainable(model: nn.Module) -> None:
    """
    Check that a model has something to train.

    Raises:
        ValueError: If no parameter requires a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if hasattr(model, "get_base_model"):
        fix = "load its adapter with PeftModel.from_pretrained(..., is_trainable=True)"
    else:
        fix = "set requires_grad, or pass a peft_config"
    raise ValueError(f"no parameter of the {type(model).__name__} is trainable; {fix}")


# Methods of peft whose layers take the ids of tasks.
_OF_TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")


def check_adapter(model: nn.Module) -> None:
    """
    Check that an adapter can be trained on the layers that it is on.

    Raises:
        ValueError: If it is on a layer that returns more than a tensor; if it needs to know the task of
            each row; if peft has rounded what it scales its weights with to zero.
    """
    for config in getattr(model, "peft_config", {}).values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind in _OF_TASKS:
            raise ValueError(
                f"the adapter is {kind}, which peft gives the task of each row to (task_ids), and "
                "preference rows have none; use another adapter, such as peft.LoraConfig"
            )
    router = adapted_router(model)
    if router is not None:
        raise ValueError(
            f"the adapter is on {router}, which returns more than a tensor, and peft cannot run it; "
            f"add exclude_modules=[{router.rpartition('.')[2]!r}] to its configuration"
        )
    for name, buffer in model.named_buffers():
        if "unilora_scales" in name and not buffer.is_floating_point():
            raise ValueError(
                f"the adapter is UniLoRA on quantised layers: peft stores its scales in the dtype of "
                f"their weights ({buffer.dtype}), where they are zero, so it would not train; use "
                "another adapter, such as peft.LoraConfig or peft.VeraConfig, or a model in 16 or 32 "
                "bits"
            )


def vocabulary_size(model: Any) -> int:
    """Number of token ids in a model's embeddings and output head."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = core.config.get_text_config() if hasattr(core.config, "get_text_config") else core.config
    # What peft trains instead of a tied head is made with its two sizes exchanged.
    layers = [
        getattr(layer, "original_module", layer)
        for layer in (core.get_input_embeddings(), core.get_output_embeddings())
    ]
    sizes = [getattr(layers[0], "num_embeddings", None), getattr(layers[1], "out_features", None)]
    # Quantised or wrapped layers may not have the attribute.
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(known) if known else text.vocab_size


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights have 8 or 4 bits, from bitsandbytes or oddsmith."""
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (8, 4))


def prepare_model(model: nn.Module, args: ORPOConfig, peft_config: Any) -> tuple[nn.Module, bool]:
    """
    Add the adapter. Without one the model is not changed.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; changed in place.
        args ([`ORPOConfig`]): For `bf16`.
        peft_config (`PeftConfig`, *optional*): The adapter.

    Returns:
        `tuple`: The model, wrapped if there is an adapter, and whether it has `bfloat16` parts, so
            that every call needs autocast.

    Raises:
        ImportError: If `peft_config` is given but PEFT is not installed.
        TypeError: If `peft_config` is not a `PeftConfig`.
        ValueError: If the model already has an adapter, or is split in a way that `peft_config` cannot
            be trained in.
    """
    if peft_config is None:
        return model, False
    if on_cpu(model):
        AdoptedLayers(model).apply()  # not undone, because the adapter is created for these layers
    return _add_adapter(model, args, peft_config)


def run_patches(model: nn.Module, args: ORPOConfig) -> list[Patch]:
    """
    The patches of a model while it is trained or evaluated, which are undone at the end.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, with its adapter.
        args ([`ORPOConfig`]): For `gradient_checkpointing` and `disable_dropout`.
    """
    patches: list[Patch] = []
    if on_cpu(model):
        patches += AdoptedLayers(model), KeptLayout(model)  # of those that are not replaced
    if args.gradient_checkpointing:
        options = args.gradient_checkpointing_kwargs
        options = options if isinstance(options, dict) else {}
        patches.append(Checkpointing(model, options.get("use_reentrant", True)))
    if args.disable_dropout:
        patches.append(NoDropout(model))
    return patches


def _add_adapter(model: nn.Module, args: ORPOConfig, peft_config: Any) -> tuple[nn.Module, bool]:
    if not is_peft_available():
        raise ImportError("peft_config needs the peft library; pip install peft")
    from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; must be a peft.PeftConfig, such as "
            "peft.LoraConfig"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is already a PeftModel and peft_config is given; remove peft_config to train "
            "its adapter, or pass model.merge_and_unload() to train a new one"
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        check_adapter_kind(peft_config)
    quantized = is_quantized(model)
    if quantized:
        # Trainer switches checkpointing on, and only while it trains.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    kwargs: dict[str, Any] = {}
    deepspeed = args.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3 and not quantized:
        # ZeRO-3 gathers parameters of only one dtype; PEFT would make the adapter float32.
        kwargs["autocast_adapter_dtype"] = False
    model = get_peft_model(model, without_routers(model, peft_config), **kwargs)
    casted = bool(args.bf16 and getattr(model, "is_loaded_in_4bit", False))
    if casted:
        _cast_to_bf16(model)
    return model, casted


def _cast_to_bf16(model: nn.Module) -> None:
    """Casts norms to float32, and float32 embeddings and heads to bfloat16, as TRL for QLoRA."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
            if getattr(getattr(module, "weight", None), "dtype", None) == torch.float32:
                module.to(torch.bfloat16)
