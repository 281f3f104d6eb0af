"""The trainer's names for GaLore and APOLLO: from `TrainingArguments` to an optimiser."""

from __future__ import annotations

import re
from typing import Any, cast

from accelerate.state import GradientState
from torch import nn
from transformers.training_args import ParallelMode
from transformers.utils import logging

from ..optim.low_rank.apollo import APOLLOAdamW
from ..optim.low_rank.galore import GaLoreAdafactor, GaLoreAdamW
from ..optim.low_rank.galore_8bit import GaLoreAdamW8bit
from ..optim.low_rank.optimizer import LowRankOptimizer, check_matrix
from .engine import Engine, engine_of
from .optim_args import decayed_names, parse_optim_args, readers

logger = logging.get_logger(__name__)

_LAYERWISE = "_layerwise"

_CLASSES: dict[str, type[LowRankOptimizer]] = {
    "galore_adamw": GaLoreAdamW,
    "galore_adamw_8bit": GaLoreAdamW8bit,
    # The name in older scripts and articles.
    "galore_adamw_8bit_bnb": GaLoreAdamW8bit,
    "galore_adafactor": GaLoreAdafactor,
    "apollo_adamw": APOLLOAdamW,
}

#: Names that `low_rank_optimizer` accepts.
LOW_RANK_NAMES = frozenset(_CLASSES) | {
    name + _LAYERWISE for name in _CLASSES if not name.endswith("bnb")
}

_DEFAULT_RANK = 128


def target_parameters(model: nn.Module, targets: Any, where: str) -> dict[str, nn.Parameter]:
    """
    Weights of the linear layers in `optim_target_modules`, and of experts that are kept in one
    parameter `(experts, rows, columns)`, by name.

    Args:
        model (`nn.Module`): The model.
        targets (`str` or `list[str]`): `"all-linear"`; a regular expression that matches the full
            name of a module or of a parameter of experts; or a list of names, parts of names, or
            such expressions.
        where (`str`): Name of the optimiser, for messages.

    Raises:
        ValueError: If nothing matches, or an expression is invalid.
        TypeError: If `targets` has another type.
    """
    if targets is None:
        raise ValueError(
            f"optim is {where!r}, which needs optim_target_modules: 'all-linear', a regular "
            "expression or a list of module names"
        )
    if not isinstance(targets, (list, str)):
        raise TypeError(
            f"optim_target_modules is {targets!r}; must be 'all-linear', a regular expression or a "
            "list of strings"
        )
    from transformers.trainer_utils import check_target_module_exists  # not documented

    all_linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    names: set[str] = set()
    for name, module in model.named_modules():
        try:
            matched = check_target_module_exists(targets, name, return_is_regex=True)
        except re.error as error:
            raise ValueError(f"optim_target_modules is {targets!r}: {error}") from None
        found, is_regex = cast(tuple[bool, bool], matched)
        experts = _expert_weights(name, module)
        if isinstance(module, nn.Linear):
            if found or all_linear:
                names.add(f"{name}.weight")
        elif experts:
            whole = found or all_linear
            names |= {x for x in experts if whole or check_target_module_exists(targets, x)}
        elif found and not is_regex and next(module.parameters(recurse=False), None) is not None:
            logger.warning(f"{name} is in optim_target_modules but not linear: not projected.")
    # By name, so that a head with the embeddings' weight is grouped with the embeddings.
    found = {name: each for name, each in model.named_parameters() if name in names}
    if not found:
        raise ValueError(
            f"optim_target_modules is {targets!r}; matches no linear layer of the model"
        )
    if isinstance(targets, list):
        # The module's name; of experts, that of the parameter too.
        names = {part for name in found for part in (name, name.rpartition(".")[0])}
        _say_unmatched(targets, names)
    return found


def _expert_weights(name: str, module: nn.Module) -> list[str]:
    """Names of the weights of experts that a module keeps, one matrix for each expert."""
    if "expert" not in f"{name}.{type(module).__name__}".lower():
        return []
    own = module.named_parameters(recurse=False)
    return [f"{name}.{key}" for key, each in own if each.dim() == 3 and each.is_floating_point()]


def _say_unmatched(targets: list[str], names: set[str]) -> None:
    """Logs one line about entries of the list that match none of the linear layers."""
    from transformers.trainer_utils import check_target_module_exists  # not documented

    unmatched = [
        repr(each)
        for each in targets
        if not any(check_target_module_exists([each], name) for name in names)
    ]
    if unmatched:
        logger.warning(
            f"optim_target_modules: {', '.join(unmatched)} match no linear layer of the model."
        )


