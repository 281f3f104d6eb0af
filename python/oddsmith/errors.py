"""Errors that the user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """A failure that the command line shows as one line, without a traceback."""


class CheckpointError(UserError, OSError):
    """A checkpoint could not be written; those before it are as they were."""


class TorchError(UserError, ImportError):
    """The torch that is installed is missing, too old, incomplete or one of two."""


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turns exceptions about the user's input into a [`UserError`]."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error


# Failed allocations of torch on its GPUs, when the core last asked.
_failed_allocations = 0


def of_libtorch(message: str) -> RuntimeError:
    """
    The exception for a failure of libtorch within the core: `torch.OutOfMemoryError` where memory was short, as of
    torch's own operations, so that a caller who makes his batches smaller then can tell.

    Args:
        message (`str`): What the core knows; torch before 2.13 does not tell it the reason.
    """
    import torch

    if "out of memory" in message:
        return torch.OutOfMemoryError(message)
    if _memory_was_short(torch):
        return torch.OutOfMemoryError(f"CUDA out of memory. {message}")
    return RuntimeError(message)


def _memory_was_short(torch: Any) -> bool:
    """Whether an allocation on a GPU has failed since the last question."""
    global _failed_allocations
    if not torch.cuda.is_initialized():
        return False
    counts = [
        torch.cuda.memory_stats(gpu).get("num_ooms", 0) for gpu in range(torch.cuda.device_count())
    ]
    before, _failed_allocations = _failed_allocations, sum(counts)
    return _failed_allocations > before
