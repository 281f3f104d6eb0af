"""Parses the options in `optim_args`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import Trainer

from ..optim.low_rank.optimizer import LowRankOptimizer


def yes_or_no(value: str) -> bool:
    """Reads a boolean of `optim_args`."""
    answers = {"true": True, "1": True, "false": False, "0": False}
    if value.lower() not in answers:
        raise ValueError("must be true or false")
    return answers[value.lower()]


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers lets decay."""
    # Static in all but its signature.
    return set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))


# Options in optim_args that are not strings.
_TYPES: dict[str, Callable[[str], Any]] = {
    "rank": int,
    "update_proj_gap": int,
    "scale": float,
    "adaptive_gap": yes_or_no,
    "overlap_threshold": float,
    "overlap_patience": int,
}


def readers(kind: type[LowRankOptimizer]) -> dict[str, Callable[[str], Any]]:
    """The options of an optimiser's projected groups, and their parsers."""
    return {option: _TYPES.get(option, str) for option in kind.group_options}


def parse_optim_args(
    text: str | None, known: dict[str, Callable[[str], Any]], where: str
) -> dict[str, Any]:
    """
    Parse options such as `"rank=128,update_proj_gap=200,scale=0.25"`.

    Args:
        text (`str`, *optional*): `optim_args` of the training arguments.
        known (`dict[str, Callable]`): Known options, and their parsers.
        where (`str`): Name of the optimiser, for messages.

    Raises:
        ValueError: If an option is unknown or given twice, or its value cannot be read.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{where}: optim_args has {part!r}; must be option=value")
        if key not in known:
            raise ValueError(
                f"{where}: optim_args has the unknown option {key!r}; known are "
                f"{', '.join(sorted(known))}"
            )
        if key in options:
            raise ValueError(f"{where}: optim_args has {key!r} twice")
        try:
            options[key] = known[key](value)
        except ValueError:
            kind = {int: "an integer", float: "a number"}.get(known[key], "true or false")
            raise ValueError(f"{where}: {key} is {value!r} in optim_args; must be {kind}") from None
    return options
