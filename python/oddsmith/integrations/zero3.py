"""Modules made outside DeepSpeed's ZeRO-3, which splits those that are made while it is on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed

__all__ = ["outside_zero3"]

_PARTITION = "deepspeed.runtime.zero.partition_parameters"


@contextmanager
def outside_zero3() -> Iterator[None]:
    """
    A context in which new modules have whole weights.

    Two things would split them: `deepspeed.zero.Init`, which changes the constructor of each module
    while it is on, and transformers, which switches it on for the parts that a model makes from a
    configuration.
    """
    # Not imported if nobody has: it takes seconds.
    partition = sys.modules.get(_PARTITION)
    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    if partition is not None:
        partition.shutdown_init_context()  # does nothing if it is not on
    try:
        yield
    finally:
        if partition is not None:
            partition.restore_init_context()
        deepspeed._hf_deepspeed_config_weak_ref = configured
