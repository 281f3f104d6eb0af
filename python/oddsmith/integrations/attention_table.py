"""Attention over packed rows in transformers' tables, under the name that a model has."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..packing.pattern import Segments
from .packed_attention import attend
from .packed_masks import CannotPack, pattern_mask
from .patch import Patch, Unsupported, find

__all__ = ["TABLE", "AttentionTable", "PackedRow", "why_not"]

_INTERFACE = "transformers.modeling_utils:AttentionInterface"
_MASKS = "transformers.masking_utils:AttentionMaskInterface"
_SDPA = "transformers.integrations.sdpa_attention:sdpa_attention_forward"
# The functions that ours computes the same as; those that the installed version has.
_KNOWN = (
    _SDPA,
    "transformers.integrations.flash_attention:flash_attention_forward",
    "transformers.integrations.flex_attention:flex_attention_forward",
)
# Not in the table: the function of a model's own file, which the table is asked for with a default.
_EAGER = "eager"


class AttentionTable(Patch):
    """
    Registers [`~oddsmith.integrations.packed_attention.attend`] under every name whose function
    computes attention by its definition: `sdpa`, `eager`, `flex_attention`, `flash_attention_2` and its
    kin, and the names of flash kernels from the hub; and masks for packed rows under the same names.
    """

    target = "transformers.AttentionInterface and AttentionMaskInterface"
    purpose = "Attention over packed rows; every other call goes to what was registered before."
    tested = "transformers 5.17 and 5.24"
    fallback = "batches go through models with their padding"
    needs = (
        _INTERFACE,
        f"{_INTERFACE}.get_interface",
        _MASKS,
        _SDPA,
    )

    def __init__(self) -> None:
        super().__init__()
        self._theirs: dict[str, Any] = {}
        self._ours: dict[str, Any] = {}
        self._get: Any = None
        self._our_get: Any = None

    def serves(self, name: str | None) -> bool:
        """Whether attention under this name is ours at the moment."""
        return self.is_applied() and (name == _EAGER or f"{_INTERFACE}/{name}" in self._ours)

    def _check(self) -> None:
        if not _served():
            raise Unsupported("another library has registered its own functions")

    def _change(self) -> None:
        self._theirs, self._ours = {}, {}
        for table, entries in ((_INTERFACE, _served()), (_MASKS, _served_masks())):
            for name, function in entries.items():
                place = f"{table}/{name}"
                self._theirs[place] = function
                self._ours[place] = (
                    partial(attend, theirs=function, name=name)
                    if table == _INTERFACE
                    else partial(pattern_mask, function)
                )
                find(table).register(name, self._ours[place])
        kind = find(_INTERFACE)
        self._get = vars(kind)["get_interface"]
        self._our_get = _with_eager(self._get)
        kind.get_interface = self._our_get

    def _restore(self) -> None:
        for place, ours in self._ours.items():
            table, _, name = place.partition("/")
            if find(table)().get(name) is ours:  # no other function was registered since
                find(table).register(name, self._theirs[place])
        kind = find(_INTERFACE)
        if self._our_get is not None and vars(kind).get("get_interface") is self._our_get:
            kind.get_interface = self._get
        self._theirs, self._ours, self._our_get = {}, {}, None

    def _try_out(self) -> None:
        for place, ours in self._ours.items():
            table, _, name = place.partition("/")
            if find(table)()[name] is not ours:
                raise Unsupported("the registered function is not the one that is called")
        got = find(_INTERFACE)().get_interface(_EAGER, _nothing)
        if getattr(got, "keywords", {}).get("theirs") is not _nothing:
            raise Unsupported("the table is not asked for eager attention")


def _nothing() -> None:
    """Stands for a model's eager attention in the trial."""


def _with_eager(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(table: Any, attn_implementation: Any, default: Any = None) -> Any:
        found = theirs(table, attn_implementation, default)
        if attn_implementation == _EAGER and default is not None and found is default:
            return partial(attend, theirs=default, name=_EAGER)
        return found

    return get_interface


def _served() -> dict[str, Any]:
    """The names whose function is known, and the function."""
    known = []
    for name in _KNOWN:
        try:
            known.append(find(name))
        except Unsupported:
            continue
    return {name: each for name, each in find(_INTERFACE)().items() if each in known}


def _served_masks() -> dict[str, Any]:
    names = {*_served(), _EAGER}
    return {name: each for name, each in find(_MASKS)().items() if name in names}


def why_not(name: str | None) -> str | None:
    """Why a model whose attention has this name in transformers' table cannot run on packed rows, or
    None.
    """
    if name == _EAGER or TABLE.serves(name):
        return None
    table = find(_INTERFACE)()
    if name not in table:
        return f"its attention is {name!r}, which transformers does not have"
    if name not in _served():
        return f"its attention {name!r} is computed by a function of another library"
    return None


TABLE = AttentionTable()


class PackedRow:
    """
    The segments of a packed row for `attend`, which is registered while there is one.

    Not a tuple or dataclass, because wrappers of models copy these.

    Args:
        segments (`tuple`): Those of a [`~oddsmith.packing.batch.PackedBatch`].

    Raises:
        [`CannotPack`]: If transformers' table does not accept the function.
    """

    def __init__(self, segments: Segments):
        self.segments = segments
        self.seen: set[nn.Module] = set()  # attention layers that got it
        if not TABLE.apply():
            raise CannotPack("transformers' table of attention functions has changed")
        weakref.finalize(self, TABLE.undo).atexit = False
