"""pooled_memory: reuses the memory of CPU tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

from .. import _core

_lock = Lock()
_users = 0


@contextmanager
def pooled_memory(device: torch.device) -> Iterator[None]:
    """
    Within the context, allocate large CPU tensors from a pool that reuses memory.

    The C library's allocator fragments under training: a run keeps several times what its tensors
    need. Tensors created inside can be used outside; at the end, unused memory is returned to the
    system. Linux only; no effect elsewhere.

    Args:
        device (`torch.device`): Device of the model; no effect unless it is the CPU.
    """
    global _users
    if device.type != "cpu":
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _core.install_pool()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _core.uninstall_pool()
