"""Checks the arguments of the trainer before anything is loaded."""

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ..config import ORPOConfig

logger = logging.get_logger(__name__)


def own_config(args: Any) -> ORPOConfig:
    """
    The arguments of a run as an [`ORPOConfig`]; those of TRL's class of that name are converted.

    Args:
        args ([`ORPOConfig`] or `trl.experimental.orpo.ORPOConfig`): The arguments.

    Raises:
        TypeError: If they are of another class.
    """
    if isinstance(args, ORPOConfig):
        return args
    kinds = type(args).__mro__
    if not isinstance(args, TrainingArguments) or not any(
        kind.__name__ == "ORPOConfig" and kind.__module__.partition(".")[0] == "trl"
        for kind in kinds
    ):
        raise TypeError(f"args is a {type(args).__name__}; must be an oddsmith.ORPOConfig")
    own = {each.name for each in fields(ORPOConfig) if each.init}
    given = {each.name: getattr(args, each.name) for each in fields(args) if each.init}
    logger.warning("args is TRL's ORPOConfig: converted to oddsmith.ORPOConfig.")
    converted = ORPOConfig(**{name: value for name, value in given.items() if name in own})
    for name in given.keys() - own:  # of a subclass
        setattr(converted, name, given[name])
    return converted


def check_arguments(
    model: Any,
    args: ORPOConfig,
    train_dataset: Any,
    model_init: Any,
    processing_class: Any,
    tokenizer: Any,
) -> None:
    """
    Check what the trainer is given.

    Raises:
        ValueError: If arguments are missing or contradict each other.
        TypeError: If the training data are several datasets.
    """
    if "inputs" in args.include_for_metrics:
        raise ValueError(
            "include_for_metrics has 'inputs'; must be only 'loss': a pair has two inputs, and the "
            "predictions are their mean logits"
        )
    if train_dataset is None:
        raise ValueError("train_dataset is None; must be a dataset of preference pairs")
    check_single(train_dataset, "train_dataset")
    if tokenizer is not None and processing_class is not None:
        raise ValueError("processing_class and tokenizer are names of the same argument; pass one")
    if (model is None) == (model_init is None):
        raise ValueError("one of model and model_init must be given, and not both")
    if args.model_init_kwargs and not isinstance(model, str):
        raise ValueError(
            "model_init_kwargs is set but model is not a name; pass "
            "its hub id or folder, or remove model_init_kwargs"
        )


def check_single(dataset: Any, name: str) -> None:
    """
    Check that a dataset is not a `dict` of splits.

    Raises:
        TypeError: If it is.
    """
    if isinstance(dataset, dict):
        splits = list(dataset)
        first = splits[0] if splits else "train"
        raise TypeError(
            f"{name} is a {type(dataset).__name__} with the splits "
            f"{', '.join(map(str, splits)) or '(none)'}; pass one of them, such as "
            f"dataset[{first!r}]"
        )
