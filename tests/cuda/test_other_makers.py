"""GPUs of other makers, faked by what torch reports: no kernel is tried or launched, and results are right."""

import os
import subprocess
import sys

import pytest

from support import emulation

# What each build of torch reports. One for AMD's GPUs calls them CUDA devices, and NVIDIA's driver may be there too;
# one for Apple's or Intel's has no CUDA devices.
REPORTS = {
    "rocm": 'torch.version.hip = "6.4.43482"',
    "mps": """
torch.version.cuda = None
torch.backends.mps.is_available = lambda: True
torch.cuda.is_available = lambda: False
torch.accelerator.current_accelerator = lambda *a, **k: torch.device("mps")
""",
    "xpu": """
torch.version.cuda = None
torch.version.xpu = "20250301"
torch.cuda.is_available = lambda: False
torch.accelerator.current_accelerator = lambda *a, **k: torch.device("xpu", 0)
""",
}
# CPU tensors take the path of devices that no kernel serves.
RUN = """
import os, sys
import torch

{report}
from oddsmith import _core
from oddsmith.check import trials
from support import emulation

if {emulates}:
    assert _core.emulates_cuda()
else:
    _core.use_tensor_ops(True)
device = torch.device("cpu")
for case in trials.CASES:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        trial = trials.outcome(case, device, dtype)
        assert trial.passed, trial
driver = emulation.Driver(emulation.build())
assert driver.launches() == [] and driver.calls() == [], driver.calls()
assert _core.trusted_kernels(0) is None
assert "oddsmith.check.kernels" not in sys.modules
"""


@pytest.mark.parametrize("maker", REPORTS)
def test_no_kernel_is_tried(maker):
    environment = {
        **os.environ,
        "ODDSMITH_KERNELS": "tested",
        "ODDSMITH_CUDA_DRIVER": str(emulation.build()) if maker == "rocm" else "/no/libcuda.so",
    }
    code = RUN.format(report=REPORTS[maker], emulates=maker == "rocm")
    if maker != "rocm":
        code = code.replace("device = torch", "_core.emulate_cuda(False)\ndevice = torch", 1)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
