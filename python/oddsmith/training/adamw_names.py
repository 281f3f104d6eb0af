"""The trainer's names for 8-bit and paged AdamW: from `TrainingArguments` to an optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..optim.adamw.adamw_8bit import AdamW8bit
from ..optim.adamw.moments import MIN_8BIT_SIZE
from ..optim.adamw.optimizer import BlockAdamW
from ..optim.adamw.paged import PagedAdamW8bit, PagedAdamW32bit
from .engine import Engine, engine_of
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

    DeepSpeed makes one flat tensor of a group's parameters and splits it. So parameters with 32-bit
    moments are groups of their own there, and the blocks of 8-bit moments go over the ends of
    parameters.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`nn.Module`): The model.

    Raises:
        ValueError: For unknown options, with FSDP1, and with what DeepSpeed does not leave to the
            optimizer.
    """
    name = str(getattr(args.optim, "value", args.optim))
    kind = _CLASSES[name]
    if model is None:
        raise ValueError(f"optim is {name!r}, which needs the model")
    engine = engine_of(args, model)
    check_adamw_engine(engine, name)
    known = {**_OPTIONS, **(_PAGED_OPTIONS if issubclass(kind, PagedAdamW8bit) else {})}
    options = parse_optim_args(args.optim_args, known, name)
    groups = _groups(model, args.weight_decay)
    if engine.zero is not None:
        smallest = options.get("min_8bit_size", MIN_8BIT_SIZE)
        groups = [part for group in groups for part in _by_bits(group, smallest)]
    return kind, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "seed": args.seed,
        **options,
        "params": groups,
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


def _by_bits(group: dict[str, Any], smallest: int) -> list[dict[str, Any]]:
    """A group's parameters with 8-bit and those with 32-bit moments, before they are joined."""

    def large(place: int, parameter: Any) -> bool:
        # ZeRO-3 leaves an empty tensor of a parameter.
        size = getattr(parameter, "ds_numel", parameter.numel())
        return place not in group["full_precision"] and size >= smallest

    kept = {key: value for key, value in group.items() if key != "full_precision"}
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for place, parameter in enumerate(group["params"]):
        parts[large(place, parameter)].append(parameter)
    found = [{**kept, "params": parts[True]}, {**kept, "params": parts[False], "optim_bits": 32}]
    return [part for part in found if part["params"]]


def check_adamw_engine(engine: Engine, name: str) -> None:
    """
    Checks whether an 8-bit or paged AdamW can be the optimizer of an engine.

    Args:
        engine ([`Engine`]): The run's engine.
        name (`str`): Name of the optimizer, for messages.

    Raises:
        ValueError: If another one would be used, or its moments are not its own.
    """
    if engine.fsdp == 1:
        raise ValueError(
            f"optim is {name!r} with FSDP1, which joins parameters and cannot save the state of blocks: "
            "use FSDP2 (fsdp_config={'version': 2}), or 'adamw_torch'"
        )
    if engine.optimizer:
        raise ValueError(
            f"optim is {name!r}, but DeepSpeed's configuration has an optimizer of its own, which would "
            "be used instead: remove its section 'optimizer'"
        )
    if engine.offload == "nvme" or (engine.offload and engine.offloaded < 1.0):
        where = "to NVMe" if engine.offload == "nvme" else "in part"
        raise ValueError(
            f"optim is {name!r}, but DeepSpeed offloads the optimizer {where}, which its own optimizers "
            "alone can do: offload all of it to the CPU, or use 'adamw_torch'"
        )
