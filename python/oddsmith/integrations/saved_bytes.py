"""The bytes that autograd saves in a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["SavedBytes"]


class SavedBytes:
    """
    A context that counts the storages saved for the backward pass, each once.

    Args:
        known (`Iterable[Tensor]`):
            Tensors that exist without the call, as parameters and inputs: views of them and they
            themselves count nothing.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._seen = {_storage(tensor)[0] for tensor in known}
        self._hooks = saved_tensors_hooks(self._note, lambda tensor: tensor)
        #: The bytes so far.
        self.total = 0

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        key, size = _storage(tensor)
        if key not in self._seen:
            # A saved storage is not freed in the context, so that no other one gets its address.
            self._seen.add(key)
            self.total += size
        return tensor


def _storage(tensor: Any) -> tuple[Any, int]:
    tensor = getattr(tensor, "_local_tensor", tensor)  # this process's part of a DTensor
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse ones have several
        return id(tensor), tensor.numel() * tensor.element_size()
    return (tensor.device, storage.data_ptr()), storage.nbytes()
