"""ORPO (odds-ratio preference optimisation) for language models, a drop-in for TRL's trainer.

```python
from oddsmith import ORPOConfig, ORPOTrainer
```
"""

import importlib
from typing import TYPE_CHECKING, Any

from .integrations import import_hook

# A script that loads a 4-bit model may not import any other module of this package.
import_hook.install()

if TYPE_CHECKING:
    from . import functional as functional
    from . import nn as nn
    from . import optim as optim
    from .config import ORPOConfig as ORPOConfig
    from .integrations.bitsandbytes_layers import adopt as adopt
    from .integrations.nf4_config import NF4Config as NF4Config
    from .integrations.nf4_config import use_for_bitsandbytes as use_for_bitsandbytes
    from .trainer import ORPOTrainer as ORPOTrainer

    __version__: str

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

# Public names by module, imported at first use: torch and transformers take seconds, and
# `oddsmith --help` needs neither.
_LAZY = {
    "NF4Config": ".integrations.nf4_config",
    "ORPOConfig": ".config",
    "ORPOTrainer": ".trainer",
    "adopt": ".integrations.bitsandbytes_layers",
    "use_for_bitsandbytes": ".integrations.nf4_config",
}
_MODULES = ("functional", "nn", "optim")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("oddsmith")
    if name not in _LAZY and name not in _MODULES and name != "_core":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Before the compiled core is loaded: a torch that is too old is named.
    from . import torch_version

    torch_version.require(_self_test)
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    return importlib.import_module(f".{name}", __name__)


def _self_test() -> str | None:
    from . import self_test

    return self_test.run()


def __dir__() -> list[str]:
    return sorted(__all__)
