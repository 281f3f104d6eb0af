"""Every call that can fail does so in its turn: an exception with a sentence, nothing lost, and right results afterwards."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oddsmith import _core
from oddsmith.head.arguments import HeadArguments
from oddsmith.optim import AdamW8bit, PagedAdamW8bit
from oddsmith.optim.adamw.moments import encode
from oddsmith.optim.adamw.step import AdamUpdate, NonFinite, adamw_step, rule_of
from support import emulation
from support.kernel_ops import FAMILIES
from support.operators import called
from support.paths import ROOT

# Errors of a driver: an unknown one, memory, and a context that is lost.
UNKNOWN, MEMORY, ILLEGAL_ADDRESS = 999, 2, 700


def places(code, *families):
    """How many calls of the driver and the compiler failed, by family."""
    return json.loads(run("-m", "support.forked_faults", str(code), *families))


def run(*arguments):
    """What another process prints, in which nothing of CUDA has been used."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)]),
        "ODDSMITH_KERNELS": "untested",
        "ODDSMITH_CUDA_DRIVER": str(emulation.build()),
        "ODDSMITH_NVRTC": str(emulation.build_compiler()),
        # Kernels are compiled each time.
        "ODDSMITH_CACHE_DIR": "/dev/null/none",
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("code", "families"), [(UNKNOWN, ["adamw8", "blockwise8"]), (ILLEGAL_ADDRESS, ["nf4_quantize"])]
)
def test_every_call_of_the_driver_fails(code, families):
    found = places(code, *families)
    assert min(found.values()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("code", [UNKNOWN, MEMORY, ILLEGAL_ADDRESS])
def test_every_call_of_the_driver_fails_in_every_family(code):
    found = places(code, *FAMILIES)
    # For the notes: pytest -s.
    print(f"\n{code}: {sum(found.values())} places, {found}")
    assert sum(found.values()) > 250


class Short(TorchDispatchMode):
    """Memory is short at the `last`-th of torch's operators, those of the core too."""

    def __init__(self, last):
        super().__init__()
        self.last, self.count = last, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Writes allocate nothing, nor does a profiler's mark.
        allocates = func.namespace == "aten" and "copy_" not in func.name()
        self.count += allocates
        if allocates and self.count == self.last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return called(self, func, args, kwargs)


def failures(run):
    """Runs with memory that is short at each operator in turn; yields after each error."""
    with Short(0) as whole:
        run()
    for last in range(1, whole.count + 1):
        with pytest.raises(RuntimeError, match="^CUDA out of memory|^libtorch: "), Short(last):
            run()
        yield last


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_short_at_every_operator(emulated_driver, family, capfd):
    expected = FAMILIES[family]()
    count = 0
    for count in failures(FAMILIES[family]):
        if count % 7 == 0:
            assert all(torch.equal(*pair) for pair in zip(FAMILIES[family](), expected))
    assert all(torch.equal(*pair) for pair in zip(FAMILIES[family](), expected))
    assert count > 1 and torch.is_grad_enabled()
    capfd.readouterr()  # libtorch prints each error


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
def test_a_step_that_failed_is_taken_again(emulated_driver, kind, capfd, monkeypatch):
    """Its number has not advanced, so the bias correction is that of the first."""
    monkeypatch.setattr(AdamW8bit, "report", lambda self: None)  # after a step on a CPU only

    def made():
        torch.manual_seed(4)
        parameters = [nn.Parameter(torch.randn(300, 2).t()), nn.Parameter(torch.randn(33).half())]
        optimizer = kind(parameters, lr=1e-2, stochastic_rounding=True, min_8bit_size=256)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return parameters, optimizer

    expected, optimizer = made()
    with Short(0) as whole:
        optimizer.step()
    assert whole.count > 8
    for last in range(1, whole.count + 1):
        found, again = made()
        with pytest.raises(torch.OutOfMemoryError), Short(last):
            again.step()
        assert all(torch.equal(*pair) for pair in zip(found, made()[0])), "nothing has changed"
        again.step()
        assert all(torch.equal(*pair) for pair in zip(found, expected)), last
    capfd.readouterr()


def test_a_step_by_torch_that_failed_leaves_whole_parameters(emulated_driver, capfd):
    """Each with its value and moments of the same step."""
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}

    def updates():
        made = []
        for size in (300, 7):
            value = torch.linspace(-1, 1, size)
            state = encode(torch.zeros(size), torch.zeros(size))
            made.append(AdamUpdate(value, value.cos(), state, rule_of(group, 1)))
        return made

    def tensors(update):
        return [update.value, *(update.state[name] for name in ("state1", "absmax1", "absmax2"))]

    _core.trust_kernels(0, [])
    try:
        before, after = updates(), updates()
        with Short(0) as whole:
            adamw_step(after, NonFinite())
        for last in range(1, whole.count + 1):
            found = updates()
            with pytest.raises(torch.OutOfMemoryError), Short(last):
                adamw_step(found, NonFinite())
            for these, *others in zip(found, before, after):
                same = [
                    all(torch.equal(*pair) for pair in zip(tensors(these), tensors(other)))
                    for other in others
                ]
                assert any(same), last
    finally:
        _core.trust_kernels(0, list(FAMILIES))
    capfd.readouterr()


