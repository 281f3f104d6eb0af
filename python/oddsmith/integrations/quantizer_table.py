"""transformers' table of quantizers: NF4 by oddsmith if selected, everything else as before.

Imports neither torch nor transformers, so that `import oddsmith` is fast.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

from .patch import Patch, Unsupported, find

__all__ = ["MERGE", "TABLE", "NF4ByOddsmith", "QuantizerMerge", "QuantizerTable", "serve_all"]

logger = logging.getLogger(__name__)

# The key of the quantizer of a BitsAndBytesConfig with 4 bits.
MODULE = "transformers.quantizers.auto"
METHOD = "bitsandbytes_4bit"

_TABLE = f"{MODULE}:AUTO_QUANTIZER_MAPPING"
_MERGE = f"{MODULE}:AutoHfQuantizer.merge_quantization_configs"

_serves_all = False
_reported: set[str] = set()


class NF4ByOddsmith(str):
    """`"nf4"` as the `bnb_4bit_quant_type` of a configuration that selects oddsmith."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _asked, (str(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> NF4ByOddsmith:
        return self


def _asked(name: str) -> NF4ByOddsmith:
    TABLE.ensure()  # also in a process that unpickles a configuration
    return NF4ByOddsmith(name)


def serve_all(on: bool) -> None:
    """Whether plain NF4 configurations select oddsmith too."""
    global _serves_all
    _serves_all = on
    if on:
        TABLE.ensure()


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes can be imported."""
    try:
        return importlib.util.find_spec("bitsandbytes") is not None
    except (ImportError, ValueError):  # a fake module without a specification
        return sys.modules.get("bitsandbytes") is not None


def _is_nf4(config: Any) -> bool:
    return bool(
        getattr(config, "load_in_4bit", False)
        and getattr(config, "bnb_4bit_quant_type", None) == "nf4"
    )


def _asks(config: Any) -> bool:
    if not _is_nf4(config):
        return False
    marked = isinstance(config.bnb_4bit_quant_type, NF4ByOddsmith)
    return marked or _serves_all or not has_bitsandbytes()


def _quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the class of bitsandbytes' quantizer in the table."""
    ours = _our_quantizer() if _asks(config) else None
    return (ours or TABLE.theirs)(config, *args, **kwargs)


def _our_quantizer() -> Any:
    try:
        from .transformers_quantizer import NF4Quantizer, check_base

        check_base()
    except (ImportError, AttributeError, TypeError, Unsupported) as error:
        if str(error) not in _reported:
            _reported.add(str(error))
            logger.warning(
                f"4-bit weights of oddsmith do not fit the installed transformers ({error}): "
                "models are loaded by bitsandbytes."
            )
        return None
    return NF4Quantizer


class QuantizerTable(Patch):
    """Our function in transformers' table, for 4-bit models."""

    target = f'{MODULE}.AUTO_QUANTIZER_MAPPING, entry "{METHOD}"'
    purpose = "Loads NF4 models without bitsandbytes, or with it installed if a configuration selects oddsmith."
    tested = "transformers 5.17 and 5.24"
    fallback = "4-bit models are loaded by bitsandbytes"
    needs = (_TABLE,)

    theirs: Any = None

    def _check(self) -> None:
        table = find(_TABLE)
        if not isinstance(table, MutableMapping) or not callable(table.get(METHOD)):
            raise Unsupported(f"it has no {METHOD!r}")

    def _change(self) -> None:
        self._table = find(_TABLE)
        self.theirs, self._table[METHOD] = self._table[METHOD], _quantizer

    def _restore(self) -> None:
        if self._table.get(METHOD) is _quantizer:
            self._table[METHOD] = self.theirs

    def _is_there(self) -> bool:
        module = sys.modules.get(MODULE)
        return getattr(module, "AUTO_QUANTIZER_MAPPING", None) is self._table


class QuantizerMerge(Patch):
    """Keeps the choice of a configuration where transformers would use that of the checkpoint."""

    target = f"{MODULE}.AutoHfQuantizer.merge_quantization_configs"
    purpose = "An NF4Config also applies to checkpoints that are already quantised."
    tested = "transformers 5.17 and 5.24"
    fallback = "for quantised checkpoints, call use_for_bitsandbytes() in addition to NF4Config()"
    needs = (_MERGE,)

    def _check(self) -> None:
        owner = find(_MERGE.rpartition(".")[0])
        if not isinstance(vars(owner).get("merge_quantization_configs"), classmethod):
            raise Unsupported("it is not a class method")

    def _change(self) -> None:
        self._owner = find(_MERGE.rpartition(".")[0])
        theirs = self._theirs = vars(self._owner)["merge_quantization_configs"]

        def merge(cls: type, *args: Any, **kwargs: Any) -> Any:
            merged = theirs.__get__(None, cls)(*args, **kwargs)
            kinds = [getattr(x, "bnb_4bit_quant_type", None) for x in (*args, *kwargs.values())]
            if _is_nf4(merged) and any(isinstance(kind, NF4ByOddsmith) for kind in kinds):
                merged.bnb_4bit_quant_type = NF4ByOddsmith("nf4")
            return merged

        self._ours = classmethod(merge)
        self._owner.merge_quantization_configs = self._ours

    def _restore(self) -> None:
        if vars(self._owner).get("merge_quantization_configs") is self._ours:
            self._owner.merge_quantization_configs = self._theirs

    def _is_there(self) -> bool:
        return getattr(sys.modules.get(MODULE), "AutoHfQuantizer", None) is self._owner


TABLE = QuantizerTable()
MERGE = QuantizerMerge()
