"""Replaces bitsandbytes, if it is not installed, as soon as transformers is imported.

`import oddsmith` must be enough for a script that loads a model with a `BitsAndBytesConfig`, and
must not take the seconds of importing transformers, so transformers' table of quantizers is changed
when it is created.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .patch import Patch
from .quantizer_table import MODULE, TABLE, has_bitsandbytes

__all__ = ["HOOK", "ImportHook", "install"]


class ImportHook(Patch):
    """A finder in `sys.meta_path`, which changes the table whenever its module is imported."""

    target = f"sys.meta_path, for {MODULE}"
    purpose = "Changes transformers' table of quantizers when transformers is imported, not before."
    tested = "Python 3.11 and 3.13, transformers 5.17 and 5.24"
    fallback = "call oddsmith.use_for_bitsandbytes() after transformers is imported"

    def _change(self) -> None:
        self._finder = _Finder()
        sys.meta_path.insert(0, self._finder)

    def _restore(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)


HOOK = ImportHook()


def install() -> None:
    """Loads NF4 models with oddsmith from now on, if bitsandbytes is not installed."""
    if has_bitsandbytes():
        return
    HOOK.ensure()
    if MODULE in sys.modules:
        with suppress(Exception):  # a failing import raises where it was started
            # If another thread is importing it, this waits until it is done.
            importlib.import_module(MODULE)
            TABLE.ensure()


class _Finder(MetaPathFinder):
    """Finds the module through the other finders, and changes its table after it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Another loader, followed by the change."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        # Code that reads the module's loader later gets the real one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        TABLE.ensure()
