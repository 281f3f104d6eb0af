"""ORPO (odds-ratio preference optimisation) for language models, a drop-in for TRL's trainer.

```python
from oddsmith import ORPOConfig, ORPOTrainer
```
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from . import stand_in, torch_version

torch_version.check(torch.__version__)

from ._core import __version__  # noqa: E402 - not before the check

# Scripts that load 4-bit models import no more than this package.
stand_in.install()

if TYPE_CHECKING:
    from . import functional, nn, optim
    from .adoption import adopt
    from .config import ORPOConfig
    from .quantizer import NF4Config, use_for_bitsandbytes
    from .trainer import ORPOTrainer

__all__ = [
    "NF4Config",
    "ORPOConfig",
    "ORPOTrainer",
    "__version__",
    "adopt",
    "functional",
    "nn",
    "optim",
    "use_for_bitsandbytes",
]

# Public names by module: transformers takes seconds to import, the functions do not need it.
_LAZY = {
    "NF4Config": ".quantizer",
    "ORPOConfig": ".config",
    "ORPOTrainer": ".trainer",
    "adopt": ".adoption",
    "use_for_bitsandbytes": ".quantizer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in ("functional", "nn", "optim"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
