"""GPUs of other makers, faked by what torch reports: no kernel is tried or launched, and results are right."""

import os
import subprocess
import sys

from support import emulation

# A build of torch for AMD's GPUs calls them CUDA devices, and NVIDIA's driver may be there too.
AMD = """
import sys
import torch

torch.version.hip = "6.4.43482"
from oddsmith import _core
from oddsmith.check import trials
from support import emulation

assert _core.emulates_cuda()
device = torch.device("cpu")
for case in trials.CASES:
    trial = trials.outcome(case, device, torch.float32)
    assert trial.passed, trial
driver = emulation.Driver(emulation.build())
assert driver.launches() == []
assert _core.trusted_kernels(0) is None
assert "oddsmith.check.kernels" not in sys.modules
"""


def test_amd():
    environment = {
        **os.environ,
        "ODDSMITH_KERNELS": "tested",
        "ODDSMITH_CUDA_DRIVER": str(emulation.build()),
    }
    done = subprocess.run(
        [sys.executable, "-c", AMD], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
