"""pooled_memory: tensors of a CPU run reuse each other's memory."""

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
    For the duration, take the memory of large CPU tensors from a pool that reuses it.

    The C library's allocator fragments under training: a run keeps several times what its tensors
    need. Tensors made inside may be used outside; what the pool does not use at the end goes back
    to the system. Linux only, elsewhere nothing changes.

    Args:
        device (`torch.device`): Where the model is; nothing changes unless that is the CPU.
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