def _say_rest(model: nn.Module, projected: dict[str, nn.Parameter], where: str) -> None:
    """
    Logs one line about weights of experts, and other parameters that are no matrices, that are not
    projected.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    experts = {
        name: each for name, each in trained.items() if each.dim() > 2 and name not in projected
    }
    if not experts:
        return
    total = sum(each.numel() for each in trained.values())
    share = sum(each.numel() for name, each in trained.items() if name not in projected) / total
    first, parameter = next(iter(experts.items()))
    logger.warning(
        f"optim is {where!r}: {share:.0%} of the trained parameters are updated with full moments, "
        f"among them {len(experts)} that are not matrices, such as {first} "
        f"{tuple(parameter.shape)}. optim_target_modules can name experts."
    )


def low_rank_optimizer(
    args: Any, model: nn.Module | None, name: str | None = None
) -> tuple[type[LowRankOptimizer], dict[str, Any]]:
    """
    Class and arguments of a low-rank optimiser, as `get_optimizer_cls_and_kwargs` returns them.

    Learning rate, betas, epsilon, weight decay and seed come from `args`; the rest from its
    `optim_args`. Parameters that are not in `optim_target_modules` are updated in full.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`nn.Module`): The model.
        name (`str`, *optional*): The optimiser, if not that of `args.optim`.

    Raises:
        ValueError: For a model with adapters, a model that is split over processes, unknown
            options, no target, or frozen targets.
        NotImplementedError: For a layer-wise optimiser on several processes.
    """
    name = str(getattr(args.optim, "value", args.optim)) if name is None else name
    layerwise = name.endswith(_LAYERWISE)
    kind = _CLASSES[name.removesuffix(_LAYERWISE)]
    if model is None:
        raise ValueError(f"optim is {name!r}, which needs the model")
    check_low_rank_run(args, model, name, engine_of(args, model))
    known = readers(kind)
    options = {"rank": _DEFAULT_RANK, **parse_optim_args(args.optim_args, known, name)}

    targets = target_parameters(model, args.optim_target_modules, name)
    trained = {key: each for key, each in targets.items() if each.requires_grad}
    if not trained:
        raise ValueError(
            f"optim is {name!r}, but all weights that optim_target_modules "
            f"{args.optim_target_modules!r} matches are frozen"
        )
    for key, parameter in trained.items():
        check_matrix(name, parameter, key)
    _say_rest(model, trained, name)

    kwargs: dict[str, Any] = {"lr": args.learning_rate, "seed": args.seed}
    if kind is GaLoreAdafactor:
        kwargs |= {"scale_parameter": False, "relative_step": False}
    else:
        kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if layerwise:
        state = GradientState()
        kwargs |= {
            "layerwise": True,
            "is_last_backward": lambda: state.sync_gradients,
            "max_grad_norm": args.max_grad_norm or None,
        }
    groups = parameter_groups(model, trained, args.weight_decay, options)
    if kind is GaLoreAdamW8bit:
        groups = [part for group in groups for part in embeddings_apart(model, group)]
    return kind, {**kwargs, "params": groups}


def parameter_groups(
    model: nn.Module,
    targets: dict[str, nn.Parameter],
    weight_decay: float,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """The trained parameters: others with and without weight decay, then the projected ones."""
    decayed = decayed_names(model)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
        {"params": list(targets.values()), "weight_decay": weight_decay, **options},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in targets:
            groups[0 if name in decayed else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def embeddings_apart(model: nn.Module, group: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits off a 32-bit group for the embeddings, whose rows rarely have gradients."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if "rank" in group:
        return [group]
    rest = [each for each in group["params"] if id(each) not in tables]
    embeddings = [each for each in group["params"] if id(each) in tables]
    parts = [{**group, "params": rest}, {**group, "params": embeddings, "optim_bits": 32}]
    return [part for part in parts if part["params"]]


def check_low_rank_run(args: Any, model: nn.Module, name: str, engine: Engine) -> None:
    """
    Checks whether a run can have a low-rank optimizer.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`nn.Module`): The model, with its adapter.
        name (`str`): Name of the optimizer.
        engine ([`Engine`]): The run's engine.

    Raises:
        ValueError: For a model with adapters, a model that is split over processes, or float16 with a
            layer-wise optimizer.
        NotImplementedError: For a layer-wise optimizer on several processes.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"optim is {name!r} on a model with an adapter: its matrices already have a low rank. "
            "Train the full model (no peft_config), or use another optim, such as adamw_8bit"
        )
    check_low_rank_engine(engine, name)
    if not name.endswith(_LAYERWISE):
        return
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        raise NotImplementedError(
            f"optim is {name!r} on {args.world_size} processes: a layer-wise update would come "
            f"before the gradients are averaged. Use {name.removesuffix(_LAYERWISE)!r}"
        )
    if args.fp16:
        raise ValueError(
            f"optim is {name!r} with fp16: the gradients are still scaled when a layer-wise update uses "
            f"them. Use bf16, or {name.removesuffix(_LAYERWISE)!r}"
        )


def check_low_rank_engine(engine: Engine, name: str) -> None:
    """
    Checks whether an engine leaves whole matrices to a low-rank optimizer.

    Args:
        engine ([`Engine`]): The run's engine.
        name (`str`): Name of the optimizer, for messages.

    Raises:
        ValueError: If it splits or joins them.
    """
    if engine.splits is not None:
        raise ValueError(
            f"optim is {name!r} with {engine.splits}: a projection needs full matrices. Use DDP, or an "
            "element-wise optim, such as adamw_8bit"
        )
