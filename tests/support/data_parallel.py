"""torch's DataParallel with two replicas on the CPU, where it does not split anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

__all__ = ["SplitInTwo", "two_gpus"]

_REPLICAS = 2


class SplitInTwo(nn.DataParallel):
    """torch's replicas, one after the other: each gets half of the rows."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        parts = [_part([inputs, kwargs], index) for index in range(_REPLICAS)]
        return _joined([copy(*args, **given) for copy, (args, given) in zip(self._copies(), parts)])

    def _copies(self) -> list[nn.Module]:
        replicate: Any = import_module("torch.nn.parallel.replicate")

        def copies(tensors: Any, devices: Any, detach: bool = False) -> list[list[torch.Tensor]]:
            found = [[each.clone() for each in tensors] for _ in devices]
            return [[each.detach() for each in part] for part in found] if detach else found

        index = patch.object(replicate, "_get_device_index", lambda device, optional: device)
        with index, patch.object(replicate, "_broadcast_coalesced_reshape", copies):
            return replicate.replicate(self.module, range(_REPLICAS), not torch.is_grad_enabled())


def _part(value: Any, index: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.chunk(_REPLICAS)[index]
    if isinstance(value, list | tuple):
        return type(value)(_part(each, index) for each in value)
    if isinstance(value, dict):
        return {name: _part(each, index) for name, each in value.items()}
    return value


def _joined(values: Any) -> Any:
    """As torch's `gather`: numbers become vectors."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([each if each.dim() else each[None] for each in values])
    if first is None:
        return None
    if isinstance(first, dict):
        return type(first)((name, _joined([each[name] for each in values])) for name in first)
    return type(first)(map(_joined, zip(*values, strict=True)))


@contextmanager
def two_gpus() -> Iterator[None]:
    """A context in which transformers finds two GPUs and starts no process for each."""
    arguments = "transformers.training_args.TrainingArguments.n_gpu"
    with (
        patch(arguments, property(lambda self: _REPLICAS)),
        patch.object(nn, "DataParallel", SplitInTwo),
    ):
        yield
