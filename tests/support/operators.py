"""What is called beneath a `TorchDispatchMode`."""

from typing import Any

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["called"]


def called(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """The result of an operator; of the package's own ones the mode sees the operators that the core calls too."""
    kwargs = kwargs or {}
    if func.namespace != "oddsmith":
        return func(*args, **kwargs)
    with mode:
        return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **kwargs)
