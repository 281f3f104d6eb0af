"""ORPO (odds-ratio preference optimisation) for language models, a drop-in for TRL's trainer.

```python
from oddsmith import ORPOConfig, ORPOTrainer
```
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from . import torch_version

torch_version.check(torch.__version__)

from ._core import __version__  # noqa: E402 - not before the check

if TYPE_CHECKING:
    from . import functional, nn
    from .config import ORPOConfig
    from .trainer import ORPOTrainer

__all__ = ["ORPOConfig", "ORPOTrainer", "__version__", "functional", "nn"]

# Public names by module: transformers takes seconds to import, the functions do not need it.
_LAZY = {"ORPOConfig": ".config", "ORPOTrainer": ".trainer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in ("functional", "nn"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
