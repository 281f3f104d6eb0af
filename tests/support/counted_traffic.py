"""Counts the bytes of collectives in runs of two processes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

__all__ = ["counted"]


@contextmanager
def counted(counts: Counter[str]) -> Iterator[Callable[[Any], None]]:
    """Counts the bytes of whole tensors that engines send.

    Args:
        counts (`Counter`): Gets what FSDP2 gathers and scatters, as `"gathered"` and `"scattered"`,
            and what DDP reduces, as `"reduced"`.

    Yields:
        `Callable`: Lets a trainer's DDP count too, by a communication hook.
    """
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def count_gather(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["gathered"] += output_tensor.nbytes
        return gather(output_tensor, *args, **kwargs)

    def count_scatter(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["scattered"] += input.nbytes
        return scatter(output, input, *args, **kwargs)

    with (
        patch.object(dist, "all_gather_into_tensor", count_gather),
        patch.object(dist, "reduce_scatter_tensor", count_scatter),
    ):
        yield lambda trainer: trainer.add_callback(_CountReduced(trainer, counts))


class _CountReduced(TrainerCallback):
    def __init__(self, trainer: Any, counts: Counter[str]):
        self.trainer, self.counts = trainer, counts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def count(group: Any, bucket) -> torch.futures.Future[torch.Tensor]:
            self.counts["reduced"] += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        model = self.trainer.model_wrapped
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, count)