def test_memory_of_the_core_is_torch_s_error(emulated_driver, monkeypatch, capfd):
    """Callers who make their batches smaller look for it."""
    arguments = HeadArguments(
        torch.ones(6, 64), torch.ones(9, 64), None, torch.arange(6), None, 1.0
    )
    counts = iter([3, 4])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda gpu: {"num_ooms": next(counts)})
    monkeypatch.setattr("oddsmith.errors._failed_allocations", 3)
    errors = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="libtorch: ") as raised, Short(1):
            _core.linear_logps(arguments, True)
        errors.append(raised.value)
    # As many failed allocations as before, and then one more.
    assert [type(error) for error in errors] == [RuntimeError, torch.OutOfMemoryError]
    assert str(errors[1]).startswith("CUDA out of memory. ")
    capfd.readouterr()


@pytest.mark.parametrize(
    ("code", "lost"), [(UNKNOWN, False), (MEMORY, False), (ILLEGAL_ADDRESS, True), (719, True)]
)
def test_what_ruins_a_process_says_so(emulated_driver, code, lost):
    """CUDA_ERROR_LAUNCH_FAILED does too: of a kernel that ended in an exception."""
    FAMILIES["nf4_quantize"]()
    emulated_driver.reset()
    calls = ["cuCtxGetCurrent", "cuCtxSetCurrent", "cuLaunchKernel"]
    emulated_driver.fail_call(len(calls), code)
    with pytest.raises(RuntimeError, match=rf"cuLaunchKernel: .* \({code}\): ") as raised:
        FAMILIES["nf4_quantize"]()
    assert emulated_driver.calls()[: len(calls)] == calls
    emulated_driver.reset()
    emulated_driver.lib.cuCtxSetCurrent(None)
    assert ("start it again" in str(raised.value)) == lost


def test_a_graph_is_captured_before_the_first_use():
    """The kernels are not loaded then, which would end the capture; afterwards all is well."""
    code = """
import os, torch
from pathlib import Path
from oddsmith import _core
from support import emulation
from support.kernel_ops import FAMILIES
driver = emulation.Driver(Path(os.environ["ODDSMITH_CUDA_DRIVER"]))
driver.capture(0)
try:
    FAMILIES["nf4_quantize"]()
except RuntimeError as error:
    text = str(error)
assert "run the operation once before the capture" in text, text
assert driver.end_capture() == 0, "the capture is valid still"
FAMILIES["nf4_quantize"]()
driver.capture(0)
FAMILIES["nf4_quantize"]()
assert driver.end_capture() == 1
"""
    run("-c", code)


def test_a_forked_process_is_told():
    code = """
import os, sys, torch
from support.kernel_ops import FAMILIES
FAMILIES["nf4_quantize"]()
child = os.fork()
if child == 0:
    try:
        FAMILIES["nf4_quantize"]()
    except RuntimeError as error:
        os._exit(7 if "was forked from one that had used CUDA" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
FAMILIES["nf4_quantize"]()
"""
    run("-c", code)


def test_gpus_of_unlike_kinds(emulated_driver):
    """Each has its own context, modules, and trusted kernels."""
    emulated_driver.lib.emulator_set_attribute_of(1, 75, 7)
    emulated_driver.lib.emulator_set_attribute_of(1, 76, 5)
    _core.trust_kernels(1, ["nf4_quantize"])
    expected = FAMILIES["nf4_dequantize"]()
    emulated_driver.reset()
    try:
        for gpu in (1, 0, 1):
            _core.emulate_gpu(gpu)
            found = FAMILIES["nf4_dequantize"]()
            assert torch.equal(found[0], expected[0])
    finally:
        _core.emulate_gpu(0)
        _core.trust_kernels(1, None)
    launched = [(launch.kernel, launch.device) for launch in emulated_driver.launches()]
    quantize, dequantize = "nf4_quantize_f32", "nf4_dequantize_f32"
    assert launched == [(quantize, 1), (quantize, 0), (dequantize, 0), (quantize, 1)]
    identities = {_core.kernel_identity(gpu) for gpu in (0, 1)}
    assert len(identities) == 2, "verdicts and binaries of one are not those of the other"


def test_a_gpu_that_the_driver_does_not_have(emulated_driver):
    _core.trust_kernels(9, list(FAMILIES))
    _core.emulate_gpu(9)
    try:
        with pytest.raises(RuntimeError, match="CUDA kernel nf4_quantize_f32, .*cuDeviceGet"):
            FAMILIES["nf4_quantize"]()
    finally:
        _core.emulate_gpu(0)
        _core.trust_kernels(9, None)
