"""The functions that the core exports for its Rust side, called as that side calls them."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from oddsmith import _core

LIBRARY = ctypes.CDLL(_core.__file__)
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
free = ctypes.CDLL(None).free
free.argtypes = [ctypes.c_void_p]
LIBRARY.at_free.argtypes = LIBRARY.ats_free.argtypes = [ctypes.c_void_p]

KINDS = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}


def function(name: str, returns: Any = None) -> Any:
    """An exported function, with what it returns."""
    found = getattr(LIBRARY, name)
    found.restype = returns
    return found


def handle(tensor: torch.Tensor) -> int:
    """A new handle of a tensor, which someone has to free."""
    return _get_pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor), None)


def tensor(handle: int) -> torch.Tensor:
    """The tensor of a handle, which is taken over."""
    capsule = _new_capsule(handle, None, None)
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([capsule])[0]


def last_error() -> str | None:
    """The text of this thread's last error, or none."""
    pointer = function("get_and_reset_last_err", ctypes.c_void_p)()
    if not pointer:
        return None
    text = ctypes.string_at(pointer).decode()
    free(pointer)
    return text


class Scalar:
    """A number where a function of tch takes a scalar."""

    def __init__(self, value: float):
        if isinstance(value, int):
            self.pointer = function("ats_int", ctypes.c_void_p)(ctypes.c_int64(value))
        else:
            self.pointer = function("ats_float", ctypes.c_void_p)(ctypes.c_double(value))

    def __del__(self, free=LIBRARY.ats_free):
        free(self.pointer)


class Lent:
    """A handle for the time of a call."""

    def __init__(self, tensor: torch.Tensor):
        self.pointer = handle(tensor)

    def __del__(self, free=LIBRARY.at_free):
        free(self.pointer)


def converted(argument: Any, kept: list) -> list:
    """An argument as C takes it: one, or a pointer and a length."""
    if argument is None:
        return [ctypes.c_void_p()]
    if isinstance(argument, torch.dtype):
        return [ctypes.c_int(KINDS[argument])]
    if isinstance(argument, bool):
        return [ctypes.c_int(argument)]
    if isinstance(argument, int):
        return [ctypes.c_int64(argument)]
    if isinstance(argument, torch.Tensor):
        argument = Lent(argument)
    if isinstance(argument, (Lent, Scalar)):
        kept.append(argument)
        return [ctypes.c_void_p(argument.pointer)]
    if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], torch.Tensor):
        lent = [Lent(each) for each in argument]
        kept.append(lent)
        pointers = (ctypes.c_void_p * len(lent))(*[each.pointer for each in lent])
        return [pointers, ctypes.c_int(len(lent))]
    if isinstance(argument, (list, tuple)):
        return [(ctypes.c_int64 * len(argument))(*argument), ctypes.c_int(len(argument))]
    return [argument]  # of ctypes


def call(name: str, *arguments: Any) -> torch.Tensor:
    """Calls an `atg_` function.

    Raises:
        RuntimeError: With the text of its error.
    """
    out, kept = ctypes.c_void_p(), []
    values = [value for argument in arguments for value in converted(argument, kept)]
    function(name)(ctypes.byref(out), *values)
    error = last_error()
    if error is not None:
        assert not out.value
        raise RuntimeError(error)
    return tensor(out.value)


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated():
    """Bytes that the C library has handed out."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    info = ask()
    return info.uordblks + info.hblkhd


# True where the C library counts.
COUNTS = hasattr(ctypes.CDLL(None), "mallinfo2")
# Bytes a call that are less than any handle takes.
LEAK = 16


def growth(step: Callable[[], object], calls: int = 300) -> float:
    """Bytes of the heap that a call leaves behind: the least of three times, as Python's tables grow too."""
    found = []
    for _ in range(4):
        before = allocated()
        for _ in range(calls):
            step()
        found.append(allocated() - before)
    return min(found[1:]) / calls
