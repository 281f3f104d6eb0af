"""The trainer's names for 8-bit and paged AdamW: from `TrainingArguments` to an optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..optim.adamw.adamw_8bit import AdamW8bit
from ..optim.adamw.optimizer import BlockAdamW
from ..optim.adamw.paged import PagedAdamW8bit, PagedAdamW32bit
from .optim_args import decayed_names, parse_optim_args, yes_or_no

_CLASSES: dict[str, type[BlockAdamW]] = {
    "adamw_8bit": AdamW8bit,
    "adamw_bnb_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW32bit,
    "paged_adamw_32bit": PagedAdamW32bit,
    "paged_adamw_8bit": PagedAdamW8bit,
}

#: Names that `adamw_optimizer` accepts.
ADAMW_NAMES = frozenset(_CLASSES)

# Options in optim_args, and their parsers.
_OPTIONS = {"stochastic_rounding": yes_or_no, "min_8bit_size": int}
_PAGED_OPTIONS = {"page_dir": str, "device_budget": int}


def adamw_optimizer(args: Any, model: nn.Module | None) -> tuple[type[BlockAdamW], dict[str, Any]]:
    """
    Class and arguments of an 8-bit or paged AdamW, as `get_optimizer_cls_and_kwargs` returns them.

    Learning rate, betas, epsilon, weight decay and seed come from `args`; `stochastic_rounding`,
    `min_8bit_size`, `page_dir` and `device_budget` from its `optim_args`. Embeddings get 32-bit
    moments, because few of their rows have gradients.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`nn.Module`): The model.

    Raises:
        ValueError: For unknown options, and with FSDP1 or DeepSpeed.
    """
    name = str(getattr(args.optim, "value", args.optim))
    kind = _CLASSES[name]
    if model is None:
        raise ValueError(f"optim is {name!r}, which needs the model")
    _check_setting(args, name)
    known = {**_OPTIONS, **(_PAGED_OPTIONS if issubclass(kind, PagedAdamW8bit) else {})}
    options = parse_optim_args(args.optim_args, known, name)
    return kind, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "seed": args.seed,
        **options,
        "params": _groups(model, args.weight_decay),
    }


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """
    Parameters with and without weight decay, as in transformers. Empty groups are kept, because the
    saved state of a run with bitsandbytes refers to group numbers.
    """
    decayed = decayed_names(model)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = []
    for decay in (True, False):
        params = [each for name, each in trained if (name in decayed) == decay]
        full = [place for place, each in enumerate(params) if id(each) in tables]
        groups.append(
            {
                "params": params,
                "weight_decay": weight_decay if decay else 0.0,
                "full_precision": full,
            }
        )
    return groups


def _check_setting(args: Any, name: str) -> None:
    if getattr(args, "deepspeed", None):
        raise ValueError(
            f"optim is {name!r} with deepspeed, which splits parameters itself: use "
            "'adamw_torch', or DDP or FSDP2 instead of deepspeed"
        )
    version = (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version", 1)
    if args.fsdp and int(version) != 2:
        raise ValueError(
            f"optim is {name!r} with FSDP1, which joins parameters and cannot save the state of blocks: "
            "use FSDP2 (fsdp_config={'version': 2}), or 'adamw_torch'"
        )
