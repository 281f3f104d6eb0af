"""Tensors on their way from Python into the core and back."""

import ctypes
import os
import subprocess
import sys
import threading

import numpy
import pytest
import torch

from oddsmith import _core
from support import abi

X = torch.randn(64, generator=torch.Generator().manual_seed(0))


class Mine(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [X, torch.nn.Parameter(X), X.clone().requires_grad_() * 1, X.as_subclass(Mine), X.view(8, 8).T],
    ids=["plain", "parameter", "result", "subclass", "strided"],
)
def test_every_tensor_crosses(tensor):
    packed, absmax = _core.quantize_nf4(tensor, 64)
    again, scales = _core.quantize_nf4(tensor.detach().contiguous().clone(), 64)
    assert type(packed) is type(absmax) is torch.Tensor
    assert torch.equal(packed, again) and torch.equal(absmax, scales)
    assert not absmax.requires_grad


@pytest.mark.parametrize(
    "other", [None, 3.0, [X], X.numpy(), torch.float32, torch.Tensor], ids=repr
)
def test_nothing_else_does(other):
    with pytest.raises(TypeError, match="expected a torch.Tensor, got "):
        _core.quantize_nf4(other, 64)
    if isinstance(other, numpy.ndarray):
        with pytest.raises(TypeError, match="got ndarray"):
            _core.quantize_nf4(other, 64)


def test_a_result_is_the_only_holder_of_its_storage():
    packed, _ = _core.quantize_nf4(X, 64)
    assert packed._use_count() == 1
    before = X._use_count()
    for _ in range(100):
        _core.quantize_nf4(X, 64)
    assert X._use_count() == before


# Both ways, by whatever this torch has, and by capsules, which every torch has.
COUNT = """
import ctypes, sys, torch
sys.path[:0] = sys.argv[1:]
from oddsmith import _core
from support.abi import allocated
x = torch.randn(64)
def cross(times):
    for _ in range(times):
        _core.quantize_nf4(x, 64)
    for _ in range(times):
        try:
            _core.quantize_nf4(None, 64)
        except TypeError:
            pass
cross(200)
before = allocated()
cross(2000)
print(allocated() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc from 2.33 on counts")
@pytest.mark.parametrize("hidden", ["", "torch_tensor_from_pyobject,torch_tensor_to_pyobject"])
def test_crossing_leaves_nothing_behind(hidden):
    environment = os.environ | {"ODDSMITH_HIDE_TORCH_FUNCTIONS": hidden}
    command = [sys.executable, "-c", COUNT, os.path.dirname(os.path.dirname(abi.__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert abs(int(done.stdout)) < 2000 * 32 // 2


def test_threads_cross_at_the_same_time():
    expected = _core.quantize_nf4(X, 64)
    wrong = []

    def cross():
        for _ in range(200):
            found = _core.quantize_nf4(X, 64)
            if not all(map(torch.equal, found, expected)):
                wrong.append(found)

    threads = [threading.Thread(target=cross) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def no_switching():
    """Another thread of Python runs when this one gives up the lock, and not before."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)


def test_python_runs_on_during_a_call(no_switching):
    values = torch.zeros(1 << 20)
    woken, ran = threading.Event(), []

    def other():
        woken.wait()
        ran.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    woken.set()
    kept = [object() for _ in range(100_000)]  # the lock stays here
    assert not ran
    while not ran and len(kept) < 101_000:
        kept.append(_core.quantize_nf4(values, 64))
    assert ran
    thread.join()


def test_gradients_stay_off_in_the_core_alone():
    """Results are made without a graph, and the caller's switch is as it was."""
    x = X.clone().requires_grad_()
    _core.quantize_nf4(x, 64)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        _core.quantize_nf4(x, 64)
        assert not torch.is_grad_enabled()
