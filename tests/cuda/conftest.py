"""The emulated driver, instead of a GPU's."""

from pathlib import Path

import pytest

from oddsmith import _core
from oddsmith.check import kernels, trial_process, verdicts
from support import emulation
from support.broken_kernels import FAMILIES


@pytest.fixture(scope="session")
def samples() -> Path:
    """The library of the kernels beside this file."""
    return emulation.build([Path(__file__).parent / "samples.cu"])


@pytest.fixture
def sample_driver(samples):
    driver = emulation.Driver(samples)
    driver.reset()
    yield driver
    driver.reset()


@pytest.fixture
def untried(emulated_driver, monkeypatch, tmp_path):
    """An emulated GPU on which nothing has been tried."""
    monkeypatch.setenv(kernels.VARIABLE, "tested")
    monkeypatch.setattr(verdicts, "kernel_folder", lambda: tmp_path)
    # The emulator takes its time.
    monkeypatch.setattr(trial_process, "LIMITS", (120.0, 120.0))
    given = trial_process.environment
    # Only for processes that try: this one keeps the compiler that it has.
    own = {
        "ODDSMITH_NVRTC": str(emulation.build_compiler()),
        "ODDSMITH_CACHE_DIR": str(tmp_path),
    }
    monkeypatch.setattr(trial_process, "environment", lambda env, gpu: given(env, gpu) | own)
    _core.trust_kernels(0, None)
    yield emulated_driver
    _core.trust_kernels(0, FAMILIES)
