"""Stands in for bitsandbytes, where it is not installed, as soon as transformers is there.

`import oddsmith` alone has to be enough for a script that loads a model with a `BitsAndBytesConfig`, and
must not take the seconds that importing transformers takes: what transformers asks for a quantizer is
replaced when its table is made, by a function that imports ours when it is called.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["METHOD", "install"]

# The name under which transformers looks for the quantizer of a BitsAndBytesConfig with 4 bits.
METHOD = "bitsandbytes_4bit"

_TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Serves 4-bit models from now on, if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    if _TABLE in sys.modules:
        _serve(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _serve(table: ModuleType) -> None:
    table.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer


def _quantizer(config: Any, **kwargs: Any) -> Any:
    from .transformers_quantizer import NF4Quantizer, use_for_bitsandbytes

    use_for_bitsandbytes()
    return NF4Quantizer(config, **kwargs)


class _Finder(MetaPathFinder):
    """Finds the table once, as everyone else would."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What asks the module for its loader later gets the real one.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _serve(module)
