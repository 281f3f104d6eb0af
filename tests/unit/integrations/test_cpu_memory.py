"""pooled_memory: tensors survive it, forked processes too, and it fragments less than glibc."""

import subprocess
import sys

import pytest
import torch

from oddsmith import _core
from oddsmith.integrations.cpu_memory import pooled_memory

CPU = torch.device("cpu")

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the pool is for Linux")


def mapping(tensor: torch.Tensor) -> tuple[int, int]:
    """The range of memory that the system has mapped around a tensor."""
    with open("/proc/self/maps") as lines:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    ((first, last),) = [each for each in ranges if each[0] <= tensor.data_ptr() < each[1]]
    return first, last


@needs_linux
def test_tensors_outlive_the_pool():
    with pooled_memory(CPU):
        with pooled_memory(CPU):
            inner = torch.arange(300_000)
        still = torch.full((300_000,), 7.0)
    outside = torch.ones(300_000)
    # The pool is one mapping, of twice the machine's memory; the C library has others, which may be near.
    assert mapping(inner) == mapping(still) != mapping(outside)
    assert mapping(inner)[1] - mapping(inner)[0] > 1 << 30
    assert int(inner.sum()) == 300_000 * 299_999 // 2
    assert float(still.sum()) == 2_100_000.0
    still.resize_(600_000).fill_(2.0)
    assert float(still.sum()) == 1_200_000.0


@needs_linux
def test_no_memory_is_an_error_through_the_pool():
    """libtorch throws in C++, from below the pool."""
    with pooled_memory(CPU):
        with pytest.raises(RuntimeError, match="allocate"):
            torch.empty(1 << 50, dtype=torch.uint8)
        assert torch.ones(300_000).sum() == 300_000


def test_other_devices_are_not_affected(monkeypatch):
    monkeypatch.setattr(_core, "install_pool", lambda: pytest.fail("called"))
    with pooled_memory(torch.device("cuda")):
        pass


def test_it_is_taken_out_after_an_error(monkeypatch):
    calls = []
    monkeypatch.setattr(_core, "install_pool", lambda: calls.append("in"))
    monkeypatch.setattr(_core, "uninstall_pool", lambda: calls.append("out"))
    with pytest.raises(ZeroDivisionError), pooled_memory(CPU):
        1 / 0  # noqa: B018
    assert calls == ["in", "out"]


FORKED = """
import os, torch
from oddsmith.integrations.cpu_memory import pooled_memory
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
with pooled_memory(torch.device("cpu")):
    before = torch.full((500_000,), 3.0)
    child = os.fork()
    if child == 0:
        inside = torch.full((500_000,), 5.0)
        del before
        more = [torch.full((500_000,), float(i)) for i in range(5)]
        right = float(inside.sum()) == 2_500_000.0 and all(
            float(x[-1]) == i for i, x in enumerate(more)
        )
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert float(before.sum()) == 1_500_000.0
"""

HELD = """
import sys, torch
from oddsmith.integrations.cpu_memory import pooled_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def layers():
    # As a checkpointed forward: large temporaries come and go, a small output stays.
    outputs = []
    for _ in range(24):
        temporaries = [torch.ones(4_000_000 // 4) for _ in range(4)]
        outputs.append(torch.ones(400_000 // 4))
        del temporaries
    return outputs

before = resident()
with pooled_memory(torch.device("cpu")):
    outputs = layers()
    held = resident() - before
    del outputs
print(held, resident() - before)
"""


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_linux
def test_forked_processes():
    run(FORKED)


@needs_linux
def test_holes_are_used_again_and_given_back():
    held, left = map(int, run(HELD))
    # 24 outputs of 0.4 MB and 16 MB of temporaries; a huge page may be touched in part.
    assert held < 40_000_000
    assert left < held / 2
